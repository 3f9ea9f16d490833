"""A policy that has stopped looking at its input is found out, and in time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from apportion.control.collapse import Watch, collapse, information
from apportion.control.complexity import fit_complexity
from apportion.control.planted import planted
from apportion.control.policy import fit_policy
from apportion.control.reward import Episodes, Reward, segments
from apportion.control.sequential import SequentialPolicy, fit_ppo
from apportion.errors import ControlError


def test_figures_of_a_deployed_choice() -> None:
    assert collapse(torch.zeros(10, dtype=torch.long), rungs=4) == (pytest.approx(0.0), 1, 1.0)
    assert collapse(torch.arange(8) % 4, rungs=4) == (pytest.approx(2.0), 4, 0.25)


def test_information_is_what_the_input_says_about_the_choice() -> None:
    static = torch.tensor([0.7, 0.2, 0.1]).expand(50, 3)
    assert information(static) == pytest.approx(0.0, abs=1e-9)  # it varies, and tells nothing
    assert information(torch.eye(4).repeat(5, 1)) == pytest.approx(2.0)
    noisy = 0.5 * torch.eye(2).repeat(8, 1) + 0.25  # a binary symmetric channel that errs one time in four
    assert information(noisy) == pytest.approx(1 + 0.25 * torch.tensor(0.25).log2().item() + 0.75 * torch.tensor(0.75).log2().item())


def test_watch_forgives_what_recovers() -> None:
    watch = Watch(patience=100)
    for bits in (0.0, 0.0, 0.5, 0.0, 0.0, 0.0):
        watch.see(bits, updates=30)
    with pytest.raises(ControlError, match=r"for 120 updates: it has collapsed"):
        watch.see(0.0, updates=30)


def test_one_shot_policy_that_sees_nothing_fails_with_advice() -> None:
    outcomes = planted(4000, seed=0).outcomes
    blind = replace(outcomes, signal=torch.ones_like(outcomes.signal))
    complexity = fit_complexity(blind, seed=0)
    with pytest.raises(ControlError, match=r"collapsed to a static one.*serve the best static path"):
        fit_policy(blind, complexity, seed=0)
    fit_policy(outcomes, fit_complexity(outcomes, seed=0), seed=0, epochs=2)


class Counted(torch.optim.AdamW):
    """Counts the updates of the run that it is put into."""

    updates = 0

    def step(self, *args: object, **more: object) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        Counted.updates += 1
        super().step()


def test_a_planted_collapse_is_caught_within_two_hundred_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy begins well; its reward then pays for one action whatever the input is, as a budget term alone would."""
    monkeypatch.setattr("apportion.control.sequential.AdamW", Counted)
    graph, _ = segments(torch.full((3,), 0.3), torch.full((4,), 0.01), glance=0.1)
    generator = torch.Generator().manual_seed(0)
    signal = torch.randn(600, 1, 4, generator=generator).expand(-1, 4, -1).contiguous()
    needed = (signal[:, :1, 0] * 1.5 + 1.5).round().clamp(0, 3)
    episodes = Episodes(signal, torch.arange(4) >= needed, torch.zeros(600, 4))
    torch.manual_seed(0)
    policy = SequentialPolicy(graph, features=4)
    with torch.no_grad():
        policy.outer.weight[1] = 0.3 * torch.randn(policy.outer.weight.shape[1])  # looks at its input at the start
    nothing = Episodes(signal, torch.zeros(600, 4, dtype=torch.bool), torch.zeros(600, 4))
    Counted.updates = 0
    with pytest.raises(ControlError, match="collapsed to a static one"):
        fit_ppo(policy, graph, nothing, episodes, reward=Reward(penalty=0.0), walks=256, rate=2e-2)
    assert 0 < Counted.updates <= 200
