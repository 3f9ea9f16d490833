"""Where to run a controller, and how much it is worth there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from sklearn.isotonic import IsotonicRegression
from torch import Tensor

from apportion.control.cascade import Cascade
from apportion.control.controller import Controller
from apportion.control.entry import Entry
from apportion.control.rules import envelope, taken
from apportion.errors import ControlError
from apportion.vocab import Outcomes

REPEATS = 1000
LEVELS = torch.tensor([0.025, 0.975], dtype=torch.float64)


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """A budget and what it gives on the rows it was chosen on: costs as shares of the full path, drop and 95 % interval in percentage points."""

    budget: float
    accuracy_drop: float
    mean_cost: float
    interval: tuple[float, float]


class FrontierPoint(TypedDict):
    budget: float
    cost: float
    accuracy: float
    share: list[float]  # of samples on each rung


def bootstrap_means(values: Tensor, *, repeats: int = REPEATS, seed: int = 0) -> Tensor:
    """Means of the columns over rows drawn with replacement (Efron, 1979). Shapes: (n, m) -> (repeats, m)."""
    rows = len(values)
    generator = torch.Generator().manual_seed(seed)
    drawn = (torch.randint(rows, (rows,), generator=generator) for _ in range(repeats))
    return torch.stack([torch.bincount(index, minlength=rows).double() @ values.double() for index in drawn]) / rows


Decider = Controller | Cascade | Entry
"""What can decide: once after the glance, at every checkpoint, or before anything has run."""


def decide(controller: Decider, outcomes: Outcomes, budget: float) -> Tensor:
    """The rung for each of these samples at this budget, without a cap, (n,)."""
    return controller.chosen(outcomes, budget)


def operating_point(choose: Callable[[float], Tensor], outcomes: Outcomes, tolerance_points: float, *, steps: int = 100) -> OperatingPoint:
    """The smallest budget at which accuracy on these rows falls at most `tolerance_points` percentage points below the full path's.

    `choose` gives each row's rung at a budget. More budget cannot truly cost accuracy, so drops are made monotone first (isotonic regression): of a hundred
    budgets some dip below the tolerance by luck, and the first dip would be taken. The smallest budget is one rung for all and stands for itself.
    The interval is a paired bootstrap; the point was picked on these very rows, so it describes and does not guarantee.
    Raises ControlError when no budget holds the tolerance. Cost: `steps` passes of the controller.
    """
    full = outcomes.quality[:, -1].double()
    budgets = torch.linspace(outcomes.cost[0].item(), outcomes.cost[-1].item(), steps + 1).tolist()
    choices = [choose(budget) for budget in budgets]
    lost = torch.stack([100 * (full - outcomes.quality.gather(1, choice[:, None])[:, 0].double()) for choice in choices], 1)
    drop = lost.mean(0)
    drop[1:] = torch.from_numpy(IsotonicRegression(increasing=False).fit_transform(budgets[1:], drop[1:].numpy()))
    holding = (drop <= tolerance_points).nonzero()
    if not len(holding):
        raise ControlError(
            f"a drop of at least {drop.min().item():.2f} points at every budget",
            wanted=f"at most {tolerance_points:.2f}",
            do="Raise the tolerance, or distil the network so that its cheaper paths are better.",
        )
    first = int(holding[0])
    low, high = bootstrap_means(lost[:, first : first + 1])[:, 0].quantile(LEVELS).tolist()
    return OperatingPoint(budgets[first], lost[:, first].mean().item(), taken(outcomes, choices[first]).cost, (low, high))


def frontier(controller: Decider, outcomes: Outcomes, budgets: Sequence[float]) -> list[FrontierPoint]:
    """Cost, accuracy and the share of samples on each rung, for each budget."""
    points: list[FrontierPoint] = []
    for budget in budgets:
        choice = decide(controller, outcomes, budget)
        result = taken(outcomes, choice)
        share = torch.bincount(choice, minlength=len(outcomes.cost)).double() / len(choice)
        points.append({"budget": budget, "cost": result.cost, "accuracy": result.accuracy, "share": share.tolist()})
    return points


def adaptive_gain(outcomes: Outcomes, choice: Tensor) -> tuple[float, float, float]:
    """Percentage points of accuracy above the static hull at the same mean cost, with a 95 % bootstrap interval.

    The hull is drawn again from each resample: its own noise belongs to the answer. Shapes: choice (n,) -> (gain, low, high).
    """
    spent, right = outcomes.cost[choice].double(), outcomes.quality.gather(1, choice[:, None])[:, 0].double()
    table = torch.cat([spent[:, None], right[:, None], outcomes.quality.double()], 1)

    def gain(means: Tensor) -> Tensor:
        return 100 * (means[..., 1] - envelope(outcomes.cost, means[..., 2:], means[..., 0]))

    low, high = gain(bootstrap_means(table)).quantile(LEVELS).tolist()
    return gain(table.mean(0)).item(), low, high
