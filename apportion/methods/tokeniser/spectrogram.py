"""Spectrogram embedding: overlapping squares of time and frequency, projected, with a class and a distillation token and positions.

Gong et al. 2021, "AST: Audio Spectrogram Transformer", arXiv 2104.01778, section 2.1. (b, frames, bands) float -> Tokens, all times of the lowest bands first.
Cost: patch^2 d for each square; overlap multiplies the squares, so whatever follows costs more than of a picture of that size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from apportion.errors import PathError
from apportion.vocab import Card, Tokens


class SpectrogramTokeniser(nn.Module):
    """`steps`: from one square to the next, in bands and in frames; what is left over at the ends is not seen. Positions cover the `prefix` too."""

    card = Card("Spectrogram patch embedding", "Gong et al. 2021", "2104.01778", None, exact=True, needs="nothing")
    entering: tuple[int, ...] = ()

    def __init__(self, *, frames: int, bands: int, patch: int, steps: tuple[int, int], dim: int, prefix: int) -> None:
        super().__init__()
        self.frames, self.bands, self.patch, self.prefix = frames, bands, patch, prefix
        rows, columns = ((side - patch) // step + 1 for side, step in zip((bands, frames), steps, strict=True))
        self.squares = rows * columns
        self.project = nn.Conv2d(1, dim, patch, steps)
        self.first = nn.Parameter(torch.empty(prefix, dim).normal_(std=0.02))
        self.position = nn.Parameter(torch.empty(prefix + self.squares, dim).normal_(std=0.02))

    def forward(self, inputs: Tensor, patch: int) -> Tokens:
        if patch != self.patch:
            raise PathError(f"patch {patch}", wanted=f"patch {self.patch}", do="Build paths with Space.path().")
        if inputs.shape[1:] != (self.frames, self.bands):
            raise PathError(f"an input of {tuple(inputs.shape)}", wanted=f"(batch, {self.frames}, {self.bands})", do="Cut the spectrogram, or fill it up.")
        x = self.project(inputs.transpose(1, 2)[:, None]).flatten(2).transpose(1, 2)
        b, n = len(x), len(self.position)
        x = torch.cat((self.first.expand(b, -1, -1), x), 1) + self.position
        return Tokens(x, x.new_ones(b, n), torch.arange(n, device=x.device).expand(b, n), self.prefix)

    def macs(self, patch: int) -> int:
        return self.squares * self.project.weight.numel()


METHOD = SpectrogramTokeniser
