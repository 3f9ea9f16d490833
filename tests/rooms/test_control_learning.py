"""The learned parts on planted tables: the signal shows the difficulty, rung k is right exactly where the difficulty is at most k."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from apportion.control.complexity import Complexity, calibrate, expected_calibration_error, fit_complexity
from apportion.control.controller import Controller, fit_controller
from apportion.control.operate import adaptive_gain, bootstrap_means, frontier, operating_point
from apportion.control.policy import choose, fit_policy, prices
from apportion.control.rules import always_full, envelope, oracle, static_hull, taken
from apportion.errors import ControlError
from apportion.vocab import Outcomes

RUNGS = 4


def planted(rows: int, *, seed: int, noise: float, features: int = 8, lucky: float = 0.0, rungs: int = RUNGS) -> Outcomes:
    generator = torch.Generator().manual_seed(seed)
    difficulty = torch.randn(rows, 1, generator=generator)
    need = (torch.special.ndtr(difficulty) * rungs).long()
    correct = (torch.arange(rungs) >= need) ^ (torch.rand(rows, rungs, generator=generator) < lucky)
    direction = torch.randn(1, features, generator=torch.Generator().manual_seed(1))
    signal = 3 + difficulty * direction + noise * torch.randn(rows, features, generator=generator)
    cost = torch.linspace(0.2, 1.0, rungs)
    return Outcomes(signal, correct, correct == correct[:, -1:], 1 - correct.float(), torch.rand(rows, rungs, generator=generator), cost)


def fitted(outcomes: Outcomes, fit: int) -> Controller:
    rows = torch.arange(len(outcomes.signal))
    return fit_controller(outcomes, fit_rows=rows[:fit], calibrate_rows=rows[fit:], seed=0)


def at(controller: Controller, outcomes: Outcomes, budget: float, cap: float = math.inf) -> torch.Tensor:
    return controller(outcomes.signal, *controller.setting(budget=budget, cap=cap))


@pytest.fixture(scope="module")
def noisy() -> Controller:
    return fitted(planted(5000, seed=0, noise=1.0, lucky=0.02), 800)


@pytest.fixture(scope="module")
def fresh() -> Outcomes:
    return planted(8000, seed=5, noise=1.0, lucky=0.02)


def test_clean_signal_reaches_the_oracle() -> None:
    clean, unseen = fitted(planted(1800, seed=2, noise=0.0), 1200), planted(4000, seed=3, noise=0.0)
    bound = oracle(unseen)
    spent = taken(unseen, at(clean, unseen, 1.03 * bound.cost))
    assert spent.cost <= 1.05 * bound.cost
    assert spent.accuracy >= bound.accuracy - 0.005
    assert spent.accuracy >= static_hull(unseen).interpolate(spent.cost) + 0.2


def test_noisy_signal_still_beats_every_mixture(noisy: Controller, fresh: Outcomes) -> None:
    for budget in (0.4, 0.6, 0.8):
        gain, low, high = adaptive_gain(fresh, at(noisy, fresh, budget))
        assert low < gain < high
        assert low > 3.0


def test_policy_learns_what_the_complexity_does_not_know() -> None:
    outcomes, unseen = planted(1500, seed=2, noise=0.5), planted(2000, seed=3, noise=0.5)
    blind = Complexity(features=8, rungs=RUNGS)
    nn.init.zeros_(blind.outer.weight)
    controller = Controller(blind, fit_policy(outcomes, blind, seed=0)).requires_grad_(False)
    controller.cost.copy_(outcomes.cost)
    controller.set_prices(outcomes)
    for budget in (0.4, 0.6):
        result = taken(unseen, at(controller, unseen, budget))
        assert result.accuracy > static_hull(unseen).interpolate(result.cost) + 0.1


def test_mean_budget_holds_on_fresh_rows(noisy: Controller, fresh: Outcomes) -> None:
    for budget in (0.25, 0.33, 0.4, 0.517, 0.6, 0.75, 0.9):
        assert taken(fresh, at(noisy, fresh, budget)).cost == pytest.approx(budget, rel=0.02)
    assert taken(fresh, at(noisy, fresh, noisy.cost[0].item())).cost == pytest.approx(0.2)
    assert torch.equal(at(noisy, fresh, 1.0), torch.full((8000,), RUNGS - 1))


def test_prices_are_the_lowest_that_keep_the_budget() -> None:
    worth, cost = torch.rand(60, 1, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0.2, 0.5, 1.0])
    for budget in (0.253, 0.501, 0.907):
        price = prices(worth, cost, torch.tensor([budget]))
        assert cost[choose(worth, price, cost)].mean() <= budget + 1e-6
        assert cost[choose(worth, price - 1e-4, cost)].double().mean() > budget


def test_cap_is_never_passed(noisy: Controller, fresh: Outcomes) -> None:
    for cap in [*noisy.cost.tolist(), 0.5, 0.99]:
        for budget in (0.3, 0.7, 1.0):
            assert bool((noisy.cost[at(noisy, fresh, budget, cap)] <= cap).all())
    for broken in ({"budget": 0.1}, {"cap": 0.1}, {"budget": math.nan}):
        with pytest.raises(ControlError, match="cheapest"):
            noisy.setting(**broken)


def test_a_choice_does_not_depend_on_the_batch(noisy: Controller, fresh: Outcomes) -> None:
    budget, cap = noisy.setting(budget=0.5)
    together = noisy(fresh.signal[:300], budget, cap)
    alone = torch.cat([noisy(row, budget, cap) for row in fresh.signal[:300].split(1)])
    beside_others = noisy(torch.cat([1e3 * fresh.signal[5000:5100], fresh.signal[:300].flip(0)]), budget, cap)[100:].flip(0)
    assert torch.equal(together, alone)
    assert torch.equal(together, beside_others)


def test_saved_and_loaded_is_the_same(noisy: Controller, fresh: Outcomes) -> None:
    again = Controller.from_config(noisy.config())
    assert not torch.equal(at(again, fresh, 0.5), at(noisy, fresh, 0.5))
    again.load_state_dict({name: value.clone() for name, value in noisy.state_dict().items()}, strict=True)
    for budget in (0.3, 0.5, 0.8):
        assert torch.equal(at(again, fresh, budget), at(noisy, fresh, budget))
    assert again.config() == noisy.config() and all(isinstance(value, int) for value in again.config().values())


def test_same_seed_same_controller() -> None:
    outcomes = planted(400, seed=0, noise=0.5)
    state = torch.get_rng_state()
    first = fitted(outcomes, 250).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    second = fitted(outcomes, 250).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_compiles_as_one_graph(noisy: Controller, fresh: Outcomes) -> None:
    compiled = torch.compile(noisy, fullgraph=True, backend="eager")
    for budget, cap in ((0.3, math.inf), (0.6, 0.8)):
        setting = noisy.setting(budget=budget, cap=cap)
        assert torch.equal(compiled(fresh.signal[:64], *setting), noisy(fresh.signal[:64], *setting))


def test_macs_are_what_runs(noisy: Controller, fresh: Outcomes) -> None:
    with FlopCounterMode(display=False) as counter:
        noisy(fresh.signal[:1], *noisy.setting(budget=0.5))
    assert counter.get_total_flops() == 2 * noisy.macs


def test_rows_used_twice_are_refused() -> None:
    outcomes = planted(200, seed=0, noise=0.5)
    with pytest.raises(ControlError, match="row 90 in both"):
        fit_controller(outcomes, fit_rows=torch.arange(100), calibrate_rows=torch.arange(90, 200), seed=0)


@pytest.mark.parametrize(("rows", "features", "noise"), [(500, 20, 1.0), (500, 400, 4.0)])
def test_complexity_beats_the_base_rate_and_calibration_mends_it(rows: int, features: int, noise: float) -> None:
    kind = {"noise": noise, "features": features, "lucky": 0.03}
    model = fit_complexity(planted(rows, seed=0, **kind), seed=0, under_weight=3.0)
    unseen = planted(3000, seed=9, **kind)
    raw = expected_calibration_error(model(unseen.signal), unseen.correct)
    calibrate(model, planted(500, seed=4, **kind))
    p, target = model(unseen.signal), unseen.correct.float()
    entropy = nn.functional.binary_cross_entropy
    assert entropy(p, target) < 0.9 * entropy(target.mean(0).expand_as(target), target)
    assert expected_calibration_error(p, unseen.correct) < min(raw, 0.06)


def test_sufficiency_never_falls_along_the_ladder() -> None:
    torch.manual_seed(0)
    model, signal = Complexity(features=5, rungs=6), torch.randn(50, 5)
    chance = model.sufficient(signal)
    assert bool((model(signal).diff(dim=1) < 0).any())
    assert bool((chance.diff(dim=1) >= 0).all())
    for row, rung in enumerate(model.rung(signal, share=0.9).tolist()):
        assert rung == min(k for k in range(6) if chance[row, k] >= 0.9 * chance[row, -1])


def test_calibration_error_in_limiting_cases() -> None:
    ok = torch.tensor([[True, False]] * 50)
    assert expected_calibration_error(torch.full((50, 2), 0.5), ok) == pytest.approx(0.0)
    assert expected_calibration_error(torch.full((50, 2), 0.9), ok) == pytest.approx(0.4, abs=1e-6)
    assert expected_calibration_error(ok.float(), ok) == 0.0


def test_operating_point_is_the_first_budget_that_holds(noisy: Controller, fresh: Outcomes) -> None:
    fresh = fresh.rows(torch.arange(2000))

    def choice(budget: float) -> torch.Tensor:
        return at(noisy, fresh, budget)

    found = operating_point(choice, fresh, 2.0)
    full = always_full(fresh).accuracy
    drops = {budget: 100 * (full - taken(fresh, choice(budget)).accuracy) for budget in torch.linspace(0.2, 1.0, 101).tolist()}
    cheaper = [drop for budget, drop in drops.items() if found.budget - 0.05 < budget < found.budget - 1e-6]
    assert sum(cheaper) / len(cheaper) > 2.0
    here = taken(fresh, choice(found.budget))
    assert found.accuracy_drop == pytest.approx(100 * (full - here.accuracy)) and found.accuracy_drop <= 2.5
    assert found.mean_cost == pytest.approx(here.cost) and found.mean_cost < 0.95
    assert found.interval[0] < found.accuracy_drop < found.interval[1]
    assert operating_point(choice, fresh, 100.0).budget == pytest.approx(0.2)
    with pytest.raises(ControlError, match="every budget"):
        operating_point(choice, fresh, -50.0)


def test_operating_point_does_not_take_a_lucky_dip(fresh: Outcomes) -> None:
    wrong, right = fresh.correct[:, 0].int().argmin(), fresh.correct[:, 0].int().argmax()
    table = fresh.rows(torch.cat((wrong.expand(10), right.expand(90))))
    table = replace(table, quality=table.correct | (torch.arange(RUNGS) == RUNGS - 1))

    def choice(budget: float) -> torch.Tensor:  # ten points are lost on rung 0; by luck none at one small budget
        return torch.full((100,), 3 if abs(budget - 0.28) < 1e-6 or budget > 0.595 else 0)

    assert operating_point(choice, table, 5.0).budget == pytest.approx(0.6)


def test_frontier_tells_cost_accuracy_and_shares(noisy: Controller, fresh: Outcomes) -> None:
    points = frontier(noisy, fresh, [0.3, 0.6, 1.0])
    for point in points:
        assert sum(point["share"]) == pytest.approx(1.0)
        assert sum(s * c for s, c in zip(point["share"], fresh.cost.tolist(), strict=True)) == pytest.approx(point["cost"])
    assert [point["cost"] for point in points] == sorted(point["cost"] for point in points)
    assert points[-1]["accuracy"] == pytest.approx(always_full(fresh).accuracy)


def test_bootstrap_has_the_spread_of_a_mean() -> None:
    values = torch.randn(400, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 3.0]) + 5
    means = bootstrap_means(values)
    assert torch.allclose(means.mean(0), values.double().mean(0), atol=0.02)
    assert torch.allclose(means.std(0), values.double().std(0) / 20, rtol=0.1)


def test_gain_of_a_blind_policy_is_not_positive(fresh: Outcomes) -> None:
    rung = torch.full((len(fresh.signal),), 1)
    gain, low, _ = adaptive_gain(fresh, rung)
    hull = envelope(fresh.cost, fresh.correct.double().mean(0), fresh.cost[1]).item()
    assert gain == pytest.approx(100 * (taken(fresh, rung).accuracy - hull), abs=1e-5)
    assert gain <= 1e-5 and low <= 1e-5


@pytest.mark.slow
def test_a_large_table_with_many_features() -> None:
    outcomes = planted(5000, seed=0, noise=4.0, features=200, lucky=0.03, rungs=6)
    controller, unseen = fitted(outcomes, 3500), planted(10_000, seed=1, noise=4.0, features=200, lucky=0.03, rungs=6)
    assert all(adaptive_gain(unseen, at(controller, unseen, budget))[1] > 3.0 for budget in (0.4, 0.6, 0.8))
