"""Bounds against brute force, linear programmes and simulation; the planted population against its own closed forms."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor

from apportion.control import rules
from apportion.control.bounds import (
    acceptable,
    acceptable_chance,
    batching_law,
    bounds,
    fano,
    information_bound,
    need_posterior,
    oracle_bound,
    padded_cost,
    plug_in_prices,
    plug_in_regret,
    static_cost,
)
from apportion.control.labels import stable_correct
from apportion.control.planted import COSTS, Planted, planted
from apportion.control.policy import choose
from apportion.errors import ControlError
from apportion.vocab import Outcomes

COST = torch.tensor(COSTS, dtype=torch.float64)
LARGE = 40_000


@pytest.fixture(scope="module")
def noisy() -> Planted:
    return planted(LARGE, noise=0.7, lucky=0.05, seed=0)


def table(rows: int, rungs: int, *, seed: int) -> Outcomes:
    generator = torch.Generator().manual_seed(seed)
    correct = torch.rand(rows, rungs, generator=generator) < 0.6
    cost = torch.rand(rungs, generator=generator).sort().values + 0.05
    loss, margin = torch.rand(2, rows, rungs, generator=generator)
    return Outcomes(torch.zeros(rows, 1), correct, correct == correct[:, -1:], loss, margin, cost / cost[-1])


def chances(rows: int, rungs: int, *, seed: int) -> Tensor:
    chance = torch.rand(rows, rungs, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    chance[:, -1] = 1
    return chance


def programme(chance: Tensor, cost: Tensor, violation: float) -> float:
    """The least mean cost over all randomised choices, as the linear programme that defines it."""
    rows, rungs = chance.shape
    each_row = torch.eye(rows).repeat_interleave(rungs, 1).numpy()
    risk = (1 - chance.double()).flatten()[None] / rows
    found = linprog((cost.double().repeat(rows) / rows).numpy(), A_ub=risk.numpy(), b_ub=[violation], A_eq=each_row, b_eq=[1.0] * rows)
    return found.fun


def lost(outcomes: Outcomes, choice: Tensor) -> Tensor:
    """Samples that the full path gets right and this choice does not, written out."""
    return outcomes.correct[:, -1] & ~outcomes.correct.gather(1, choice[:, None])[:, 0]


# The planted population


@pytest.mark.parametrize("noise", [0.0, 0.7, 3.0])
def test_planted_chances_are_true(noise: float) -> None:
    data = planted(LARGE, noise=noise, unsolvable=0.15, lucky=0.05, seed=1)
    right, kept = data.outcomes.correct.double(), acceptable(data.outcomes.correct).double()
    view = data.outcomes.signal[:, 0]
    for truth, happened in ((data.right, right), (data.right_seen, right), (data.acceptable_seen, kept)):
        assert torch.allclose(truth.mean(0), happened.mean(0), atol=0.008)
        for part in view.argsort().split(LARGE // 8):
            assert torch.allclose(truth[part].mean(0), happened[part].mean(0), atol=0.025)
    if noise == 0:
        assert torch.allclose(data.right, data.right_seen)


def test_planted_shares_are_those_asked_for() -> None:
    data = planted(LARGE, unsolvable=0.2, lucky=0.0, seed=2)
    rung, solvable = stable_correct(data.outcomes.correct)
    assert solvable.double().mean().item() == pytest.approx(0.8, abs=0.01)
    assert torch.bincount(rung[solvable], minlength=4).double() / LARGE == pytest.approx(torch.full((4,), 0.2), abs=0.01)


def test_planted_columns_agree_with_each_other(noisy: Planted) -> None:
    outcomes = noisy.outcomes
    full = outcomes.correct[:, -1]
    assert torch.equal(outcomes.agree[full], outcomes.correct[full])
    assert bool(outcomes.agree[:, -1].all())
    assert torch.equal(outcomes.loss < math.log(2), outcomes.correct)
    assert bool(outcomes.loss.isfinite().all()) and 0 <= outcomes.margin.min() and outcomes.margin.max() <= 1
    hard = (noisy.right[:, 0] < 1) & (noisy.right[:, 0] > 0)
    p, margin, happened = 0.05, outcomes.margin[hard, 0].double(), outcomes.correct[hard, 0]
    stated = p * margin / (p * margin + (1 - p) * (1 - margin))
    for part in margin.argsort().chunk(5):
        assert happened[part].double().mean().item() == pytest.approx(stated[part].mean().item(), abs=0.02)


def test_planted_is_drawn_from_its_seed() -> None:
    first, again, other = (planted(50, seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(getattr(first.outcomes, name), getattr(again.outcomes, name)) for name in ("signal", "correct", "loss", "margin"))
    assert not torch.equal(first.outcomes.signal, other.outcomes.signal)
    assert planted(50, costs=(0.5, 1.0), nuisance=0, seed=0).outcomes.signal.shape == (50, 1)


@pytest.mark.parametrize("costs", [(1.0,), (0.5, 0.5, 1.0), (0.5, 0.9), (0.0, 1.0)])
def test_planted_refuses_costs_that_do_not_rise_to_one(costs: tuple[float, ...]) -> None:
    with pytest.raises(ControlError, match="rise to 1"):
        planted(50, costs=costs, seed=0)


def test_planted_refuses_shares_and_noise_by_name() -> None:
    with pytest.raises(ControlError, match="unsolvable 1"):
        planted(50, unsolvable=1.0, seed=0)
    with pytest.raises(ControlError, match=r"lucky -0\.1"):
        planted(50, lucky=-0.1, seed=0)
    for noise in (-1.0, math.inf, math.nan):
        with pytest.raises(ControlError, match="noise"):
            planted(50, noise=noise, seed=0)


# T1: perfect foresight


@pytest.mark.parametrize("seed", range(5))
def test_oracle_bound_is_brute_force_over_all_assignments(seed: int) -> None:
    outcomes, rows = table(6, 3, seed=seed), 6
    spent, violations = [], []
    for assignment in product(range(3), repeat=rows):
        choice = torch.tensor(assignment)
        spent.append(outcomes.cost[choice].double().mean().item())
        violations.append(int(lost(outcomes, choice).sum()))
    for waived in range(rows + 1):
        best = min(cost for cost, count in zip(spent, violations, strict=True) if count <= waived)
        assert oracle_bound(outcomes, waived / rows) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_oracle_bound_between_whole_samples_is_the_linear_programme(seed: int) -> None:
    outcomes = table(7, 4, seed=seed)
    for violation in (0.0, 0.05, 0.2, 0.33, 1.0):
        assert oracle_bound(outcomes, violation) == pytest.approx(programme(acceptable(outcomes.correct), outcomes.cost, violation), abs=1e-9)


def test_no_random_policy_beats_the_oracle_bound() -> None:
    generator = torch.Generator().manual_seed(0)
    for seed in range(40):
        outcomes = table(30, 4, seed=seed)
        kept = acceptable(outcomes.correct)
        cheapest = kept.int().argmax(1)
        for _ in range(10):
            # Drawn near the best there is: a policy drawn anywhere would not put the bound to the test.
            spread = torch.rand((), generator=generator)
            drawn = torch.where(torch.rand(30, generator=generator) < spread, torch.randint(4, (30,), generator=generator), cheapest)
            share = torch.rand(30, 1, generator=generator, dtype=torch.float64)
            policy = share * torch.eye(4, dtype=torch.float64)[drawn] + (1 - share) * torch.eye(4, dtype=torch.float64)[cheapest]
            violation = (policy * ~kept).sum(1).mean().item()
            assert (policy @ outcomes.cost.double()).mean().item() >= oracle_bound(outcomes, violation) - 1e-12


def test_oracle_bound_without_violations_is_the_oracle_rule_less_its_luck() -> None:
    nested, lucky = planted(500, lucky=0.0, seed=5).outcomes, planted(500, lucky=0.2, seed=5).outcomes
    assert oracle_bound(nested, 0.0) == pytest.approx(rules.oracle(nested).cost)
    assert oracle_bound(lucky, 0.0) < rules.oracle(lucky).cost
    assert oracle_bound(lucky, 1.0) == pytest.approx(lucky.cost[0].item())


def test_oracle_bound_of_the_population_is_its_closed_form() -> None:
    outcomes = planted(LARGE, unsolvable=0.1, lucky=0.0, seed=6).outcomes
    for violation in (0.0, 0.05, 0.1, 0.225):
        expected = 0.1 * COSTS[0] + 0.225 * sum(COSTS) - violation * (COSTS[-1] - COSTS[0])
        assert oracle_bound(outcomes, violation) == pytest.approx(expected, abs=0.006)


# T2: what the signal tells


@pytest.mark.parametrize("seed", range(4))
def test_information_bound_is_its_linear_programme_and_its_dual(seed: int) -> None:
    chance, cost = chances(12, 4, seed=seed), table(2, 4, seed=seed).cost
    for violation in (0.0, 0.03, 0.2, 0.5, 1.0):
        found = information_bound(chance, cost, violation)
        assert found == pytest.approx(programme(chance, cost, violation), abs=1e-8)
        for risk_price in torch.logspace(-2, 3, 50, dtype=torch.float64):
            dual = (cost.double() + risk_price * (1 - chance)).amin(1).mean() - risk_price * violation
            assert dual.item() <= found + 1e-9


def test_with_all_information_it_is_the_oracle_bound() -> None:
    for seed in range(10):
        outcomes = table(50, 4, seed=seed)
        for violation in (0.0, 0.01, 0.1, 0.4):
            known = information_bound(acceptable(outcomes.correct).double(), outcomes.cost, violation)
            assert known == pytest.approx(oracle_bound(outcomes, violation), abs=1e-9)


def test_the_oracle_is_below_what_any_signal_allows() -> None:
    for seed in range(20):
        outcomes = table(60, 4, seed=seed)
        kept, group = acceptable(outcomes.correct).double(), torch.randint(7, (60,), generator=torch.Generator().manual_seed(seed))
        coarse = torch.stack([kept[group == value].mean(0) for value in group.tolist()])
        blind = kept.mean(0).expand(60, -1)
        for violation in (0.0, 0.05, 0.15, 0.3):
            values = [oracle_bound(outcomes, violation), *(information_bound(chance, outcomes.cost, violation) for chance in (coarse, blind))]
            assert values == pytest.approx(sorted(values), abs=1e-9)


def test_plug_in_rule_with_the_true_chance_attains_it(noisy: Planted) -> None:
    for violation in (0.02, 0.05, 0.15):
        price, _ = plug_in_prices(noisy.acceptable_seen, COST, violation)
        choice = choose(noisy.acceptable_seen, price, COST)
        assert COST[choice].mean().item() == pytest.approx(information_bound(noisy.acceptable_seen, COST, violation), abs=1e-3)
        assert lost(noisy.outcomes, choice).double().mean().item() == pytest.approx(violation, abs=0.005)


def test_a_clean_signal_reaches_the_oracle_and_an_empty_one_the_hull() -> None:
    clean = planted(5000, noise=0.0, lucky=0.0, seed=7)
    assert information_bound(clean.acceptable_seen, COST, 0.03) == pytest.approx(oracle_bound(clean.outcomes, 0.03), abs=1e-6)
    empty = planted(5000, noise=1e6, lucky=0.0, seed=7)
    risk = 1 - empty.acceptable_seen.mean(0)
    expected = linprog(COST.numpy(), A_ub=risk[None].numpy(), b_ub=[0.1], A_eq=[[1.0] * 4], b_eq=[1.0]).fun
    assert information_bound(empty.acceptable_seen, COST, 0.1) == pytest.approx(expected, abs=1e-4)


def test_chance_of_being_right_gives_a_bound_that_still_holds(noisy: Planted) -> None:
    loose = acceptable_chance(noisy.right_seen)
    assert bool((loose >= noisy.acceptable_seen - 1e-12).all())
    assert information_bound(loose, COST, 0.05) <= information_bound(noisy.acceptable_seen, COST, 0.05)
    nested = planted(200, lucky=0.0, seed=0)
    assert torch.allclose(acceptable_chance(nested.right_seen), nested.acceptable_seen)


def test_plug_in_regret_bounds_what_wrong_chances_lose() -> None:
    generator = torch.Generator().manual_seed(0)
    closest = 0.0
    for seed in range(200):
        chance = chances(20, 4, seed=seed)
        believed = (chance + 0.2 * torch.randn(20, 4, dtype=torch.float64, generator=generator)).clamp(0, 1)
        risk_price = 5 * torch.rand((), dtype=torch.float64, generator=generator).item() + 0.1
        value = COST + risk_price * (1 - chance)
        choice = choose(believed, torch.tensor(1 / risk_price, dtype=torch.float64), COST)
        excess = (value.gather(1, choice[:, None])[:, 0] - value.amin(1)).mean().item()
        limit = plug_in_regret(believed, chance, risk_price)
        assert excess <= limit + 1e-12
        closest = max(closest, excess / limit)
    assert closest > 0.1
    # Rungs of one cost, the chances of two off by half their distance and a little more: nearly all of the bound is lost.
    chance, believed, even = torch.tensor([[0.6, 0.4, 0.0, 0.0]]), torch.tensor([[0.499, 0.501, 0.0, 0.0]]), torch.ones(4)
    assert choose(believed, torch.tensor(0.5), even).item() == 1
    assert 2.0 * (0.6 - 0.4) <= plug_in_regret(believed, chance, 2.0) <= 1.02 * 2.0 * (0.6 - 0.4)


def test_what_cannot_be_bounded_is_refused() -> None:
    with pytest.raises(ControlError, match=r"risk of 0\.2 at the safest"):
        information_bound(torch.full((5, 4), 0.8), COST, 0.1)
    with pytest.raises(ControlError, match="not logits"):
        information_bound(torch.full((5, 4), 1.8), COST, 0.1)
    with pytest.raises(ControlError, match="row 2"):
        information_bound(torch.ones(5, 4).index_fill(0, torch.tensor(2), torch.nan), COST, 0.1)
    with pytest.raises(ControlError, match=r"3\) for 4 rungs"):
        information_bound(torch.ones(5, 3), COST, 0.1)
    with pytest.raises(ControlError, match="all cost"):
        information_bound(torch.ones(5, 4), torch.ones(4), 0.1)
    with pytest.raises(ControlError, match="a share of 3"):
        oracle_bound(table(5, 3, seed=0), 3.0)
    with pytest.raises(ControlError, match="row 1"):
        fano(torch.tensor([[0.5, 0.5], [0.5, 0.4]]))


# Fano


def test_fano_in_its_limiting_cases() -> None:
    assert fano(torch.eye(5)) == (0.0, 0.0)
    for rungs in (2, 3, 8):
        nothing = fano(torch.full((4, rungs), 1 / rungs, dtype=torch.float64))
        assert nothing.entropy_bits == pytest.approx(math.log2(rungs))
        assert nothing.error == pytest.approx(1 - 1 / rungs, abs=1e-6)
        # With equality where all wrong rungs are as likely.
        even = torch.full((1, rungs), 0.3 / (rungs - 1), dtype=torch.float64)
        even[0, 0] = 0.7
        assert fano(even).error == pytest.approx(0.3, abs=1e-9)


def test_fano_is_below_the_best_guess_and_above_its_weak_form() -> None:
    for seed in range(30):
        sharpness = 10 ** (seed / 15 - 1)
        posterior = (sharpness * torch.randn(50, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))).softmax(1)
        found = fano(posterior)
        direct = -sum(p * math.log2(p) for row in posterior.tolist() for p in row if p > 0) / 50
        assert found.entropy_bits == pytest.approx(direct)
        assert (found.entropy_bits - 1) / math.log2(5) <= found.error <= 1 - posterior.amax(1).mean().item() + 1e-9


def test_posterior_of_the_need_is_true() -> None:
    data = planted(LARGE, noise=0.7, lucky=0.0, seed=8)
    need = acceptable(data.outcomes.correct).int().argmax(1)
    posterior = need_posterior(data.acceptable_seen)
    assert torch.allclose(posterior.sum(1), torch.ones(LARGE, dtype=torch.float64))
    for part in data.outcomes.signal[:, 0].argsort().split(LARGE // 8):
        assert torch.allclose(posterior[part].mean(0), torch.bincount(need[part], minlength=4).double() / len(part), atol=0.025)
    guess = posterior.argmax(1)
    assert (guess != need).double().mean().item() == pytest.approx(1 - posterior.amax(1).mean().item(), abs=0.01)
    assert 0.1 < fano(posterior).error < (guess != need).double().mean().item()
    assert fano(need_posterior(planted(500, noise=0.0, lucky=0.0, seed=8).acceptable_seen)).error == pytest.approx(0.0, abs=1e-9)


# T3: mixtures


@pytest.mark.parametrize("seed", range(4))
def test_mixing_reaches_the_hull_and_never_passes_it(seed: int) -> None:
    outcomes = table(40, 5, seed=seed)
    cost, accuracy = outcomes.cost.double(), outcomes.correct.double().mean(0)
    hull = rules.static_hull(outcomes)
    mixtures = torch.rand(2000, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).pow(4)
    mixtures = mixtures / mixtures.sum(1, keepdim=True)
    assert bool((mixtures @ accuracy <= rules.envelope(cost, accuracy.expand(2000, -1), mixtures @ cost) + 1e-12).all())
    for wanted in torch.linspace(0.3, accuracy.max().item(), 9, dtype=torch.float64).tolist():
        found = linprog(cost.numpy(), A_ub=-accuracy[None].numpy(), b_ub=[-wanted], A_eq=[[1.0] * 5], b_eq=[1.0]).fun
        assert static_cost(outcomes, wanted) == pytest.approx(found, abs=1e-9)
    for wanted in torch.linspace(hull.accuracy[0].item(), hull.accuracy[-1].item(), 7).tolist():
        assert hull.interpolate(static_cost(outcomes, wanted) + 1e-12) == pytest.approx(wanted, abs=1e-6)
    assert static_cost(outcomes, accuracy.max().item() + 1e-6) == math.inf


# T4: batches


def test_batching_law_and_padded_cost_are_what_simulation_gives() -> None:
    generator = torch.Generator().manual_seed(0)
    choice = torch.multinomial(torch.tensor([0.5, 0.25, 0.15, 0.1]), 2000, replacement=True, generator=generator)
    share = (choice == 3).double().mean().item()
    for batch in (1, 2, 8, 32):
        drawn = choice[torch.randint(2000, (50_000, batch), generator=generator)].amax(1)
        assert padded_cost(COST, choice, batch) == pytest.approx(COST[drawn].mean().item(), abs=0.005)
        assert batching_law(share, batch) == pytest.approx((drawn < 3).double().mean().item(), abs=0.01)
    assert padded_cost(COST, choice, 1) == pytest.approx(COST[choice].mean().item())
    assert padded_cost(COST, torch.full((9,), 2), 64) == pytest.approx(COSTS[2])
    assert batching_law(0.1, 32) == pytest.approx(0.0343, abs=1e-4)


# All of it


def test_summary_of_a_controller_stands_in_order(noisy: Planted) -> None:
    outcomes, chance = noisy.outcomes, noisy.acceptable_seen
    price, _ = plug_in_prices(chance, COST, 0.05)
    best = bounds(outcomes, chance, choose(chance, price, COST))
    assert best.violation == pytest.approx(0.05, abs=0.004)
    assert best.oracle + 0.05 < best.information == pytest.approx(best.cost, abs=0.01)
    assert best.cost + 0.05 < best.hull
    blind = bounds(outcomes, chance, torch.randint(4, (LARGE,), generator=torch.Generator().manual_seed(0)))
    assert blind.oracle < blind.information < blind.hull < blind.cost + 0.01
    assert blind.fano == best.fano == fano(need_posterior(chance))
    full = bounds(outcomes, chance, torch.full((LARGE,), 3))
    assert (full.cost, full.violation, full.hull) == (1.0, 0.0, pytest.approx(1.0))
    assert full.accuracy == pytest.approx(rules.always_full(outcomes).accuracy)
