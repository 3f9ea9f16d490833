"""The branch is added after a learned factor for each channel.

Touvron et al. 2021, "Going deeper with Image Transformers", arXiv 2103.17239, section 2 (LayerScale).
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from apportion.vocab import Card


class LayerScale(nn.Module):
    card = Card("LayerScale", "Touvron et al. 2021", "2103.17239", None, exact=True, needs="nothing")

    def __init__(self, dim: int, *, initial: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((dim,), initial))

    @classmethod
    def from_dense(cls, part: nn.Module, *, dim: int) -> Self:
        """A factor of one everywhere, which is the plain residual."""
        return cls(dim)

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        return x + branch * self.scale


METHOD = LayerScale
