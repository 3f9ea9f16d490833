"""What no controller can beat: the least cost with perfect foresight, with what the signal tells, without any signal, and in batches."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from apportion.control.labels import acceptable
from apportion.control.policy import choose
from apportion.control.rules import static_hull, taken
from apportion.errors import ControlError
from apportion.vocab import Outcomes

HALVINGS = 80  # a bracket of prices shrinks to neighbouring numbers


class Fano(NamedTuple):
    """What is unknown about the cheapest sufficient rung once the signal is seen, and how often any guess of it must fail."""

    entropy_bits: float
    error: float


class Bounds(NamedTuple):
    """A controller between its bounds; costs are means as shares of the full path."""

    cost: float
    accuracy: float
    violation: float  # share of samples that lose what the full path gets right
    oracle: float  # least cost of any controller at this violation
    information: float  # least cost of a controller that knows no more than the chances it was given, at this violation
    hull: float  # least cost of a random mixture of rungs at this accuracy; infinite where none reaches it
    fano: Fano


def acceptable_chance(right: Tensor) -> Tensor:
    """The highest chance of being acceptable that agrees with these chances of being right: 1 - max(0, P(full right) - P(rung right)).

    Exact where a rung that is right makes the full path right; elsewhere it errs towards a lower bound that still holds. (n, k) -> (n, k).
    """
    return 1 - (right[:, -1:] - right).clamp_min(0)


def oracle_bound(outcomes: Outcomes, violation: float) -> float:
    """The least mean cost of any controller, randomised ones included, that loses at most this share of what the full path gets right.

    Each sample pays for its cheapest acceptable rung, but the dearest share pays for the cheapest rung there is; the last sample of that
    share counts in part. Exact for this table. It sees labels and lucky hits: a floor, not a target. Cost: O(n k + n log n).
    """
    _check_share(violation)
    cost = outcomes.cost.double()
    need = cost[acceptable(outcomes.quality).int().argmax(1)]
    saved = (need - cost[0]).sort(descending=True).values
    waived = (violation * len(need) - torch.arange(len(need), dtype=torch.float64)).clamp(0, 1)
    return ((need.sum() - waived @ saved) / len(need)).item()


def plug_in_prices(chance: Tensor, cost: Tensor, violation: float) -> tuple[Tensor, Tensor]:
    """Neighbouring prices on compute: at the first the rule `choose(chance, price, cost)` keeps its mean risk within `violation`.

    Risk is 1 - chance, it never falls as the price rises, hence bisection. At the second price the risk is above `violation`, unless even
    the cheapest rung keeps it. Shapes: chance (n, k) that the rung is acceptable, cost (k,) ascending.
    Raises ControlError on chances that are none, rungs of one cost, or a violation that not even the safest rungs keep. Cost: 80 decisions.
    """
    _check_share(violation)
    _check_chance(chance, cost)
    chance, cost = chance.double(), cost.double()
    least = 1 - chance.amax(1).mean().item()
    if least > violation + 1e-9:
        raise ControlError(
            f"a risk of {least:.4g} at the safest rung of each sample",
            wanted=f"at most {violation:.4g}",
            do="Give the chance of being acceptable, which is 1 for the full path, or allow more.",
        )
    gaps = cost.diff()
    keeps, breaks = cost.new_zeros(()), 1 / gaps[gaps > 0].amin() + 1.0  # a chance spans at most 1, so here all take the cheapest
    for _ in range(HALVINGS):
        middle = (keeps + breaks) / 2
        within = _spent(chance, cost, middle)[0] <= violation
        keeps, breaks = torch.where(within, middle, keeps), torch.where(within, breaks, middle)
    return keeps, breaks


def information_bound(chance: Tensor, cost: Tensor, violation: float) -> float:
    """The least mean cost of a controller that knows no more than these chances: max over l >= 0 of E[min_a c_a + l (1 - p_a)] - l violation.

    The maximum is read off the primal side, which stays exact where l is large: the plug-in rule at neighbouring prices, mixed so that
    the risk is `violation`; a linear programme of this form has no gap. With chances of 0 and 1 it is the oracle bound. With the true
    chance given the signal it bounds every controller that sees the signal; with an estimate calibrated as a whole row, those that see that row.
    Shapes, errors, cost: as `plug_in_prices`.
    """
    keeps, breaks = plug_in_prices(chance, cost, violation)
    risk, least = _spent(chance.double(), cost.double(), keeps)
    more_risk, less = _spent(chance.double(), cost.double(), breaks)
    share = ((violation - risk) / (more_risk - risk).clamp_min(1e-12)).clamp(0, 1)
    return least.lerp(less, share).item()


def plug_in_regret(believed: Tensor, chance: Tensor, risk_price: float) -> float:
    """At most this much is lost in E[cost + risk_price * risk] by choosing with believed chances: 2 risk_price E[max_a |believed - chance|].

    `risk_price` is the cost that one loss is worth, 1 / price of `choose`. Shapes: (n, k) both.
    """
    return 2 * risk_price * (believed.double() - chance.double()).abs().amax(1).mean().item()


def need_posterior(chance: Tensor) -> Tensor:
    """Distribution of the cheapest acceptable rung, where a rung that is acceptable makes all dearer ones so; (n, k) -> (n, k), rows sum to 1."""
    reached = chance.double().cummax(1).values
    reached[:, -1] = 1
    return reached.diff(dim=1, prepend=reached.new_zeros(len(reached), 1))


def fano(posterior: Tensor) -> Fano:
    """How often any guess of the cheapest sufficient rung must fail, from the entropy that the signal leaves.

    The error e is the least with h(e) + e log2(k - 1) >= H(rung | signal) (Fano, 1961; Cover and Thomas, 2006, theorem 2.10.1), at least
    (H - 1) / log2 k. Where the posterior is true, 1 - E[max posterior] is the error of the best guess itself. Shapes: (n, k), rows sum to 1.
    """
    _check_posterior(posterior)
    rungs = posterior.shape[1]
    entropy = torch.special.entr(posterior.double()).sum(1).mean().item() / math.log(2)
    low, high = 0.0, 1 - 1 / rungs
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        known = _bits(middle) + middle * math.log2(max(rungs - 1, 1))
        low, high = (middle, high) if known < entropy else (low, middle)
    return Fano(entropy, low)


def static_cost(outcomes: Outcomes, accuracy: float) -> float:
    """The least mean cost at which a random mixture of rungs has this accuracy; infinite where none has. The hull, read the other way."""
    hull = static_hull(outcomes)
    reached = hull.accuracy >= accuracy - 1e-12
    if not bool(reached.any()):
        return math.inf
    after = int(reached.int().argmax())
    if after == 0:
        return hull.cost[0].item()
    share = (accuracy - hull.accuracy[after - 1]) / (hull.accuracy[after] - hull.accuracy[after - 1])
    return hull.cost[after - 1].lerp(hull.cost[after], share.clamp(0, 1)).item()


def batching_law(share_full: float, batch: int) -> float:
    """The chance that no sample of a batch needs the full path: (1 - share_full) ** batch."""
    _check_share(share_full)
    return (1 - share_full) ** batch


def padded_cost(cost: Tensor, choice: Tensor, batch: int) -> float:
    """Expected cost for each sample if every batch of independent samples runs at its dearest member: sum_k c_k (F_k^B - F_(k-1)^B).

    F is the share of samples at a rung up to k. At batch 1, or routed by rung, it is the plain mean. Shapes: cost (k,), choice (n,).
    """
    up_to = torch.bincount(choice, minlength=len(cost)).double().cumsum(0) / len(choice)
    return (up_to.pow(batch).diff(prepend=up_to.new_zeros(1)) @ cost.double()).item()


def bounds(outcomes: Outcomes, chance: Tensor, choice: Tensor) -> Bounds:
    """Where a controller that made these choices stands. Shapes: chance (n, k) that each rung is acceptable given the signal, choice (n,).

    Raises ControlError as `information_bound`. Cost: 80 decisions for each sample.
    """
    cost, accuracy, _ = taken(outcomes, choice)
    violation = 1 - acceptable(outcomes.quality).gather(1, choice[:, None]).double().mean().item()
    return Bounds(
        cost,
        accuracy,
        violation,
        oracle_bound(outcomes, violation),
        information_bound(chance, outcomes.cost, violation),
        static_cost(outcomes, accuracy),
        fano(need_posterior(chance)),
    )


def _spent(chance: Tensor, cost: Tensor, price: Tensor) -> tuple[Tensor, Tensor]:
    """Mean risk and mean cost of the plug-in rule."""
    choice = choose(chance, price, cost)
    return 1 - chance.gather(1, choice[:, None]).mean(), cost[choice].mean()


def _bits(share: float) -> float:
    """Entropy of a coin."""
    return -sum(part * math.log2(part) for part in (share, 1 - share) if part > 0)


def _check_share(share: float) -> None:
    if not 0 <= share <= 1:
        raise ControlError(f"a share of {share}", wanted="0 to 1", do="Give percentage points divided by 100.")


def _check_chance(chance: Tensor, cost: Tensor) -> None:
    if chance.ndim != 2 or chance.shape[1] != len(cost) or not len(chance):
        raise ControlError(
            f"chances of shape {tuple(chance.shape)} for {len(cost)} rungs",
            wanted="one row for each sample, one column for each rung",
            do="Predict all rungs of the ladder for the same samples.",
        )
    wrong = (~((chance >= 0) & (chance <= 1))).any(1).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise ControlError(f"chances {[round(p, 4) for p in chance[row].tolist()]} in row {row}", wanted="0 to 1", do="Give probabilities, not logits.")
    if not cost[0] < cost[-1]:
        raise ControlError(f"rungs that all cost {cost[0].item():.4g}", wanted="a rung cheaper than the last", do="Add a cheaper path.")


def _check_posterior(posterior: Tensor) -> None:
    wrong = (~((posterior.double().sum(1) - 1).abs() < 1e-5)).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise ControlError(f"a sum of {posterior[row].sum().item():.4g} in row {row}", wanted="1", do="Give a distribution over rungs for each sample.")
