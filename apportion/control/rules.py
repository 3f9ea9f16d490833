"""What a controller has to beat, and what it cannot beat: rules without learning, on the same tables and in the same units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from apportion.control.labels import stable_correct
from apportion.errors import ControlError
from apportion.vocab import Outcomes


class Result(NamedTuple):
    """Mean cost as a share of the full path, accuracy from 0 to 1, and the rung of each sample where the rule picks one."""

    cost: float
    accuracy: float
    choice: Tensor | None  # (n,) int64


def taken(outcomes: Outcomes, choice: Tensor) -> Result:
    """Cost and accuracy of running these rungs."""
    accuracy = outcomes.quality.gather(1, choice[:, None]).double().mean()
    return Result(outcomes.cost[choice].double().mean().item(), accuracy.item(), choice)


def envelope(cost: Tensor, accuracy: Tensor, at: Tensor) -> Tensor:
    """The best accuracy that randomly mixing rungs reaches at a mean cost of at most `at`.

    The upper concave envelope at a point is the highest chord over it, so all pairs are tried: k is small, and any number of tables go
    at once. Shapes: cost (k,), accuracy (..., k), at (...) -> (...); -inf below the cheapest. Cost: O(k^2) for each point.
    """
    low, high = torch.triu_indices(len(cost), len(cost))
    cost, accuracy = cost.double(), accuracy.double()
    share = ((at.double()[..., None] - cost[low]) / (cost[high] - cost[low]).clamp_min(1e-12)).clamp(0, 1)
    chord = accuracy[..., low].lerp(accuracy[..., high], share)
    return chord.masked_fill(at.double()[..., None] < cost[low] - 1e-9, -torch.inf).amax(-1)


@dataclass(frozen=True, slots=True)
class Hull:
    """Vertices of the envelope: what needs no controller at all."""

    cost: Tensor  # (v,)
    accuracy: Tensor  # (v,)

    def interpolate(self, cost: float) -> float:
        """Accuracy at this mean cost. Raises ControlError below the cheapest rung."""
        reached = envelope(self.cost, self.accuracy, torch.tensor(cost, dtype=torch.float64)).item()
        if reached == -torch.inf:
            raise out_of_reach(cost, self.cost)
        return reached


def within_reach(cost: Tensor, budget: float, cap: float) -> tuple[Tensor, Tensor]:
    """Budget and cap as tensors beside these costs, the budget no more than the full path's. Raises ControlError where not even the cheapest rung fits."""
    for amount in (budget, cap):
        if not amount >= cost[0].item():
            raise out_of_reach(amount, cost)
    return cost.new_tensor(budget).clamp_max(cost[-1]), cost.new_tensor(cap)


def out_of_reach(budget: float, cost: Tensor) -> ControlError:
    """The error for a budget that not even the cheapest rung meets."""
    return ControlError(
        f"a budget of {budget:.4g}x", wanted=f"at least {cost[0].item():.4g}x, the cheapest path", do="Raise the budget, or add a cheaper path."
    )


def always_full(outcomes: Outcomes) -> Result:
    """The model as it was: the last rung for everything."""
    return taken(outcomes, torch.full((len(outcomes.signal),), len(outcomes.cost) - 1))


def best_static(outcomes: Outcomes, budget: float) -> Result:
    """The most accurate single rung within the budget. Raises ControlError when there is none."""
    within = outcomes.cost <= budget
    if not bool(within.any()):
        raise out_of_reach(budget, outcomes.cost)
    rung = outcomes.quality.double().mean(0).masked_fill(~within, -1).argmax()
    return taken(outcomes, rung.expand(len(outcomes.signal)))


def static_hull(outcomes: Outcomes) -> Hull:
    """The rungs that no mixture of others beats."""
    cost, accuracy = outcomes.cost.double(), outcomes.quality.double().mean(0)
    on_top = accuracy >= envelope(cost, accuracy.expand(len(cost), -1), cost) - 1e-12
    return Hull(cost[on_top], accuracy[on_top])


def random_at(outcomes: Outcomes, budget: float) -> Result:
    """Every rung equally often, mixed with the cheapest or the full one until the mean cost is the budget; the expectation, exactly.

    The strongest random rule is `static_hull(outcomes).interpolate(budget)`. Raises ControlError below the cheapest.
    """
    cost, accuracy = outcomes.cost.double(), outcomes.quality.double().mean(0)
    if budget < cost[0]:
        raise out_of_reach(budget, cost)
    budget = min(budget, cost[-1].item())
    end = 0 if budget < cost.mean() else -1
    share = ((budget - cost[end]) / (cost.mean() - cost[end])).item()
    return Result(budget, (share * accuracy.mean() + (1 - share) * accuracy[end]).item(), None)


def confidence_cascade(outcomes: Outcomes, thresholds: Tensor, reuse: Tensor) -> Result:
    """Run the rungs in turn until the margin reaches the rung's threshold; what was run and cannot be reused is paid for.

    Shapes: thresholds (k - 1,); reuse (k,), the cost already spent that each rung takes over (the glance's; its first entry says nothing).
    """
    sure = torch.cat([outcomes.margin[:, :-1] >= thresholds, torch.ones(len(outcomes.signal), 1, dtype=torch.bool)], 1)
    choice = sure.int().argmax(1)
    paid = outcomes.cost.double() - reuse.double()
    paid[0] = outcomes.cost[0]
    return Result(paid.cumsum(0)[choice].mean().item(), taken(outcomes, choice).accuracy, choice)


def oracle(outcomes: Outcomes) -> Result:
    """The stable-correct rung of each sample: what a controller with perfect foresight would spend to answer as well as the full path."""
    return taken(outcomes, stable_correct(outcomes.quality)[0])


def label_peeking_ceiling(outcomes: Outcomes) -> Result:
    """The cheapest rung that happens to be right, lucky hits included. Not a policy: it reads the label. Never report it as one."""
    return taken(outcomes, outcomes.quality.argmax(1))
