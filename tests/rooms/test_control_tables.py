"""Labels and rules against their naive definitions, on tables made up at random."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor

from apportion.control import rules
from apportion.control.labels import check_table, folds, stable_correct, task_reward
from apportion.errors import ControlError
from apportion.vocab import Outcomes


def table(rows: int, rungs: int, *, seed: int, right: float = 0.6) -> Outcomes:
    """Answers right by chance, with no structure at all."""
    generator = torch.Generator().manual_seed(seed)
    correct = torch.rand(rows, rungs, generator=generator) < right
    cost = torch.rand(rungs, generator=generator).sort().values.clamp_min(0.05)
    return Outcomes(
        torch.randn(rows, 5, generator=generator),
        correct,
        correct == correct[:, -1:],
        torch.rand(rows, rungs, generator=generator),
        torch.rand(rows, rungs, generator=generator),
        cost / cost[-1],
    )


def test_stable_correct_is_the_naive_rule() -> None:
    correct = table(300, 5, seed=0).correct
    rung, solvable = stable_correct(correct)
    for row, ok in enumerate(correct.tolist()):
        fits = [k for k in range(5) if all(ok[k:])]
        assert (int(rung[row]), bool(solvable[row])) == ((min(fits), True) if fits else (0, False))


def test_reward_of_each_case() -> None:
    correct = torch.tensor([[False, True], [True, False], [False, False], [True, True]])
    expected = torch.tensor([[-2.0, 1.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]) / 3.0
    assert torch.equal(task_reward(correct, penalty=2.0), expected)


def test_folds_part_the_rows() -> None:
    parts = folds(103, 4, seed=1)
    assert sorted(torch.cat(parts).tolist()) == list(range(103))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_tables_that_teach_nothing_are_refused() -> None:
    good = table(50, 3, seed=0)
    check_table(good)
    broken = good.signal.clone()
    broken[7, 2] = torch.nan
    with pytest.raises(ControlError, match="row 7"):
        check_table(Outcomes(broken, good.correct, good.agree, good.loss, good.margin, good.cost))
    with pytest.raises(ControlError, match="10 samples"):
        check_table(good.rows(torch.arange(10)))
    with pytest.raises(ControlError, match="1 rungs"):
        check_table(good.columns(torch.tensor([2])))
    with pytest.raises(ControlError, match="all cost"):
        check_table(Outcomes(good.signal, good.correct, good.agree, good.loss, good.margin, torch.ones(3)))


def mixed(cost: Tensor, accuracy: Tensor, budget: float) -> float:
    """The best random mixture within a budget, as the linear programme that defines it."""
    found = linprog(-accuracy.numpy(), A_ub=cost[None].numpy(), b_ub=[budget], A_eq=[[1.0] * len(cost)], b_eq=[1.0])
    return -found.fun


@pytest.mark.parametrize("seed", range(4))
def test_hull_is_the_best_mixture(seed: int) -> None:
    outcomes = table(40, 6, seed=seed)
    cost, accuracy = outcomes.cost.double(), outcomes.correct.double().mean(0)
    hull = rules.static_hull(outcomes)
    for budget in torch.linspace(cost[0].item(), 1.2, 23, dtype=torch.float64).tolist():
        assert hull.interpolate(budget) == pytest.approx(mixed(cost, accuracy, budget), abs=1e-9)
        assert rules.envelope(cost, accuracy, torch.tensor(budget)).item() == pytest.approx(mixed(cost, accuracy, budget), abs=1e-6)
    with pytest.raises(ControlError):
        hull.interpolate(cost[0].item() - 0.01)


def test_static_rules() -> None:
    outcomes = table(60, 5, seed=3)
    accuracy = outcomes.correct.double().mean(0)
    assert rules.always_full(outcomes)[:2] == (1.0, pytest.approx(accuracy[-1].item()))
    for budget in (outcomes.cost[0].item(), 0.7, 1.0):
        allowed = [a for a, c in zip(accuracy.tolist(), outcomes.cost.tolist(), strict=True) if c <= budget]
        assert rules.best_static(outcomes, budget).accuracy == pytest.approx(max(allowed))
    with pytest.raises(ControlError):
        rules.best_static(outcomes, 0.001)


def test_random_rule_is_what_drawing_gives() -> None:
    outcomes = table(50, 4, seed=5)
    for budget in (0.5 * (outcomes.cost[0] + outcomes.cost.mean()).item(), 0.5 * (1 + outcomes.cost.mean()).item()):
        expected = rules.random_at(outcomes, budget)
        end = 0 if budget < outcomes.cost.mean() else 3
        share = (budget - outcomes.cost[end]) / (outcomes.cost.mean() - outcomes.cost[end])
        generator = torch.Generator().manual_seed(0)
        uniform = torch.rand(200_000, generator=generator) < share
        rung = torch.where(uniform, torch.randint(4, (200_000,), generator=generator), end)
        row = torch.randint(50, (200_000,), generator=generator)
        assert outcomes.cost[rung].mean().item() == pytest.approx(budget, abs=0.005)
        assert outcomes.correct[row, rung].double().mean().item() == pytest.approx(expected.accuracy, abs=0.005)
        assert expected.accuracy <= rules.static_hull(outcomes).interpolate(budget) + 1e-12


def test_cascade_is_the_naive_loop() -> None:
    outcomes = table(80, 4, seed=6)
    thresholds, reuse = torch.tensor([0.7, 0.5, 0.9]), torch.full((4,), 0.02)
    spent, right, taken = 0.0, 0, []
    for row in range(80):
        paid = outcomes.cost[0].item()
        rung = 0
        while rung < 3 and outcomes.margin[row, rung] < thresholds[rung]:
            rung += 1
            paid += outcomes.cost[rung].item() - reuse[rung].item()
        spent, right = spent + paid, right + int(outcomes.correct[row, rung])
        taken.append(rung)
    result = rules.confidence_cascade(outcomes, thresholds, reuse)
    assert result.choice is not None and result.choice.tolist() == taken
    assert (result.cost, result.accuracy) == (pytest.approx(spent / 80), pytest.approx(right / 80))


def test_oracle_answers_at_least_as_well_as_full_and_peeking_is_no_dearer() -> None:
    outcomes = table(200, 5, seed=8)
    oracle, peeking, full = rules.oracle(outcomes), rules.label_peeking_ceiling(outcomes), rules.always_full(outcomes)
    assert oracle.choice is not None
    assert bool((outcomes.correct.gather(1, oracle.choice[:, None])[:, 0] >= outcomes.correct[:, -1]).all())
    assert oracle.cost < full.cost
    assert peeking.accuracy == pytest.approx(outcomes.correct.any(1).double().mean().item())
    assert peeking.accuracy > oracle.accuracy
