"""What the back-ends of the complexity predictor have in common: what may be asked of them, and the ordinal reading of their chances."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from apportion.control.labels import stable_correct


class Predictor(Protocol):
    """The chance that each rung is right, from the signal of the glance. Shapes: signal (b, f) -> (b, k)."""

    temperature: Tensor  # (), set by calibration, as is the shift
    shift: Tensor  # (k,)

    @property
    def macs(self) -> int: ...

    def standardise(self, signal: Tensor) -> Tensor: ...

    def logits(self, standard: Tensor) -> Tensor: ...

    def __call__(self, signal: Tensor) -> Tensor: ...


def cumulative(quality: Tensor) -> Tensor:
    """Whether each rung is right and every dearer one too: the stable-correct label as ordinal targets, non-decreasing along the ladder.

    Shapes: (n, k) -> (n, k) bool; a row without a stable rung is False throughout.
    """
    rung, solvable = stable_correct(quality)
    return solvable[:, None] & (torch.arange(quality.shape[1], device=quality.device) >= rung[:, None])


def running_maximum(chance: Tensor) -> Tensor:
    """Chance that some rung up to each one is right, non-decreasing along the ladder, (b, k)."""
    return chance.cummax(1).values


def cheapest(chance: Tensor, *, share: float) -> Tensor:
    """The cheapest rung that reaches this share of the dearest's chance, for chances that do not fall, (b, k) -> (b,)."""
    return (chance >= share * chance[:, -1:]).int().argmax(1)
