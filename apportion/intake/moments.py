"""Mean and deviation of columns, of numbers that come in parts: no more than one part is held."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor


@final
class Moments:
    """What has come of each column, NaN counting for nothing: how many, their mean and their deviation, in double precision.

    Parts are merged as Chan, Golub and LeVeque do ("Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979, section 2), each column
    less the first number in it: so numbers that are all the same have a deviation of exactly 0.
    """

    def __init__(self, columns: int) -> None:
        self.count = torch.zeros(columns, dtype=torch.float64)
        self._first = torch.full((columns,), torch.nan, dtype=torch.float64)
        self._mean, self._squares = torch.zeros_like(self.count), torch.zeros_like(self.count)

    def add(self, part: Tensor) -> None:
        """(rows, columns) float64."""
        there = ~part.isnan()
        found, row = there.any(0), there.int().argmax(0, keepdim=True)
        self._first = torch.where(self._first.isnan() & found, part.gather(0, row)[0], self._first)
        x = torch.where(there, part - self._first, 0.0)
        count = there.sum(0).double()
        mean = x.sum(0) / count.clamp_min(1)
        squares = torch.where(there, x - mean, 0.0).square().sum(0)
        every = self.count + count
        apart, share = mean - self._mean, count / every.clamp_min(1)
        self._squares += squares + apart.square() * self.count * share
        self._mean += apart * share
        self.count = every

    @property
    def mean(self) -> Tensor:
        return self._first + self._mean

    @property
    def std(self) -> Tensor:
        """Over all, not over one fewer."""
        return (self._squares / self.count.clamp_min(1)).sqrt()
