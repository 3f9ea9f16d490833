"""More to learn than right and wrong: a second head that shapes the trunk and is gone afterwards."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from apportion.control.complexity import Complexity, calibrate, fit_complexity
from apportion.errors import ControlError
from apportion.vocab import Outcomes

FEATURES, RUNGS = 40, 4


def planted(rows: int, seed: int) -> tuple[Outcomes, Tensor]:
    """Right and wrong say little about a difficulty that the signal holds among much else; the difficulty itself (n, 1) beside it."""
    generator = torch.Generator().manual_seed(seed)
    difficulty = torch.randn(rows, 1, generator=generator)
    signal = torch.randn(rows, FEATURES, generator=generator)
    signal[:, :4] += difficulty
    correct = torch.rand(rows, RUNGS, generator=generator) < torch.sigmoid(torch.arange(RUNGS) - 1 - 2 * difficulty)
    cost = torch.linspace(0.2, 1.0, RUNGS)
    return Outcomes(signal, correct, correct == correct[:, -1:], 1 - correct.float(), torch.rand(rows, RUNGS, generator=generator), cost), difficulty


def surprise(model: Complexity, held: Outcomes, fresh: Outcomes) -> float:
    calibrate(model, held)
    return F.binary_cross_entropy(model(fresh.signal), fresh.correct.float()).item()


def test_a_target_that_knows_the_difficulty_makes_better_chances_of_few_rows() -> None:
    (fresh, _), (held, _) = planted(4000, 100), planted(1000, 101)
    gains, harms = [], []
    for seed in range(2):
        few, difficulty = planted(120, seed)
        without = surprise(fit_complexity(few, seed=seed), held, fresh)
        gains.append(without - surprise(fit_complexity(few, seed=seed, targets=difficulty, target_weight=1.0), held, fresh))
        noise = torch.randn(120, 1, generator=torch.Generator().manual_seed(50 + seed))
        harms.append(without - surprise(fit_complexity(few, seed=seed, targets=noise, target_weight=1.0), held, fresh))
    assert sum(gains) / 2 > 0.01 and sum(gains) > sum(harms) + 0.03, (gains, harms)


def test_what_is_served_stays_as_it_was() -> None:
    few, difficulty = planted(120, 0)
    plain = fit_complexity(few, seed=0, epochs=3).state_dict()
    ignored = fit_complexity(few, seed=0, epochs=3, targets=difficulty, target_weight=0.0).state_dict()
    heeded = fit_complexity(few, seed=0, epochs=3, targets=difficulty).state_dict()
    assert plain.keys() == ignored.keys() == heeded.keys()
    assert all(torch.equal(plain[name], ignored[name]) for name in plain)
    assert not torch.equal(plain["inner.weight"], heeded["inner.weight"])
    scaled = fit_complexity(few, seed=0, epochs=3, targets=7 + 100 * difficulty).state_dict()  # in whatever unit
    assert all(torch.allclose(heeded[name], scaled[name], atol=1e-4) for name in heeded)


def test_a_target_that_says_the_same_of_all_changes_nothing() -> None:
    few, _ = planted(120, 0)
    plain, same = (fit_complexity(few, seed=0, epochs=3, targets=targets).state_dict() for targets in (None, torch.ones(120, 2)))
    assert all(torch.equal(plain[name], same[name]) for name in plain)


@pytest.mark.parametrize("targets", [torch.zeros(119, 1), torch.zeros(120), torch.full((120, 1), torch.nan)])
def test_targets_that_do_not_fit_are_named(targets: Tensor) -> None:
    with pytest.raises(ControlError, match=r"targets of shape \(1(19|20)"):
        fit_complexity(planted(120, 0)[0], seed=0, targets=targets)
