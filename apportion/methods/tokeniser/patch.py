"""Patch embedding: cut the image into squares, project each one, add positions, put class and register tokens in front.

Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", arXiv 2010.11929, section 3.1; registers: Darcet et al. 2024, arXiv 2309.16588.
(b, channels, side, side) -> Tokens. Cost: one product per patch.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from apportion.errors import PathError
from apportion.vocab import Card, Tokens


class PatchTokeniser(nn.Module):
    """`stem` maps the image to (b, d, rows, columns); positions cover the patches, and the prefix too where `position_prefix` says so; None: no positions."""

    card = Card("ViT patch embedding", "Dosovitskiy et al. 2021", "2010.11929", None, exact=True, needs="nothing")
    entering: tuple[int, ...] = ()

    def __init__(
        self,
        *,
        image_size: int,
        channels: int,
        patch: int,
        dim: int,
        class_token: bool,
        registers: int,
        position_prefix: bool | None,
        bias: bool,
        stem: str,
        norm: nn.Module,
    ) -> None:
        super().__init__()
        self.image_size, self.patch = image_size, patch
        self.grid = image_size // patch
        self.prefix = int(class_token) + registers
        self.project = _conv_stem(channels, patch, dim) if stem == "conv" else nn.Conv2d(channels, dim, patch, patch, bias=bias)
        self.first = nn.Parameter(torch.empty(self.prefix, dim).normal_(std=0.02)) if self.prefix else None
        self.position_prefix = bool(position_prefix) and self.prefix > 0
        rows = self.grid**2 + self.position_prefix * self.prefix
        self.position = None if position_prefix is None else nn.Parameter(torch.empty(rows, dim).normal_(std=0.02))
        self.norm = norm

    def forward(self, inputs: Tensor, patch: int) -> Tokens:
        if patch != self.patch:
            raise PathError(f"patch {patch}", wanted=f"patch {self.patch}", do="Read the model again with that patch size.")
        if inputs.shape[-2:] != (self.image_size, self.image_size):
            raise PathError(
                f"an input of {tuple(inputs.shape)}",
                wanted=f"(batch, channels, {self.image_size}, {self.image_size})",
                do="Resize, as the bundle's preprocessing does.",
            )
        x = self.project(inputs).flatten(2).transpose(1, 2)
        b = x.shape[0]
        if self.position is not None and not self.position_prefix:
            x = x + self.position
        if self.first is not None:
            x = torch.cat((self.first.expand(b, -1, -1), x), 1)
        if self.position is not None and self.position_prefix:
            x = x + self.position
        n = x.shape[1]
        return Tokens(self.norm(x), x.new_ones(b, n), torch.arange(n, device=x.device).expand(b, n), self.prefix)

    def macs(self, patch: int) -> int:
        total, side = 0, self.image_size
        for conv in (m for m in self.project.modules() if isinstance(m, nn.Conv2d)):
            side = side // conv.stride[0]
            total += side**2 * conv.out_channels * conv.in_channels * conv.kernel_size[0] * conv.kernel_size[1]
        return total


def _conv_stem(channels: int, patch: int, dim: int) -> nn.Sequential:
    """Halving 3x3 convolutions down to the patch grid (Xiao et al. 2021, arXiv 2106.14881): learns faster on little data."""
    halvings = patch.bit_length() - 1
    widths = [channels, *(max(dim >> (halvings - i), 16) for i in range(1, halvings)), dim]
    layers: list[nn.Module] = []
    for inp, out in itertools.pairwise(widths):
        layers += [nn.Conv2d(inp, out, 3, 2, 1), nn.GELU()]
    return nn.Sequential(*layers, nn.Conv2d(dim, dim, 1))


METHOD = PatchTokeniser
