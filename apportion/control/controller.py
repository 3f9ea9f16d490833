"""Complexity, policy and prices as one module: signal, budget and cap in, one rung for each sample out."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from apportion.control.complexity import Complexity, calibrate, fit_complexity
from apportion.control.labels import check_table
from apportion.control.policy import Policy, choose, fit_policy, prices
from apportion.control.rules import within_reach
from apportion.errors import ControlError
from apportion.vocab import Outcomes

KNOTS = 129


class Controller(nn.Module):
    """Chooses a rung of the ladder for each sample; plain tensor operations, so that it compiles and exports as one graph.

    The budget is a target for the mean cost, met exactly on the calibration rows; it is spent even where less would do. The cap is a
    ceiling that no sample passes. Both are shares of the full path. Shapes: signal (b, f), budget (), cap () -> (b,) int64.
    A sample's choice depends on that sample alone.
    """

    cost: Tensor
    budgets: Tensor
    prices: Tensor

    def __init__(self, complexity: Complexity, policy: Policy, *, knots: int = KNOTS) -> None:
        super().__init__()
        self.complexity = complexity
        self.policy = policy
        self.register_buffer("cost", torch.zeros(policy.outer.out_features))
        self.register_buffer("budgets", torch.zeros(knots))
        self.register_buffer("prices", torch.zeros(knots))

    @classmethod
    def from_config(cls, config: Mapping[str, int]) -> Controller:
        """An empty controller of these sizes, to load a state into."""
        sizes = {name: config[name] for name in ("features", "rungs", "hidden")}
        return cls(Complexity(**sizes), Policy(**sizes), knots=config["knots"]).requires_grad_(False).eval()

    def config(self) -> dict[str, int]:
        """The sizes that `from_config` wants."""
        inner = self.complexity.inner
        return {"features": inner.in_features, "rungs": len(self.cost), "hidden": inner.out_features, "knots": len(self.budgets)}

    @property
    def macs(self) -> int:
        """Multiply-adds per sample, closed form."""
        return self.complexity.macs + self.policy.macs

    def setting(self, *, budget: float = math.inf, cap: float = math.inf) -> tuple[Tensor, Tensor]:
        """Budget and cap as `forward` wants them. Raises ControlError where not even the cheapest rung fits."""
        return within_reach(self.cost, budget, cap)

    def chosen(self, outcomes: Outcomes, budget: float, cap: float = math.inf) -> Tensor:
        """The rung for each row of a table, (n,) int64."""
        return self(outcomes.signal, *self.setting(budget=budget, cap=cap))

    def chance(self, outcomes: Outcomes) -> Tensor:
        """How likely each rung is right, by what the glance sees, (n, k)."""
        return self.complexity(outcomes.signal)

    def worth(self, signal: Tensor, budget: Tensor) -> Tensor:
        """What each rung is worth to each sample before its price, (b, k); for budgets (g,) it is (b, g, k)."""
        return self.policy(self.complexity.standardise(signal), self.complexity(signal), budget)

    def price(self, budget: Tensor) -> Tensor:
        """Linear between the knots, flat outside: the sum of the part of each step that lies below the budget."""
        part = ((budget[..., None] - self.budgets[:-1]) / self.budgets.diff()).clamp(0, 1)
        return self.prices[0] + (part * self.prices.diff()).sum(-1)

    def forward(self, signal: Tensor, budget: Tensor, cap: Tensor) -> Tensor:
        worth = self.worth(signal, budget).masked_fill(self.cost > cap, -torch.inf)
        return choose(worth, self.price(budget), self.cost)

    def set_prices(self, outcomes: Outcomes) -> None:
        """Fill the table so that the mean cost on these rows is the budget at every knot; at the ends one rung is certain."""
        check_table(outcomes)
        cheapest, dearest = self.cost[0].item(), self.cost[-1].item()
        margin = 1e-3 * (dearest - cheapest)
        gaps = self.cost.diff()
        certain = 4.0 / gaps[gaps > 0].amin()  # worth spans less than 3
        inside = torch.linspace(cheapest + margin, dearest - margin, len(self.budgets) - 2)
        self.budgets.copy_(torch.cat([self.cost[:1], inside, self.cost[-1:]]))
        found = torch.cat([prices(self.worth(outcomes.signal, part), self.cost, part) for part in inside.split(8)])
        self.prices.copy_(torch.cat([certain[None], found, -certain[None]]))


def fit_controller(outcomes: Outcomes, *, fit_rows: Tensor, calibrate_rows: Tensor, seed: int) -> Controller:
    """Learn to decide on `fit_rows`, make probabilities and budgets true on `calibrate_rows`, which nothing was fitted on.

    Raises ControlError on rows used twice or a table nothing can be learned from. Cost: under 15 s for 5000 rows, 200 features, 6 rungs.
    """
    shared = torch.isin(fit_rows, calibrate_rows)
    if bool(shared.any()):
        raise ControlError(f"row {int(fit_rows[shared][0])} in both parts", wanted="disjoint rows", do="Split the samples once.")
    fit, held = outcomes.rows(fit_rows), outcomes.rows(calibrate_rows)
    complexity = fit_complexity(fit, seed=seed)
    calibrate(complexity, held)
    controller = Controller(complexity, fit_policy(fit, complexity, seed=seed))
    controller.cost.copy_(outcomes.cost)
    controller.set_prices(held)
    return controller.requires_grad_(False).eval()
