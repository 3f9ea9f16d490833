"""Slow-down attacks: the known worst case of a linear cost, and a small network with a fitted controller whose cap must hold."""

from __future__ import annotations

from typing import TypedDict

import pytest
import torch
from torch import Tensor

from apportion.control import Controller, fit_controller
from apportion.control.drift import fit_familiar, guarded
from apportion.errors import DataError, NoEffect, PlanError
from apportion.measure.attack import inflation, paste, relaxed_cost, slow_down, slow_down_patch
from apportion.vocab import Outcomes
from tests.conftest import images, tiny

RUNGS, RADIUS = 4, 0.15


class Setting(TypedDict):
    budget: float
    cap: float


class Toy:
    """A small network, and a controller that spends more where one direction of the signal is large."""

    def __init__(self) -> None:
        self.glance = tiny().glance(1)
        signal = self.signal(images(700, seed=1))
        standard = (signal - signal.mean(0)) / signal.std(0).clamp_min(1e-6)
        difficulty = standard @ torch.randn(signal.shape[1], generator=torch.Generator().manual_seed(3))
        need = (difficulty.argsort().argsort() * RUNGS // len(difficulty))[:, None]
        correct = torch.arange(RUNGS) >= need
        outcomes = Outcomes(signal, correct, correct, 1 - correct.float(), correct.float(), torch.tensor([0.2, 0.4, 0.7, 1.0]))
        rows = torch.arange(700)
        self.controller: Controller = fit_controller(outcomes, fit_rows=rows[:450], calibrate_rows=rows[450:], seed=0)
        self.familiar = fit_familiar(signal, fit_rows=rows[:450], calibrate_rows=rows[450:])

    def signal(self, inputs: Tensor) -> Tensor:
        return self.glance(inputs)[1]

    def cost(self, *, budget: float, cap: float):
        wanted, _ = self.controller.setting(budget=budget, cap=cap)
        return lambda inputs: relaxed_cost(
            self.controller.worth(self.signal(inputs), wanted), self.controller.price(wanted), self.controller.cost, cap=cap, temperature=0.1
        )

    def choice(self, inputs: Tensor, *, budget: float, cap: float, guard: bool = False) -> Tensor:
        wanted, most = self.controller.setting(budget=budget, cap=cap)
        signal = self.signal(inputs)
        choice = self.controller(signal, wanted, most)
        return guarded(choice, self.familiar(signal), self.familiar.threshold, cost=self.controller.cost, cap=most) if guard else choice


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy()


def test_a_linear_cost_is_driven_to_its_known_worst_case() -> None:
    weight = torch.tensor([2.0, -1.0, 0.0, 3.0])
    inputs = torch.tensor([[0.0, 0.0, 0.0, 0.9], [0.5, 0.05, 0.5, 0.5]])
    attacked = slow_down(lambda x: x @ weight, inputs, radius=0.1, low=0.0, high=1.0)
    assert torch.allclose(attacked[:, [0, 1, 3]], torch.tensor([[0.1, 0.0, 1.0], [0.6, 0.0, 0.6]]), atol=1e-5)
    radius = torch.tensor([0.1, 0.2, 0.1, 0.0])
    attacked = slow_down(lambda x: x @ weight, inputs, radius=radius, seed=None)
    assert torch.allclose(attacked - inputs, torch.tensor([0.1, -0.2, 0.0, 0.0]), atol=1e-5)


def test_an_attack_stays_in_its_ball_and_never_makes_an_input_cheaper() -> None:
    inputs = torch.rand(50, 6, generator=torch.Generator().manual_seed(0))

    def bumpy(x: Tensor) -> Tensor:
        return torch.sin(40 * x).sum(1)

    for seed in (None, 0):
        attacked = slow_down(bumpy, inputs, radius=0.05, low=0.0, high=1.0, steps=5, seed=seed)
        assert float((attacked - inputs).abs().max()) <= 0.05 + 1e-6 and bool(((attacked >= 0) & (attacked <= 1)).all())
        assert bool((bumpy(attacked) >= bumpy(inputs)).all()) and bumpy(attacked).mean() > bumpy(inputs).mean() + 1
    top = torch.full((3, 6), torch.pi / 80)  # a maximum: nothing near is dearer
    assert torch.equal(slow_down(bumpy, top, radius=0.05), top)


def test_the_relaxed_cost_becomes_the_cost_that_is_served(toy: Toy) -> None:
    inputs, cost = images(60, seed=5), toy.controller.cost
    for budget, cap in ((0.5, 1.0), (0.6, 0.7)):
        wanted, _ = toy.controller.setting(budget=budget, cap=cap)
        worth, price = toy.controller.worth(toy.signal(inputs), wanted), toy.controller.price(wanted)
        soft = relaxed_cost(worth, price, cost, cap=cap, temperature=1e-6)
        assert torch.allclose(soft, cost[toy.choice(inputs, budget=budget, cap=cap)], atol=1e-4)
        assert torch.allclose(relaxed_cost(worth, price, cost, cap=cap, temperature=1e6), cost[cost <= cap].mean().expand(60), atol=1e-4)
    with pytest.raises(PlanError, match=r"cap of 0\.1"):
        relaxed_cost(worth, price, cost, cap=0.1)


@pytest.mark.parametrize("cap", [1.0, 0.7])
def test_an_attack_raises_compute_more_than_chance_and_never_over_the_cap(toy: Toy, cap: float) -> None:
    inputs, setting = images(100, seed=6), Setting(budget=0.5, cap=cap)
    before = toy.choice(inputs, **setting)
    attacked = slow_down(toy.cost(**setting), inputs, radius=RADIUS, steps=10)
    random = inputs + RADIUS * torch.randn(inputs.shape, generator=torch.Generator().manual_seed(0)).sign()
    found = inflation(before, toy.choice(attacked, **setting), toy.controller.cost, cap=cap)
    chance = inflation(before, toy.choice(random, **setting), toy.controller.cost, cap=cap)
    assert found.over_cap == chance.over_cap == 0
    assert found.ratio > 1.3 and found.ratio > chance.ratio + 0.25
    assert found.at_cap > chance.at_cap + 0.2
    watched = inflation(before, toy.choice(attacked, guard=True, **setting), toy.controller.cost, cap=cap)
    assert watched.over_cap == 0 and watched.after >= found.after


def test_a_patch_made_on_some_inputs_slows_others_down(toy: Toy) -> None:
    setting = Setting(budget=0.5, cap=1.0)
    patch = slow_down_patch(toy.cost(**setting), images(48, seed=7), side=6, low=-2.0, high=2.0, steps=20)
    others = images(100, seed=8)
    random = 4 * torch.rand(patch.shape, generator=torch.Generator().manual_seed(0)) - 2
    before, cost = toy.choice(others, **setting), toy.controller.cost
    found = inflation(before, toy.choice(paste(others, patch), **setting), cost)
    chance = inflation(before, toy.choice(paste(others, random), **setting), cost)
    assert float(patch.abs().max()) <= 2.0 and found.ratio > 1.2 and found.ratio > chance.ratio + 0.15


def test_a_patch_lies_in_the_corner_and_has_to_fit() -> None:
    inputs, patch = images(2), torch.full((3, 5, 5), 9.0)
    pasted = paste(inputs, patch)
    assert bool((pasted[:, :, :5, :5] == 9).all()) and torch.equal(pasted[:, :, 5:], inputs[:, :, 5:]) and torch.equal(pasted[:, :, :, 5:], inputs[:, :, :, 5:])
    assert not bool((inputs == 9).any())
    with pytest.raises(DataError, match="one that fits"):
        paste(inputs, torch.zeros(3, 17, 17))


def test_inflation_counts_what_it_says() -> None:
    cost = torch.tensor([0.2, 0.6, 1.0])
    found = inflation(torch.tensor([0, 0, 1, 1]), torch.tensor([1, 0, 1, 1]), cost, cap=0.6)
    assert (found.before, found.after, found.ratio) == pytest.approx((0.4, 0.5, 1.25))
    assert found.at_cap == 0.75 and found.over_cap == 0
    assert inflation(torch.tensor([0, 2]), torch.tensor([2, 2]), cost, cap=0.9).over_cap == 3
    with pytest.raises(DataError, match="same samples"):
        inflation(torch.tensor([0, 1]), torch.tensor([0]), cost)


def test_a_cap_that_is_not_passed_on_is_noticed(toy: Toy) -> None:
    """The planted fault: the server decides without the cap that the attack was weighed with."""
    inputs = images(100, seed=6)
    attacked = slow_down(toy.cost(budget=0.6, cap=1.0), inputs, radius=RADIUS, steps=5)
    loose = toy.choice(attacked, budget=0.6, cap=1.0)
    assert inflation(toy.choice(inputs, budget=0.6, cap=0.7), loose, toy.controller.cost, cap=0.7).over_cap > 0


def test_a_cost_without_a_gradient_is_refused() -> None:
    for flat in (lambda x: torch.ones(len(x)), lambda x: x.detach().sum(1)):
        with pytest.raises(NoEffect, match="does not depend"):
            slow_down(flat, torch.rand(3, 4), radius=0.1)
