"""A drop in accuracy that is bounded rather than hoped for: risk control of the operating point, on rows that nothing else has seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import bdtr, bdtrc, betaincinv, gammaln
from torch import Tensor

from apportion.errors import ControlError, PlanError
from apportion.vocab import Outcomes

SLACK = 1e-4  # part of every p-value: the chance that the share of won rows lies outside the range that is searched
CELLS = 200  # of that range; more make the p-value slightly smaller
HALVINGS = 12
LEVEL = 0.1  # for which the stakes of a bet are set; other levels are as valid, only less likely to be reached

Array = NDArray[np.float64]


class Pairs(NamedTuple):
    """Rows that only the reference gets right, rows that only the chosen paths get right, and all rows.

    `winnable` is False where no row can be won whatever the sample, as when the loss is disagreement with the full path.
    """

    lost: int
    won: int
    rows: int
    winnable: bool = True

    @property
    def drop_points(self) -> float:
        """Percentage points of accuracy lost on these rows."""
        return 100 * (self.lost - self.won) / self.rows

    @property
    def discordant_points(self) -> float:
        """Percentage of these rows on which exactly one of the two is right."""
        return 100 * (self.lost + self.won) / self.rows


@dataclass(frozen=True, slots=True)
class Losses:
    """What each row loses against the reference where answers are more or less good, (n,), -1 to 1; wins are negative."""

    each: Array

    @property
    def rows(self) -> int:
        return len(self.each)

    @property
    def drop_points(self) -> float:
        """Hundredths of the measure lost on these rows."""
        return 100 * float(self.each.mean())

    @property
    def discordant_points(self) -> float:
        """Mean square in percent: where answers are right or wrong, the share of rows on which exactly one is right."""
        return 100 * float((self.each**2).mean())


@dataclass(frozen=True, slots=True)
class Certificate:
    """The cheapest budget certified: there the drop on inputs like these rows is at most `tolerance_points`, with this confidence.

    `upper_points` is the bound on the drop at this budget had no other been tried: it describes, `tolerance_points` is what is promised.
    """

    budget: float
    mean_cost: float  # share of the full path, on these rows
    tolerance_points: float
    confidence: float
    p_value: float
    rows: int
    drop_points: float  # measured
    discordant_points: float  # measured
    upper_points: float


def score(lost: ArrayLike, won: ArrayLike, *, rows: int, tolerance: float) -> Array:
    """How many standard deviations the drop lies above `tolerance` (a share), the variance being the likeliest at exactly that drop.

    Tango, 1998 (Statistics in Medicine 17): the restricted likelihood has its maximum at the positive root of a quadratic. Element by element.
    """
    lost, won = np.asarray(lost, np.float64), np.asarray(won, np.float64)
    middle = (lost + won) * (1 - tolerance) - 2 * tolerance * (rows - lost)
    share = (middle + np.sqrt(middle**2 + 8 * rows * won * tolerance * (1 - tolerance))) / (4 * rows)
    return (lost - won - rows * tolerance) / np.sqrt(rows * (2 * share + tolerance - tolerance**2))


def most_lost(won: Array, *, rows: int, tolerance: float, at: float) -> Array:
    """For each count of won rows the largest count of lost rows whose score is at most `at`, -1 where there is none."""
    low, high = np.full_like(won, -1), rows - won
    while (low < high).any():
        middle = np.ceil((low + high) / 2)
        fits = score(middle.clip(0), won, rows=rows, tolerance=tolerance) <= at + 1e-9  # rounding must not leave out what was observed
        low, high = np.where(fits, middle, low), np.where(fits, high, middle - 1)
    return low


def p_value(found: Pairs | Losses, tolerance_points: float) -> float:
    """How likely rows at least as favourable as these would be, if the drop were above `tolerance_points`; valid for every number of rows."""
    return _exact(found, tolerance_points) if isinstance(found, Pairs) else _betting(found.each, tolerance_points / 100)


def _betting(losses: Array, tolerance: float) -> float:
    """1 / the most that a gambler who stakes on small losses ever owns: had losses a mean above `tolerance`, he would not grow rich.

    Waudby-Smith and Ramdas, 2024 (JRSS B 86, arXiv 2010.09686), section 4: stakes are set before each row from the spread of those before it; by Ville's
    inequality valid for every number of rows and every distribution. Rows are shuffled by a fixed seed first, since files are often sorted.
    """
    won, fair = (1 - losses[np.random.default_rng(0).permutation(len(losses))]) / 2, (1 - tolerance) / 2
    count = np.arange(1, len(won) + 1)
    mean = (0.5 + won.cumsum()) / (count + 1)
    spread = np.concatenate(([0.25], (0.25 + ((won - mean) ** 2).cumsum()) / (count + 1)))[:-1]
    stake = np.sqrt(2 * math.log(1 / LEVEL) / (len(won) * spread)).clip(max=0.75 / fair)
    return float(min(1.0, np.exp(-np.log1p(stake * (won - fair)).cumsum().max())))


def _exact(pairs: Pairs, tolerance_points: float) -> float:
    """How likely rows at least as favourable as these would be, if the drop were above `tolerance_points`.

    Disagreement: the exact binomial tail. Accuracy: the exact unconditional test of non-inferiority of paired shares, ordered by the score
    (Sidik, 2003, Statistics in Medicine 22), with the range of the unknown share of won rows cut to a confidence interval (Berger and Boos, 1994,
    JASA 89). Over a cell of that range the chance is bounded by its value with the fewest lost and the most won rows, since favourable outcomes
    stay favourable when a row is lost less or won more: an upper bound, not a value on a grid. Cost: O(CELLS sqrt(rows)), 2 to 80 ms.
    """
    (lost, won, rows, winnable), tolerance = pairs, tolerance_points / 100
    if lost - won >= rows * tolerance:
        return 1.0
    if not winnable:
        return float(bdtr(lost, rows, tolerance))
    least = betaincinv(won, rows - won + 1, SLACK / 2) if won else 0.0
    most = min(betaincinv(won + 1, rows - won, 1 - SLACK / 2) if won < rows else 1.0, (1 - tolerance) / 2)
    if least >= most:
        return SLACK
    edges = np.linspace(math.sqrt(least), math.sqrt(most), CELLS + 1) ** 2  # equal steps in standard deviations
    loses, wins = edges[:-1, None] + tolerance, edges[1:, None]
    reach = 6 * math.sqrt(rows * most) + 10
    first, last = max(0, math.floor(rows * least - reach)), min(rows, math.ceil(rows * most + reach))
    counts = np.arange(first, last + 1, dtype=np.float64)
    limit = most_lost(counts, rows=rows, tolerance=tolerance, at=float(score(lost, won, rows=rows, tolerance=tolerance)))
    ways = gammaln(rows + 1) - gammaln(counts + 1) - gammaln(rows - counts + 1)
    chance = np.exp(ways + counts * np.log(wins) + (rows - counts) * np.log1p(-wins))
    # What is too rare to be worth computing is counted as favourable, in the table and outside it.
    within, worth = np.ones_like(chance), chance > 1e-12
    bdtr(limit.clip(0), (rows - counts).astype(int), (loses / (1 - wins)).clip(max=1), out=within, where=worth)
    within[worth & (limit < 0)] = 0.0
    outside = bdtrc(last, rows, wins) + (bdtr(first - 1, rows, wins) if first else 0.0)
    return min(1.0, SLACK + float(((chance * within).sum(1) + outside[:, 0]).max()))


def certifiable_tolerance(pairs: Pairs | Losses, *, delta: float) -> float:
    """The tightest tolerance in percentage points that these rows certify at 1 - `delta`, the upper bound of the drop; never below 0.

    A tolerance picked by looking at this figure needs fresh rows to be promised. Cost: `HALVINGS` p-values.
    """
    low, high = max(0.0, pairs.drop_points), 100.0
    for _ in range(HALVINGS):
        middle = math.sqrt(max(low, 1e-4) * high)  # equal care for small and for large tolerances
        low, high = (low, middle) if p_value(pairs, middle) <= delta else (middle, high)
    return high


def rows_needed(tolerance_points: float, *, drop_points: float, discordant_points: float, delta: float, power: float = 0.8) -> int:
    """About how many rows certify this tolerance with chance `power`, where the drop and the share of discordant rows are as stated.

    Nam, 1997 (Biometrics 53): variances at the tolerance and at the true drop. Raises ControlError for a drop that is not below the tolerance.
    """
    tolerance, drop, discordant = tolerance_points / 100, drop_points / 100, discordant_points / 100
    if drop >= tolerance:
        raise ControlError(f"a drop of {drop_points:.2f} points", wanted=f"below {tolerance_points:.2f}", do="No number of rows certifies it: spend more.")
    gap = tolerance - drop
    at_tolerance = gap / -float(score((discordant + drop) / 2, (discordant - drop) / 2, rows=1, tolerance=tolerance))
    level, reach = NormalDist().inv_cdf(1 - delta), NormalDist().inv_cdf(power)
    without_losses = math.log(delta) / math.log1p(-tolerance)
    return math.ceil(max(without_losses, ((level * at_tolerance + reach * math.sqrt(max(0.0, discordant - drop**2))) / gap) ** 2))


def compared(outcomes: Outcomes, choice: Tensor, *, reference: Tensor | None = None, agreement: bool = False) -> Pairs | Losses:
    """What these rungs lose against `reference` (n,), else the full path, in counts where all is right or wrong; or how often they disagree with it."""
    rows = len(outcomes.quality)
    at = choice[:, None]
    if agreement:
        return Pairs(int((~outcomes.agree.gather(1, at)).sum()), 0, rows, winnable=False)
    theirs, ours = (outcomes.quality[:, -1] if reference is None else reference).double(), outcomes.quality.gather(1, at)[:, 0].double()
    if bool((((theirs == 0) | (theirs == 1)) & ((ours == 0) | (ours == 1))).all()):
        return Pairs(int((theirs > ours).sum()), int((ours > theirs).sum()), rows)
    return Losses((theirs - ours).numpy())


def certify(
    choose: Callable[[float], Tensor],
    outcomes: Outcomes,
    *,
    tolerance_points: float,
    budgets: Sequence[float],
    delta: float = 0.1,
    reference: Tensor | None = None,
    agreement: bool = False,
) -> Certificate:
    """The cheapest budget at which accuracy falls at most `tolerance_points` percentage points, with confidence 1 - `delta`.

    Learn then Test (Angelopoulos, Bates, Candès, Jordan and Lei, 2021, arXiv 2110.01052), as CALM does for early exit (Schuster et al., 2022,
    arXiv 2207.07061): budgets are tested from the dearest down, each at level `delta`, and the first that fails ends it, so that a false
    certificate has at most the chance `delta`. `choose(budget)` gives the rung of each row, (n,). What falls is accuracy against the full path,
    against `reference` (n,) where another network's answers are the measure, or with `agreement` the share that answers as the full path does.

    The rows must be a random sample of what will be served, must have had no part in anything that was learned or picked, and count once:
    trying again on them until it passes voids the promise. `budgets` and tolerance are fixed before the rows are seen.
    Raises PlanError on options that make no sense; ControlError where nothing cheaper than the full path can be certified, with the tolerance
    that could be and about how many rows it takes. Cost: a call of `choose` and a p-value for each budget.
    """
    check_options(tolerance_points, budgets, delta)
    check_reference(outcomes, reference, agreement)
    passed: tuple[float, Pairs | Losses, float, float] | None = None
    for budget in sorted(set(budgets), reverse=True):
        choice = choose(budget)
        check_choice(outcomes, choice)
        pairs, cost = compared(outcomes, choice, reference=reference, agreement=agreement), outcomes.cost[choice].double().mean().item()
        p = p_value(pairs, tolerance_points)
        if p > delta:
            if passed is None:
                raise too_few(pairs, tolerance_points, budget, delta)
            break
        if cost < outcomes.cost[-1].item():
            passed = budget, pairs, cost, p
    if passed is None:
        raise ControlError(f"budgets down to {min(budgets):.4g}x that all buy the full path", wanted="a cheaper one", do="Offer smaller budgets.")
    budget, pairs, cost, p = passed
    upper = min(tolerance_points, certifiable_tolerance(pairs, delta=delta))
    return Certificate(budget, cost, tolerance_points, 1 - delta, p, pairs.rows, pairs.drop_points, pairs.discordant_points, upper)


def too_few(pairs: Pairs | Losses, tolerance_points: float, budget: float, delta: float) -> ControlError:
    """The error for rows that certify nothing: what they would certify at the first budget that failed, and how many rows would do."""
    can = f"At this budget these rows certify {certifiable_tolerance(pairs, delta=delta):.2f} points"
    if pairs.drop_points < tolerance_points:
        rows = rows_needed(tolerance_points, drop_points=pairs.drop_points, discordant_points=pairs.discordant_points, delta=delta)
        do = f"{can}, and about {max(rows, pairs.rows + 1)} rows would do if the figures stay. Bring fresh rows, or offer dearer budgets."
    else:
        do = f"{can}, and no number of rows would do if the figures stay. Offer dearer budgets, or heal the network."
    return ControlError(
        f"a drop of {pairs.drop_points:.2f} points on {pairs.rows} rows at {budget:.4g}x, {pairs.discordant_points:.2f} % of them discordant",
        wanted=f"at most {tolerance_points:.4g} points with confidence {1 - delta:.4g}",
        do=do,
    )


def check_options(tolerance_points: float, budgets: Sequence[float], delta: float) -> None:
    """Raises PlanError on a tolerance, a level or budgets that make no sense."""
    if not (0 < tolerance_points < 100 and SLACK < delta < 0.5 and len(budgets)):
        raise PlanError(
            f"tolerance {tolerance_points} points, delta {delta} and {len(budgets)} budgets",
            wanted=f"a tolerance between 0 and 100 points, delta between {SLACK} and 0.5 and a budget",
            do="State what may be lost and how sure you want to be.",
        )


def check_reference(outcomes: Outcomes, reference: Tensor | None, agreement: bool) -> None:
    """Raises PlanError where two measures are asked for, ControlError for a reference that does not pair up with the rows."""
    if reference is None:
        return
    if agreement:
        raise PlanError("a reference and agreement", wanted="one measure", do="Leave out one: agreement is with the full path.")
    rows = len(outcomes.quality)
    if reference.shape != (rows,) or not bool(((reference >= 0) & (reference <= 1)).all()):
        raise ControlError(f"a reference of shape {tuple(reference.shape)}", wanted=f"({rows},), 0 to 1", do="Answer the same samples with it.")


def check_choice(outcomes: Outcomes, choice: Tensor) -> None:
    """Raises ControlError for choices that are not one rung of the ladder for each row."""
    rows, rungs = outcomes.quality.shape
    if choice.shape != (rows,) or choice.dtype != torch.int64 or not 0 <= int(choice.min()) <= int(choice.max()) < rungs:
        raise ControlError(
            f"choices {choice.dtype} {tuple(choice.shape)}", wanted=f"({rows},) int64, from 0 to {rungs - 1}", do="Choose one rung of the ladder for each row."
        )
