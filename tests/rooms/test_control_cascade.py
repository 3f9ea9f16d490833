"""Thresholds on planted tables: the best that can be placed, budgets that hold, and nobody who is passed by."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from apportion.control import adaptive_gain, cascade, decide, operating_point
from apportion.control.cascade import ALWAYS, NEVER, Cascade, fit_cascade, leave, place_thresholds
from apportion.control.planted import planted
from apportion.control.rules import confidence_cascade, static_hull, taken
from apportion.errors import ControlError
from apportion.vocab import Outcomes


def made(rows: int, *, seed: int = 0, costs: tuple[float, ...] = (0.2, 0.4, 0.7, 1.0)) -> Outcomes:
    return planted(rows, costs=costs, seed=seed).outcomes


def fitted(outcomes: Outcomes) -> Cascade:
    fit, held = torch.arange(len(outcomes.signal)).tensor_split(2)
    return fit_cascade(outcomes, fit_rows=fit, calibrate_rows=held)


@pytest.fixture(scope="module")
def found() -> Cascade:
    return fitted(made(6000))


@pytest.fixture(scope="module")
def fresh() -> Outcomes:
    return made(10000, seed=1)


def worth(outcomes: Outcomes, thresholds: Tensor, price: float) -> float:
    choice = leave(outcomes.margin, thresholds)
    right = outcomes.correct.gather(1, choice[:, None])[:, 0].double()
    return (right - price * outcomes.cost.double()[choice]).mean().item()


def naive_leave(margin: Tensor, thresholds: Tensor) -> list[int]:
    return [next((k for k, limit in enumerate(thresholds.tolist()) if row[k] >= limit), len(row) - 1) for row in margin.tolist()]


def test_a_sample_leaves_at_the_first_checkpoint_that_is_sure_enough(fresh: Outcomes) -> None:
    thresholds = torch.tensor([0.9, 0.5, 0.3])
    choice = leave(fresh.margin[:300], thresholds)
    assert choice.tolist() == naive_leave(fresh.margin[:300], thresholds) and len(choice.unique()) == 4
    assert torch.equal(leave(fresh.margin, thresholds), confidence_cascade(fresh, thresholds, torch.zeros(4)).choice)


@pytest.mark.parametrize("price", [0.05, 0.3, 1.0])
def test_one_threshold_is_the_best_there_is(price: float) -> None:
    """Two rungs: every threshold tried."""
    table = made(300, costs=(0.3, 1.0))
    placed = worth(table, place_thresholds(table, price, torch.tensor([NEVER])), price)
    every = [worth(table, limit[None], price) for limit in [torch.tensor(ALWAYS), torch.tensor(NEVER), *table.margin[:, 0]]]
    assert placed == pytest.approx(max(every), abs=1e-12)


@pytest.mark.parametrize("price", [0.05, 0.3, 1.0])
def test_two_thresholds_are_nearly_the_best_pair_and_no_move_of_one_helps(price: float) -> None:
    table = made(150, costs=(0.3, 0.6, 1.0))
    placed = place_thresholds(table, price, torch.full((2,), NEVER))
    reached = worth(table, placed, price)
    limits = [[ALWAYS, NEVER, *table.margin[:, k].tolist()] for k in range(2)]
    best = max(worth(table, torch.tensor(pair), price) for pair in product(*limits))
    assert reached >= best - 0.01
    for k in range(2):
        for limit in limits[k]:
            moved = placed.clone()
            moved[k] = limit
            assert worth(table, moved, price) <= reached + 1e-9


def test_budgets_are_held_and_none_is_passed_where_they_were_set(found: Cascade, fresh: Outcomes) -> None:
    held = made(6000).rows(torch.arange(3000, 6000))
    for budget in (0.25, 0.4, 0.55, 0.7, 0.9):
        assert 0.97 * budget <= taken(held, found.chosen(held, budget)).cost <= budget + 1e-6
        assert taken(fresh, found.chosen(fresh, budget)).cost == pytest.approx(budget, rel=0.04)


@pytest.mark.parametrize("costs", [(0.2, 0.4, 0.7, 1.0), (0.17, 0.33, 0.5, 0.67, 0.83, 1.0)])
@pytest.mark.parametrize("rows", [1400, 6000])
def test_little_of_a_budget_stays_unspent(costs: tuple[float, ...], rows: int) -> None:
    """Between two prices thresholds may jump: the way there is taken in steps as small as it is long."""
    table = made(rows, costs=costs)
    held, model = table.rows(torch.arange(rows // 2, rows)), fitted(table)
    for share in (0.03, 0.06, 0.12, 0.2, 0.3, 0.5, 0.7, 0.9):
        budget = costs[0] + share * (1 - costs[0])
        assert 0.98 * budget <= taken(held, model.chosen(held, budget)).cost <= budget + 1e-6, budget


def test_it_beats_every_mixture(found: Cascade, fresh: Outcomes) -> None:
    """The margin of a rung says more than the glance does: five points and more in the middle."""
    for budget in (0.4, 0.6, 0.8):
        value, low, _ = adaptive_gain(fresh, decide(found, fresh, budget))
        assert low > 3.0, (budget, value)


def test_the_ends_are_one_rung_for_all_exactly(found: Cascade, fresh: Outcomes) -> None:
    assert bool((found.chosen(fresh, 1.0) == 3).all())
    assert bool((found.chosen(fresh, found.cost[0].item()) == 0).all())
    certain = replace(fresh, margin=torch.ones_like(fresh.margin))  # a margin of 1 is still less than never
    assert bool((found.chosen(certain, 1.0) == 3).all())


def test_more_budget_lets_nobody_leave_earlier_on_the_way(found: Cascade) -> None:
    limits = torch.stack([found.limits(budget, torch.tensor(torch.inf)) for budget in torch.linspace(0.2, 1.0, 60)])
    assert bool((limits.diff(dim=0) >= 0).all()) and bool((limits[-1] == NEVER).all())


def test_a_cap_is_never_passed(found: Cascade, fresh: Outcomes) -> None:
    for cap, rung in ((0.2 + 1e-6, 0), (0.69, 1), (0.7 + 1e-6, 2), (1.0, 3)):
        assert int(found.chosen(fresh, 0.9, cap).max()) == rung
    with pytest.raises(ControlError, match="cheapest"):
        found.chosen(fresh, 0.9, 0.1)


def test_a_choice_depends_on_that_sample_alone(found: Cascade, fresh: Outcomes) -> None:
    whole = found.chosen(fresh, 0.5)
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))
    assert torch.equal(found.chosen(fresh.rows(order), 0.5), whole[order])
    assert torch.equal(torch.cat([found.chosen(fresh.rows(part), 0.5) for part in torch.arange(500).split(7)]), whole[:500])


def test_chances_are_calibrated(found: Cascade, fresh: Outcomes) -> None:
    """Held against the share that is right, in tenths of each rung."""
    chance = found.chance(fresh)
    for rung in range(4):
        tenths = chance[:, rung].argsort().tensor_split(10)
        off = [abs(chance[rows, rung].mean().item() - fresh.correct[rows, rung].double().mean().item()) for rows in tenths]
        assert sum(off) / 10 < 0.04 and chance[tenths[9], rung].mean() - chance[tenths[0], rung].mean() > 0.3
    assert bool((chance[fresh.margin[:, 0].argsort(), 0].diff() >= -1e-6).all())


def test_a_tolerance_is_held_at_less_than_full(fresh: Outcomes) -> None:
    table = made(6000)
    held, model = table.rows(torch.arange(3000, 6000)), fitted(table)
    point = operating_point(lambda budget: model.chosen(held, budget), held, 2.0)
    hull = static_hull(fresh)
    full = fresh.correct[:, -1].double().mean().item()
    choice = model.chosen(fresh, point.budget)
    assert point.mean_cost < 0.95 and full - taken(fresh, choice).accuracy <= 0.035
    assert taken(fresh, choice).accuracy > hull.interpolate(taken(fresh, choice).cost)


def test_it_is_the_same_after_its_state_was_carried_over(found: Cascade, fresh: Outcomes) -> None:
    again = Cascade.from_config(found.config())
    again.load_state_dict(found.state_dict())
    assert torch.equal(again.chosen(fresh, 0.5), found.chosen(fresh, 0.5)) and found.macs == 0


def test_rows_used_twice_are_refused() -> None:
    rows = torch.arange(100)
    with pytest.raises(ControlError, match="both parts"):
        fit_cascade(made(200), fit_rows=rows, calibrate_rows=rows + 50)


def test_the_law_of_placing_catches_a_threshold_placed_without_those_who_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: a threshold moved to where half of the rows leave."""
    monkeypatch.setattr(cascade, "_best", lambda margin, gain: margin.median())
    table = made(300, costs=(0.3, 1.0))
    placed = worth(table, cascade.place_thresholds(table, 0.05, torch.tensor([NEVER])), 0.05)
    assert placed < max(worth(table, limit[None], 0.05) for limit in table.margin[:, 0]) - 0.005
