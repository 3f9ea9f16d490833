"""Checkpoints: run the rungs in turn and leave at the first that is sure enough, with thresholds for every budget at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

import torch
from sklearn.isotonic import IsotonicRegression
from torch import Tensor, nn

from apportion.control.labels import check_table
from apportion.control.rules import within_reach
from apportion.errors import ControlError
from apportion.vocab import Outcomes

KNOTS = 257  # evenly spaced in ratio: a budget lies at most this ratio above one whose thresholds are known
POINTS = 33  # of a calibration curve
PRICES = torch.logspace(-3, 2, 61, dtype=torch.float64)  # points of accuracy (0..1) that the full path's cost is worth
SWEEPS = 3  # over all checkpoints at each price: the thresholds before one decide who comes to it
STEPS = 512  # from one set of thresholds to the next, at most this part of the rows more leaves at a checkpoint
NEVER, ALWAYS = 2.0, -1.0  # margins lie in 0..1


class Cascade(nn.Module):
    """Whether a sample leaves at a checkpoint: where the margin between its two likeliest answers reaches the threshold there.

    Source: Teerapittayanon et al. 2016, "BranchyNet", arXiv 1709.01686, section III (leave when sure); here the thresholds of all checkpoints are placed
    together, for a price on compute, by backward induction. The rungs must each begin with the one before. The budget is a target for the mean cost,
    never passed on the calibration rows and met within 2 % there, where rows are many and their margins differ; the cap is a ceiling that no sample
    passes. Both are shares of the full path. A sample's choice depends on that sample alone. Shapes: k rungs, hence k - 1 checkpoints.
    When not to use it: where rungs do not build on each other, or where even the cheapest answer has to be chosen before anything has run.
    """

    cost: Tensor
    budgets: Tensor
    thresholds: Tensor
    margins: Tensor
    chances: Tensor

    def __init__(self, rungs: int, *, knots: int = KNOTS) -> None:
        super().__init__()
        self.register_buffer("cost", torch.zeros(rungs))
        self.register_buffer("budgets", torch.zeros(knots))
        self.register_buffer("thresholds", torch.full((knots, rungs - 1), NEVER))
        self.register_buffer("margins", torch.zeros(rungs, POINTS))
        self.register_buffer("chances", torch.zeros(rungs, POINTS))

    @classmethod
    def from_config(cls, config: Mapping[str, int]) -> Cascade:
        """An empty one of these sizes, to load a state into."""
        return cls(config["rungs"], knots=config["knots"]).eval()

    def config(self) -> dict[str, int]:
        """The sizes that `from_config` wants."""
        return {"rungs": len(self.cost), "knots": len(self.budgets)}

    @property
    def macs(self) -> int:
        """Multiply-adds per sample beside those of the answers at the checkpoints: comparisons alone."""
        return 0

    def setting(self, *, budget: float = math.inf, cap: float = math.inf) -> tuple[Tensor, Tensor]:
        """Budget and cap as `limits` wants them. Raises ControlError where not even the cheapest rung fits."""
        return within_reach(self.cost, budget, cap)

    def limits(self, budget: Tensor, cap: Tensor) -> Tensor:
        """The margin from which on a sample leaves at each checkpoint, (k - 1,)."""
        knot = (self.budgets <= budget).sum().clamp_min(1) - 1
        return self.thresholds[knot].masked_fill(self.cost[1:] > cap, ALWAYS)

    def thresholds_at(self, budget: float, cap: float) -> list[float]:
        """The same as numbers, for who runs one rung after the other; budget and cap are taken as they are."""
        return self.limits(self.cost.new_tensor(budget), self.cost.new_tensor(cap)).tolist()

    def chosen(self, outcomes: Outcomes, budget: float, cap: float = math.inf) -> Tensor:
        """The rung that each row of a table leaves at, (n,) int64."""
        return leave(outcomes.margin, self.limits(*self.setting(budget=budget, cap=cap)))

    def chance(self, outcomes: Outcomes) -> Tensor:
        """How likely each rung is right by its own margin, calibrated, (n, k)."""
        return torch.stack([_between(column, *curve) for column, *curve in zip(outcomes.margin.unbind(1), self.margins, self.chances, strict=True)], 1)


def leave(margin: Tensor, thresholds: Tensor) -> Tensor:
    """The first rung whose margin reaches its threshold, the last where none does. Shapes: margin (n, k), thresholds (k - 1,) -> (n,) int64."""
    sure = margin[:, :-1] >= thresholds
    return torch.cat([sure, sure.new_ones(len(margin), 1)], 1).int().argmax(1)


def fit_cascade(outcomes: Outcomes, *, fit_rows: Tensor, calibrate_rows: Tensor) -> Cascade:
    """Thresholds for every budget from `fit_rows`; which budget each holds, and how likely each margin is right, from `calibrate_rows`.

    At a price, a sample is worth its answer less what it spent. The threshold of a checkpoint is the one that makes the rows which come to it worth most,
    what the later ones will do being known; from last to first, repeated. With the price samples leave earlier everywhere, so that one path of
    thresholds leads from "nobody leaves" to "everybody leaves at once". Raises ControlError on rows used twice or a table nothing can be learned from.
    Cost: sorting, some seconds for 10,000 rows and 6 rungs.
    """
    if bool(torch.isin(fit_rows, calibrate_rows).any()):
        raise ControlError("a row in both parts", wanted="disjoint rows", do="Split the samples once.")
    check_table(outcomes)
    fit, held = outcomes.rows(fit_rows), outcomes.rows(calibrate_rows)
    cascade = Cascade(len(outcomes.cost))
    cascade.cost.copy_(outcomes.cost)
    thresholds = _dense(fit)
    spent = torch.stack([fit_cost(held, row) for row in thresholds])
    # A path through thresholds passes mean costs that differ a little from row to row: the dearest so far holds for all before it.
    spent = spent.cummax(0).values
    wanted = outcomes.cost[0].double() * (outcomes.cost[-1] / outcomes.cost[0]).double() ** torch.linspace(0, 1, KNOTS, dtype=torch.float64)
    place = (torch.searchsorted(spent, wanted, right=True) - 1).clamp_min(0)
    place[0], place[-1] = 0, len(spent) - 1
    cascade.thresholds.copy_(thresholds[place])
    cascade.budgets.copy_(spent[place])
    cascade.budgets[0], cascade.budgets[-1] = outcomes.cost[0], outcomes.cost[-1]
    for rung in range(len(outcomes.cost)):
        cascade.margins[rung], cascade.chances[rung] = _calibrated(held.margin[:, rung], held.quality[:, rung])
    return cascade.eval()


def fit_cost(outcomes: Outcomes, thresholds: Tensor) -> Tensor:
    """Mean cost of these rows with these thresholds, ()."""
    return outcomes.cost.double()[leave(outcomes.margin, thresholds)].mean()


def place_thresholds(outcomes: Outcomes, price: float, start: Tensor) -> Tensor:
    """Thresholds (k - 1,) that make these rows worth most at this price, from `start` on; no threshold moved alone makes them worth more."""
    worth = outcomes.quality.double() - price * outcomes.cost.double()
    thresholds, margin = start.clone(), outcomes.margin
    for _ in range(SWEEPS):
        before = thresholds.clone()
        for stop in reversed(range(len(thresholds))):
            comes = (margin[:, :stop] < thresholds[:stop]).all(1)
            if not bool(comes.any()):
                continue
            rows = margin[comes]
            later = leave(rows[:, stop + 1 :], thresholds[stop + 1 :]) + stop + 1
            gain = worth[comes, stop] - worth[comes].gather(1, later[:, None])[:, 0]
            thresholds[stop] = _best(rows[:, stop], gain)
        if torch.equal(before, thresholds):
            break
    return thresholds


def _best(margin: Tensor, gain: Tensor) -> Tensor:
    """The threshold from which on leaving gains most, half-way between two margins. Shapes: (m,), (m,) -> ()."""
    order = margin.argsort(descending=True)
    ordered, total = margin[order], gain[order].cumsum(0)
    total[:-1][ordered[:-1] == ordered[1:]] = -math.inf  # equal margins leave together
    most = int(total.argmax())
    if total[most] <= 0:
        return margin.new_tensor(NEVER)
    return (ordered[most] + ordered[most + 1]) / 2 if most + 1 < len(ordered) else margin.new_tensor(ALWAYS)


def _dense(outcomes: Outcomes) -> Tensor:
    """Thresholds from "all leave at once" to "nobody leaves", (m, k - 1): those of every price, and some between each two.

    Between two prices the share of all rows that is sure enough moves evenly; it never falls as the price rises, which noise would otherwise let it do.
    """
    margin = outcomes.margin
    thresholds, shares = torch.full((margin.shape[1] - 1,), NEVER), []
    for price in PRICES.tolist():
        thresholds = place_thresholds(outcomes, price, thresholds)
        shares.append((margin[:, :-1] >= thresholds).double().mean(0))
    ends = torch.zeros_like(shares[0]), torch.cat([torch.ones_like(shares[0][:1]), shares[-1][1:]])
    path = torch.stack([ends[0], *shares, ends[1]]).cummax(0).values
    # As many steps as the way is long: between two prices thresholds may jump, and with them what is spent.
    parts = (path.diff(dim=0).amax(1) * min(STEPS, len(margin))).ceil().long().tolist()
    steps = [torch.arange(part, dtype=torch.float64)[:, None] / part for part in parts]
    between = torch.cat([torch.lerp(a, b, step) for (a, b), step in zip(pairwise(path), steps, strict=True)] + [path[-1:]]).flip(0)
    ordered = margin[:, :-1].sort(0, descending=True).values
    least = ordered.gather(0, (between * len(margin)).round().long().sub(1).clamp_min(0))
    return least.masked_fill(between * len(margin) < 0.5, NEVER).masked_fill(between == 1, ALWAYS)


def _calibrated(margin: Tensor, quality: Tensor) -> tuple[Tensor, Tensor]:
    """A curve (points,), (points,) from margin to the share that is right there: isotonic regression at even ranks."""
    points = torch.quantile(margin.double(), torch.linspace(0, 1, POINTS, dtype=torch.float64))
    found = IsotonicRegression(out_of_bounds="clip").fit(margin.double().numpy(), quality.double().numpy()).predict(points.numpy())
    return points.float(), torch.from_numpy(found).float()


def _between(values: Tensor, points: Tensor, heights: Tensor) -> Tensor:
    """The curve at these values: straight between its points, flat outside."""
    right = torch.searchsorted(points.contiguous(), values.contiguous()).clamp(1, len(points) - 1)
    low, high = points[right - 1], points[right]
    share = ((values - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    return heights[right - 1].lerp(heights[right], share)
