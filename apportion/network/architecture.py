"""What a dense network is made of: plain numbers and names, enough to build it again without the library it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Architecture:
    """Shape and flavour of a dense encoder for images.

    `pool_norm_eps` and the other epsilons are the norms' own; `classes` 0 means that the head returns the pooled features.
    """

    image_size: int
    patch: int
    dim: int
    depth: int
    heads: int
    hidden: int
    classes: int
    channels: int = 3
    stem: Literal["patch", "conv"] = "patch"
    patch_bias: bool = True
    class_token: bool = True
    registers: int = 0
    position_prefix: bool = True  # positions for class and register tokens as well
    stem_norm: bool = False  # a norm before the first block (CLIP)
    qkv_bias: bool = True
    proj_bias: bool = True
    qk_norm: bool = False
    layer_scale: bool = False
    norm_first: bool = True  # False: the norm stands after each residual, as in BERT
    activation: Literal["gelu", "gelu_tanh", "quick_gelu", "relu"] = "gelu"
    eps: float = 1e-6
    final_norm: bool = True
    head_norm: bool = False  # a norm after pooling
    head_bias: bool = True
    pool: Literal["class_token", "mean", "attention_pool"] = "class_token"

    @property
    def tokens(self) -> int:
        return (self.image_size // self.patch) ** 2 + self.prefix

    @property
    def prefix(self) -> int:
        return int(self.class_token) + self.registers
