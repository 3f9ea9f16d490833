"""Where inputs become tokens: the tokeniser that an architecture asks for, and the parts that it shares with the rest of the network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from apportion.errors import PlanError
from apportion.methods import find
from apportion.network.architecture import Architecture


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the approximation that CLIP was trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


def activation(name: str) -> nn.Module:
    plain = {
        "gelu": nn.GELU(),
        "gelu_tanh": nn.GELU(approximate="tanh"),
        "quick_gelu": QuickGELU(),
        "relu": nn.ReLU(),
        "silu": nn.SiLU(),
        "tanh": nn.Tanh(),
        "identity": nn.Identity(),
    }
    return plain[name]


def layer_norm(a: Architecture, width: int = 0) -> nn.Module:
    return find("norm", "layernorm")(width or a.dim, eps=a.eps, bias=a.norm_bias)


def tokeniser(a: Architecture) -> Any:
    """Raises PlanError where what only images have is asked for something else."""
    only = {name: value for name in ("grey_level", "tape", "tape_rows", "tape_key") if (value := getattr(a, name))}
    if only and not a.image_size:
        raise PlanError(f"{', '.join(f'{name} = {value:g}' for name, value in only.items())} without images", wanted="images", do="Leave them at 0.")
    if a.columns:
        return find("tokeniser", "feature")(numbers=a.numbers, categories=a.categories, dim=a.dim, prefix=a.prefix)
    if a.points:
        return find("tokeniser", "series")(points=a.points, channels=a.channels, patch=a.patch, stride=a.stride, dim=a.dim, prefix=a.prefix)
    if a.words:
        embedding = a.embedding or a.dim
        return find("tokeniser", "word")(
            words=a.words,
            length=a.length,
            padding=a.padding,
            dim=a.dim,
            embedding=embedding,
            positions=a.positions,
            offset=a.position_offset,
            types=a.token_types,
            class_token=a.class_token,
            norm=layer_norm(a, embedding) if a.stem_norm else nn.Identity(),
        )
    if a.samples or a.frames:
        return _of_sound(a)
    patches = find("tokeniser", "patch")(
        image_size=a.image_size,
        channels=a.channels,
        patch=a.patch,
        dim=a.dim,
        class_token=a.class_token,
        registers=a.registers,
        position_prefix=a.position_prefix if a.learned_positions else None,
        bias=a.patch_bias,
        stem=a.stem,
        norm=layer_norm(a) if a.stem_norm else nn.Identity(),
    )
    if a.grey_level:
        patches = find("tokeniser", "apt").from_dense(patches, level=a.grey_level)  # pyright: ignore[reportAttributeAccessIssue]
    return _taped(a, patches) if a.tape else patches


def _taped(a: Architecture, part: Any) -> Any:
    """Raises PlanError where tokens have a place by their number, which those behind the patches have not."""
    if a.rotary or a.relative_buckets or a.window or a.grey_level:
        raise PlanError(
            "a tape behind patches with rotary positions, a window, a bias by distance or adaptive sizes", wanted="learned positions", do="Leave the tape out."
        )
    tape = find("tokeniser", "adatape")
    return tape.from_dense(part, rows=a.tape_rows, dim=a.dim, key=a.tape_key or a.dim, reads=a.tape, hidden=a.hidden)  # pyright: ignore[reportAttributeAccessIssue]


def _of_sound(a: Architecture) -> Any:
    if a.samples:
        return find("tokeniser", "wave")(
            samples=a.samples,
            dim=a.dim,
            channels=a.wave_channels,
            kernels=a.wave_kernels,
            steps=a.wave_steps,
            layer_norms=a.wave_norm == "layer",
            bias=a.wave_bias,
            act=activation(a.wave_activation),
            position_kernel=a.position_kernel,
            position_groups=a.position_groups,
            project_norm=layer_norm(a, a.wave_channels[-1]) if a.wave_project_norm else nn.Identity(),
            norm=layer_norm(a) if a.stem_norm else nn.Identity(),
        )
    if not a.patch:
        return find("tokeniser", "frame")(frames=a.frames, bands=a.bands, dim=a.dim)
    return find("tokeniser", "spectrogram")(frames=a.frames, bands=a.bands, patch=a.patch, steps=a.patch_steps, dim=a.dim, prefix=a.prefix)
