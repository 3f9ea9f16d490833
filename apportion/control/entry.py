"""Before anything has run: how many tokens a sample needs says which rung it takes, with a threshold for every budget at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from apportion.control.labels import check_table
from apportion.control.rules import within_reach
from apportion.errors import ControlError
from apportion.vocab import Outcomes

KNOTS = 257  # budgets whose thresholds are known
TRIED = 1025  # thresholds on the way from "all are plain" to "none is", at most


class Entry(nn.Module):
    """The cheapest rung that a sample's plain cells allow: one that joins c of them suffices where c are below the threshold.

    Source: Choudhury et al. 2025, arXiv 2510.18091, section 3 (what is plainer than a threshold, in bits, is one coarse token); here the threshold follows
    from the budget. `joins` (k,): how many cells each rung joins, fewer for dearer ones, none on the full path. The budget is a target for the mean cost, not
    passed on the calibration rows; the cap is a ceiling that no sample passes. Both are shares of the full path. A sample's choice depends on that sample
    alone. Shapes: signal (b, cells), budget (), cap () -> (b,) int64. Nothing is learned: what is hard and plain is taken for easy.
    """

    cost: Tensor
    joins: Tensor
    budgets: Tensor
    thresholds: Tensor
    chances: Tensor

    def __init__(self, rungs: int, cells: int, *, knots: int = KNOTS) -> None:
        super().__init__()
        self.cells = cells
        self.register_buffer("cost", torch.zeros(rungs))
        self.register_buffer("joins", torch.zeros(rungs, dtype=torch.int64))
        self.register_buffer("budgets", torch.zeros(knots))
        self.register_buffer("thresholds", torch.full((knots,), -math.inf))
        self.register_buffer("chances", torch.zeros(rungs))

    @classmethod
    def from_config(cls, config: Mapping[str, int]) -> Entry:
        """An empty one of these sizes, to load a state into."""
        return cls(config["rungs"], config["cells"], knots=config["knots"]).eval()

    def config(self) -> dict[str, int]:
        """The sizes that `from_config` wants."""
        return {"rungs": len(self.cost), "cells": self.cells, "knots": len(self.budgets)}

    @property
    def macs(self) -> int:
        """Multiply-adds per sample beside those of the signal: comparisons alone."""
        return 0

    def setting(self, *, budget: float = math.inf, cap: float = math.inf) -> tuple[Tensor, Tensor]:
        """Budget and cap as `forward` wants them. Raises ControlError where not even the cheapest rung fits."""
        return within_reach(self.cost, budget, cap)

    def threshold(self, budget: Tensor) -> Tensor:
        """Below it a cell is plain."""
        knot = (self.budgets <= budget).sum().clamp_min(1) - 1
        return self.thresholds.index_select(0, knot.reshape(1))[0]  # a tensor: an index that were a number would end the graph

    def forward(self, signal: Tensor, budget: Tensor, cap: Tensor) -> Tensor:
        return first_that_suffices(least(signal, self.joins), self.threshold(budget)).minimum((self.cost <= cap).sum() - 1)

    def chosen(self, outcomes: Outcomes, budget: float, cap: float = math.inf) -> Tensor:
        """The rung for each row of a table, (n,) int64."""
        return self(outcomes.signal, *self.setting(budget=budget, cap=cap))

    def chance(self, outcomes: Outcomes) -> Tensor:
        """How likely each rung is right, (n, k): as often as on the calibration rows, whatever is seen."""
        return self.chances.expand(len(outcomes.signal), -1)


def least(signal: Tensor, joins: Tensor) -> Tensor:
    """The threshold above which each rung suffices, (b, cells), (k,) -> (b, k): its hardest cell, of the plainest that it joins."""
    hardest = signal.sort(-1).values.index_select(1, (joins - 1).clamp_min(0))
    return hardest.masked_fill(joins == 0, -math.inf)


def first_that_suffices(least: Tensor, threshold: Tensor) -> Tensor:
    """(b, k), () -> (b,); the last rung suffices always."""
    return torch.cat([least[:, :-1] < threshold, threshold.new_ones(len(least), 1).bool()], 1).int().argmax(1)


def fit_entry(held: Outcomes, joins: Sequence[int]) -> Entry:
    """The threshold for every budget, and how often each rung is right, on these rows; `joins` as in `Entry`, of the table's rungs.

    Raises ControlError for numbers that are not those of a ladder, or a table nothing can be learned from. Cost: `TRIED` sums over the rows.
    """
    check_table(held)
    if len(joins) != len(held.cost) or joins[-1] or sorted(joins, reverse=True) != list(joins) or joins[0] > held.signal.shape[1]:
        found = f"{held.signal.shape[1]} cells of which {len(held.cost)} rungs join {tuple(joins)}"
        raise ControlError(found, wanted="one number for each rung, fewer for dearer ones, 0 for the last", do="Take paths that differ in entering tokens.")
    entry = Entry(len(joins), held.signal.shape[1])
    entry.cost.copy_(held.cost)
    entry.joins.copy_(torch.tensor(joins))
    entry.chances.copy_(held.quality.mean(0))
    hardest = least(held.signal, entry.joins)
    values = hardest[:, :-1].flatten().sort(descending=True).values.unique_consecutive()
    if len(values) > TRIED:
        values = values[torch.linspace(0, len(values) - 1, TRIED).round().long()]
    tried = torch.cat([values.new_tensor([math.inf]), values, values.new_tensor([-math.inf])])
    spent = torch.stack([held.cost.double()[first_that_suffices(hardest, each)].mean() for each in tried])  # ascending
    wanted = torch.linspace(float(held.cost[0]), float(held.cost[-1]), KNOTS, dtype=torch.float64)
    place = (torch.searchsorted(spent, wanted, right=True) - 1).clamp_min(0)
    place[0], place[-1] = 0, len(tried) - 1
    entry.thresholds.copy_(tried[place])
    entry.budgets.copy_(spent[place])
    entry.budgets[0], entry.budgets[-1] = held.cost[0], held.cost[-1]
    return entry.eval()
