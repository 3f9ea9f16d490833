"""Patches of a time series: each channel normalised over its own time, cut into stretches that overlap, all channels of a stretch projected to one token.

Nie et al. 2023, "A Time Series is Worth 64 Words" (PatchTST), arXiv 2211.14730, section 3.1: patches, the last value repeated `stride` times behind the end,
and instance normalisation (Kim et al. 2022, RevIN, no gain learned). (b, channels, points) float, NaN where nothing was measured -> Tokens, in the order of
time. What is NaN counts in neither mean nor deviation, and is 0 afterwards. Cost: channels * patch * d for each token. A series that is shorter costs as much.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from apportion.errors import PathError, PlanError
from apportion.vocab import Card, Tokens

EPS = 1e-5  # added to the variance, as the paper's code and RevIN have it


class SeriesTokeniser(nn.Module):
    """`stride`: points from one patch to the next. Positions are learned; the `prefix` has none. Raises PlanError for a patch that does not fit."""

    card = Card(
        "PatchTST",
        "Nie et al. 2023",
        "2211.14730",
        None,
        exact=True,
        needs="nothing",
        changed="channels share tokens; mean and deviation are no part of what is normalised and are added to every token, projected: a label may hang on them",
    )
    entering: tuple[int, ...] = ()

    def __init__(self, *, points: int, channels: int, patch: int, stride: int, dim: int, prefix: int) -> None:
        super().__init__()
        if not 0 < stride <= patch <= points or channels < 1:
            found = f"patches of {patch} points, {stride} apart, in {channels} channels of {points}"
            raise PlanError(found, wanted="a stride of at least 1, no longer than the patch, in turn no longer than the series", do="Correct them.")
        self.points, self.channels, self.patch, self.stride, self.prefix = points, channels, patch, stride, prefix
        self.project = nn.Conv1d(channels, dim, patch, stride)
        self.level = nn.Linear(2 * channels, dim, bias=False)
        self.first = nn.Parameter(torch.empty(prefix, dim).normal_(std=0.02))
        self.position = nn.Parameter(torch.empty((points - patch) // stride + 2, dim).normal_(std=0.02))

    def forward(self, inputs: Tensor, patch: int) -> Tokens:
        if patch != self.patch:
            raise PathError(f"patch {patch}", wanted=f"patch {self.patch}", do="Build paths with Space.path().")
        if inputs.shape[1:] != (self.channels, self.points):
            raise PathError(f"an input of {tuple(inputs.shape)}", wanted=f"(batch, {self.channels}, {self.points})", do="Make it by the bundle's Align.")
        x, mean, deviation = normalised(inputs)
        x = self.project(torch.cat((x, x[..., -1:].expand(-1, -1, self.stride)), -1)).transpose(1, 2) + self.position
        # Grown slowly: one series far from the others must not drown its own shape.
        level = self.level(torch.cat((mean.sign() * mean.abs().log1p(), deviation.log1p()), 1))
        x = torch.cat((self.first.expand(len(x), -1, -1), x), 1) + level[:, None]
        b, n, _ = x.shape
        return Tokens(x, x.new_ones(b, n), torch.arange(n, device=x.device).expand(b, n), self.prefix)

    def macs(self, patch: int) -> int:
        return len(self.position) * self.project.weight.numel() + self.level.weight.numel()


def normalised(inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(b, channels, points) of mean 0 and variance 1 over what is not NaN, 0 where it is; mean and deviation, (b, channels), 0 and about 0 of nothing."""
    absent = inputs.isnan()
    x, count = inputs.masked_fill(absent, 0), (~absent).sum(-1).clamp_min(1)
    mean = x.sum(-1) / count
    x = (x - mean[..., None]).masked_fill(absent, 0)
    deviation = (x.square().sum(-1) / count + EPS).sqrt()
    return x / deviation[..., None], mean, deviation


METHOD = SeriesTokeniser
