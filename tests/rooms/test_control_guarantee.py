"""The bound against enumeration, against repetition at the very edge of what is allowed, and against rules that look right and are not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError
from functools import cache

import numpy as np
import pytest
import torch
from scipy.optimize import fminbound
from scipy.stats import binom, multinomial
from torch import Tensor

from apportion.control import guarantee
from apportion.control.guarantee import SLACK, Losses, Pairs, certifiable_tolerance, certify, compared, p_value, rows_needed, score
from apportion.errors import ControlError, PlanError
from apportion.vocab import Outcomes

DELTA = 0.1
REPEATS = 1000
ALLOWED = DELTA + 3 * (DELTA * (1 - DELTA) / REPEATS) ** 0.5


def drawn(rows: int, drops: list[float], *, discordant: float, seed: int, right: float = 0.8) -> Outcomes:
    """Rungs with these true drops (shares), and the full path last: which rows a rung loses or wins is independent of all else but the full path."""
    generator = torch.Generator().manual_seed(seed)
    full = torch.rand(rows, generator=generator) < right
    columns = []
    for drop in drops:
        flip = torch.where(full, (discordant + drop) / 2 / right, (discordant - drop) / 2 / (1 - right))
        columns.append(full ^ (torch.rand(rows, generator=generator) < flip))
    correct = torch.stack([*columns, full], 1)
    zeros = torch.zeros(correct.shape)
    return Outcomes(torch.zeros(rows, 1), correct, correct == full[:, None], zeros, zeros, torch.linspace(0.2, 1.0, len(drops) + 1))


def by_rung(outcomes: Outcomes) -> Callable[[float], Tensor]:
    """Every row on the dearest rung within the budget."""
    return lambda budget: torch.full((len(outcomes.correct),), int((outcomes.cost <= budget + 1e-6).sum()) - 1)


def exactly(lost: int, won: int, rows: int) -> Outcomes:
    """Two rungs: the cheap one loses and wins that many rows."""
    correct = torch.ones(rows, 2, dtype=torch.bool)
    correct[:lost, 0] = False
    correct[lost : lost + won, 1] = False
    return Outcomes(torch.zeros(rows, 1), correct, correct == correct[:, -1:], torch.zeros(rows, 2), torch.zeros(rows, 2), torch.tensor([0.5, 1.0]))


@cache
def most_lost_certified(rows: int, tolerance: float, delta: float, *, won: int) -> np.ndarray:
    """For 0 to `won` won rows, the most lost rows that are certified (-1: none)."""
    limits, lost = [], -1
    for wins in range(won + 1):
        while lost >= 0 and p_value(Pairs(lost, wins, rows), 100 * tolerance) > delta:
            lost -= 1
        while p_value(Pairs(lost + 1, wins, rows), 100 * tolerance) <= delta:
            lost += 1
        limits.append(lost)
    return np.array(limits)


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (3, 9), (9, 3), (4, 4), (1, 0)])
def test_score_has_the_variance_of_the_restricted_likelihood(lost: int, won: int) -> None:
    rows, tolerance = 40, 0.2

    def misfit(share: float) -> float:
        return -float(multinomial.logpmf([lost, won, rows - lost - won], rows, [share + tolerance, share, 1 - 2 * share - tolerance]))

    top = (1 - tolerance) / 2 - 1e-9
    share = float(fminbound(misfit, 0, top, xtol=1e-10)) if won else 0.0  # pyright: ignore[reportArgumentType]
    expected = (lost - won - rows * tolerance) / (rows * (2 * share + tolerance - tolerance**2)) ** 0.5
    assert float(score(lost, won, rows=rows, tolerance=tolerance)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("rows", "tolerance"), [(40, 0.05), (40, 0.3), (60, 0.01), (25, 0.7)])
def test_losing_more_or_winning_less_is_never_more_favourable(rows: int, tolerance: float) -> None:
    lost, won = np.meshgrid(np.arange(rows + 1), np.arange(rows + 1), indexing="ij")
    table = np.where(lost + won <= rows, score(lost, won, rows=rows, tolerance=tolerance), np.nan)
    assert np.nanmin(np.diff(table, axis=0)) > 0 > np.nanmax(np.diff(table, axis=1))
    assert np.nanmin(table[1:, :-1] - table[:-1, 1:]) > 0


@pytest.mark.parametrize(("lost", "won", "rows", "tolerance"), [(0, 0, 30, 0.1), (1, 3, 30, 0.1), (2, 2, 40, 0.12), (0, 5, 25, 0.02)])
def test_p_value_bounds_the_naive_supremum_closely(lost: int, won: int, rows: int, tolerance: float) -> None:
    observed = float(score(lost, won, rows=rows, tolerance=tolerance))
    cells = np.array([(a, b, rows - a - b) for a in range(rows + 1) for b in range(rows + 1 - a)])
    favourable = cells[score(cells[:, 0], cells[:, 1], rows=rows, tolerance=tolerance) <= observed + 1e-9]
    shares = np.linspace(0, (1 - tolerance) / 2, 300)
    chances = [multinomial.pmf(favourable, rows, [share + tolerance, share, max(0.0, 1 - 2 * share - tolerance)]).sum() for share in shares]
    inside = [chance for chance, share in zip(chances, shares, strict=True) if binom.sf(won - 1, rows, share) > SLACK / 2 < binom.cdf(won, rows, share)]
    assert max(inside) < p_value(Pairs(lost, won, rows), 100 * tolerance) < 1.06 * max(inside) + 2 * SLACK


def test_disagreement_is_the_binomial_tail() -> None:
    for lost, rows, tolerance in ((0, 300, 0.01), (3, 1000, 0.01), (9, 400, 0.05)):
        assert p_value(Pairs(lost, 0, rows, winnable=False), 100 * tolerance) == pytest.approx(binom.cdf(lost, rows, tolerance))


def test_size_is_at_most_delta_whatever_the_share_of_discordant_rows() -> None:
    """No drawing: the chance of a false certificate, summed over all outcomes, for drops exactly at the tolerance and just above it."""
    rows, tolerance, wins = 120, 0.05, 30
    limits = most_lost_certified(rows, tolerance, DELTA, won=wins)
    counts = np.arange(wins + 1)
    for above in (0.0, 0.01):
        size = []
        for share in np.linspace(0, 0.1, 60):
            lost = binom.cdf(limits, rows - counts, (share + tolerance + above) / (1 - share))
            size.append(binom.pmf(counts, rows, share) @ lost + binom.sf(wins, rows, share))
        assert max(size) <= DELTA
        assert above or max(size) > 0.75 * DELTA  # valid, and not by being timid


@pytest.mark.parametrize("discordant", [0.03, 0.08])
def test_bound_is_violated_in_at_most_delta_of_repetitions_and_the_point_estimate_in_many_more(discordant: float) -> None:
    rows, tolerance = 400, 0.02
    limits = most_lost_certified(rows, tolerance, DELTA, won=40)
    shares = [(discordant + tolerance) / 2, (discordant - tolerance) / 2, 1 - discordant]
    lost, won, _ = np.random.default_rng(0).multinomial(rows, shares, size=REPEATS).T
    assert (lost <= limits[won]).mean() <= ALLOWED
    assert (lost - won <= rows * tolerance).mean() > 3 * ALLOWED


def repeated(monkeypatch: pytest.MonkeyPatch, *, repeats: int, drops: list[float], rows: int, tolerance: float) -> float:
    """Share of repetitions in which the whole procedure certifies a budget whose true drop is not below the tolerance."""
    monkeypatch.setattr(guarantee, "p_value", cache(guarantee.p_value))
    monkeypatch.setattr(guarantee, "certifiable_tolerance", lambda pairs, *, delta: 0.0)
    violated = 0
    for seed in range(repeats):
        outcomes = drawn(rows, drops, discordant=0.05, seed=seed)
        try:
            found = certify(by_rung(outcomes), outcomes, tolerance_points=100 * tolerance, budgets=outcomes.cost.tolist(), delta=DELTA)
        except ControlError:
            continue
        violated += drops[int((outcomes.cost <= found.budget + 1e-6).sum()) - 1] >= tolerance
    return violated / repeats


@pytest.mark.slow
def test_whole_procedure_is_violated_in_at_most_delta_of_repetitions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six budgets of which three are bad, two of them only just, and the dearer ones so good that the procedure gets as far as them."""
    share = repeated(monkeypatch, repeats=REPEATS, drops=[0.035, 0.02, 0.02, 0.0, -0.01], rows=400, tolerance=0.02)
    assert 0.01 < share <= ALLOWED


def test_looking_for_any_budget_that_passes_would_not_do() -> None:
    """The planted fault: without an order, each of five budgets at the edge gets its own try."""
    rows, tolerance = 400, 0.02
    limits = most_lost_certified(rows, tolerance, DELTA, won=40)
    counts = np.random.default_rng(1).multinomial(rows, [0.035, 0.015, 0.95], size=(REPEATS, 5))
    passed = counts[..., 0] <= limits[counts[..., 1]]
    assert passed.any(1).mean() > 2 * ALLOWED
    assert passed[:, 0].mean() <= ALLOWED


@pytest.mark.slow
def test_rows_needed_give_the_power_that_was_asked_for() -> None:
    for tolerance, drop, discordant in ((2.0, 0.3, 4.0), (1.0, 0.0, 1.0)):
        rows = rows_needed(tolerance, drop_points=drop, discordant_points=discordant, delta=DELTA, power=0.8)
        shares = np.array([discordant + drop, discordant - drop]) / 200
        counts = np.random.default_rng(0).multinomial(rows, [*shares, 1 - shares.sum()], size=REPEATS)
        limits = most_lost_certified(rows, tolerance / 100, DELTA, won=int(counts[:, 1].max()))
        certified = (counts[:, 0] <= limits[counts[:, 1]]).mean()
        assert 0.73 < certified < 0.87


def test_rows_needed_in_the_limits() -> None:
    few = rows_needed(1.0, drop_points=0, discordant_points=0, delta=DELTA)
    assert 0.99**few <= DELTA < 0.99 ** (few - 1)
    wanted = [rows_needed(tolerance, drop_points=0.1, discordant_points=2, delta=DELTA) for tolerance in (0.3, 0.5, 1, 2)]
    assert wanted == sorted(wanted, reverse=True)
    with pytest.raises(ControlError, match="No number of rows"):
        rows_needed(0.3, drop_points=0.3, discordant_points=2, delta=DELTA)


def test_upper_bound_follows_the_counts() -> None:
    def upper(lost: int, won: int, rows: int = 500, delta: float = DELTA) -> float:
        return certifiable_tolerance(Pairs(lost, won, rows), delta=delta)

    for longer in ([upper(lost, 6) for lost in (0, 3, 9)], [upper(6, won) for won in (10, 5, 0)], [upper(6, 6, n) for n in (1000, 500, 250)]):
        assert longer == sorted(longer) and len(set(longer)) == len(longer)
    bound = upper(6, 6)
    assert upper(6, 6, delta=0.05) > bound
    assert p_value(Pairs(6, 6, 500), bound) <= DELTA < p_value(Pairs(6, 6, 500), 0.99 * bound)


def test_limiting_cases() -> None:
    assert 0.99**400 < p_value(Pairs(0, 0, 400), 1.0) < 1.25 * 0.99**400
    assert p_value(Pairs(400, 0, 400), 99.9) == 1.0
    assert p_value(Pairs(0, 400, 400), 0.3) == SLACK
    assert certifiable_tolerance(Pairs(400, 0, 400), delta=DELTA) == pytest.approx(100.0)
    assert certifiable_tolerance(Pairs(0, 0, 400), delta=DELTA) == pytest.approx(100 * (1 - DELTA ** (1 / 400)), rel=0.1)


def test_certificate_of_the_cheapest_in_sequence() -> None:
    """The second budget fails, so the cheapest is never reached however good it is."""
    outcomes = drawn(2000, [0.0, 0.05, 0.0], discordant=0.06, seed=0)
    asked: list[float] = []

    def choose(budget: float) -> Tensor:
        asked.append(budget)
        return by_rung(outcomes)(budget)

    found = certify(choose, outcomes, tolerance_points=2.0, budgets=outcomes.cost.tolist())
    assert asked == sorted(outcomes.cost.tolist(), reverse=True)[:3]
    assert found.budget == found.mean_cost == pytest.approx(outcomes.cost[2].item())
    assert (found.tolerance_points, found.confidence, found.rows) == (2.0, 0.9, 2000)
    pairs = compared(outcomes, by_rung(outcomes)(found.budget))
    assert found.p_value == p_value(pairs, 2.0) <= DELTA
    assert found.drop_points == pairs.drop_points < found.upper_points <= 2.0
    with pytest.raises(FrozenInstanceError):
        found.budget = 0.0  # pyright: ignore[reportAttributeAccessIssue]


def test_too_few_rows_say_what_they_certify_and_how_many_would_do() -> None:
    outcomes = exactly(6, 5, 300)
    needed = rows_needed(0.5, drop_points=100 / 300, discordant_points=1100 / 300, delta=DELTA)
    can = certifiable_tolerance(Pairs(6, 5, 300), delta=DELTA)
    with pytest.raises(ControlError, match=rf"0\.33 points on 300 rows at 0\.5x.*certify {can:.2f} points, and about {needed} rows"):
        certify(by_rung(outcomes), outcomes, tolerance_points=0.5, budgets=[0.5])
    with pytest.raises(ControlError, match="no number of rows"):
        certify(by_rung(outcomes), outcomes, tolerance_points=0.2, budgets=[0.5])


def test_full_path_is_never_the_answer() -> None:
    outcomes = exactly(100, 0, 1000)
    with pytest.raises(ControlError, match="all buy the full path"):
        certify(by_rung(outcomes), outcomes, tolerance_points=1.0, budgets=[1.0])
    with pytest.raises(ControlError, match=r"at 0\.5x"):
        certify(by_rung(outcomes), outcomes, tolerance_points=1.0, budgets=[0.5, 1.0])


def test_measures() -> None:
    outcomes = exactly(3, 5, 1000)
    cheap = torch.zeros(1000, dtype=torch.int64)
    assert compared(outcomes, cheap) == Pairs(3, 5, 1000)
    assert compared(outcomes, cheap, agreement=True) == Pairs(8, 0, 1000, winnable=False)
    assert compared(outcomes, cheap, reference=torch.ones(1000, dtype=torch.bool)) == Pairs(3, 0, 1000)
    agreed = certify(by_rung(outcomes), outcomes, tolerance_points=2.0, budgets=[0.5], agreement=True)
    assert agreed.p_value == pytest.approx(binom.cdf(8, 1000, 0.02)) and agreed.drop_points == pytest.approx(0.8)


def test_bad_input_is_named() -> None:
    outcomes = exactly(1, 1, 100)
    choose = by_rung(outcomes)
    for options in ({"tolerance_points": 0.0}, {"delta": 0.7}, {"budgets": []}):
        with pytest.raises(PlanError):
            certify(choose, outcomes, **{"tolerance_points": 1.0, "budgets": [0.5], **options})  # pyright: ignore[reportArgumentType]
    with pytest.raises(PlanError, match="one measure"):
        certify(choose, outcomes, tolerance_points=1.0, budgets=[0.5], reference=torch.ones(100, dtype=torch.bool), agreement=True)
    with pytest.raises(ControlError, match=r"wanted \(100,\)"):
        certify(choose, outcomes, tolerance_points=1.0, budgets=[0.5], reference=torch.ones(99, dtype=torch.bool))
    for wrong in (torch.zeros(99, dtype=torch.int64), torch.zeros(100), torch.full((100,), 2)):
        with pytest.raises(ControlError, match=r"\(100,\) int64, from 0 to 1"):
            certify(lambda budget, wrong=wrong: wrong, outcomes, tolerance_points=1.0, budgets=[0.5])


def graded(losses: np.ndarray) -> Outcomes:
    """A full path of quality 0.5 and a cheaper one that loses so much of it."""
    quality = torch.stack([torch.from_numpy(0.5 - losses), torch.full((len(losses),), 0.5)], 1)
    return Outcomes(torch.zeros(len(losses), 1), quality, quality > 0, quality, quality, torch.tensor([0.5, 1.0]))


@pytest.mark.parametrize("shape", ["steady", "rare"])
def test_graded_answers_are_certified_wrongly_no_oftener_than_promised(shape: str) -> None:
    """The drop is exactly what is tolerated, so every certificate is false: at most delta of them, however what is lost is spread."""
    rng, delta, rows, repeats, false = np.random.default_rng(0), 0.1, 400, 1000, 0
    for _ in range(repeats):
        losses = rng.uniform(-0.2, 0.24, rows) if shape == "steady" else np.where(rng.random(rows) < 0.04, 0.5, 0.0)
        found = compared(graded(losses.clip(-0.5, 0.5)), torch.zeros(rows, dtype=torch.int64))
        assert isinstance(found, Losses)
        false += p_value(found, 2.0) <= delta
    assert false / repeats <= delta + 2.6 * (delta * (1 - delta) / repeats) ** 0.5


def test_graded_answers_are_certified_where_there_is_room() -> None:
    rng = np.random.default_rng(1)
    passed = [p_value(Losses(rng.uniform(-0.1, 0.1, 1000)), 1.5) <= 0.1 for _ in range(50)]
    assert sum(passed) >= 45
    found = Losses(rng.uniform(-0.1, 0.1, 1000))
    upper = certifiable_tolerance(found, delta=0.1)
    assert found.drop_points < upper < 1.5 and p_value(found, upper) <= 0.1
    need = rows_needed(1.5, drop_points=0.0, discordant_points=found.discordant_points, delta=0.1)
    assert 50 < need < 1000


def test_a_graded_certificate_says_what_it_promises() -> None:
    table = graded(np.random.default_rng(2).uniform(-0.1, 0.1, 2000))
    found = certify(by_rung(table), table, tolerance_points=2.0, budgets=[0.5, 1.0])
    assert found.budget == 0.5 and found.p_value <= 0.1 and found.drop_points < found.upper_points <= 2.0
    whole = certify(by_rung(table), table, tolerance_points=2.0, budgets=[0.5], reference=torch.full((2000,), 0.5))
    assert whole.p_value == found.p_value
    with pytest.raises(ControlError, match="rows would do"):
        certify(by_rung(table.rows(torch.arange(60))), table.rows(torch.arange(60)), tolerance_points=0.5, budgets=[0.5])
