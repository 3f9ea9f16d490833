"""Boosted trees as tensors: the same chances as LightGBM's own, true after calibration, and nothing but the signal in them."""

from __future__ import annotations

import sys
from dataclasses import replace

import lightgbm
import numpy as np
import pytest
import torch
from torch import Tensor

from apportion.control.complexity import Complexity, calibrate, expected_calibration_error
from apportion.control.controller import Controller
from apportion.control.operate import adaptive_gain
from apportion.control.ordinal import cumulative
from apportion.control.policy import fit_policy
from apportion.control.trees import Trees, fit_trees
from apportion.errors import ControlError
from apportion.vocab import Outcomes

RUNGS = 3


def truth(signal: Tensor) -> Tensor:
    """Known chances with thresholds and a product in them: what no linear rule finds."""
    ease = 2.0 * (signal[:, 0] > 0.3) - 1.5 * (signal[:, 1] * signal[:, 2] > 0) + 0.5
    return torch.sigmoid(ease[:, None] + torch.tensor([-1.0, 0.0, 2.0]))


def drawn(rows: int, *, seed: int) -> Outcomes:
    generator = torch.Generator().manual_seed(seed)
    signal = torch.randn(rows, 5, generator=generator)
    correct = torch.rand(rows, RUNGS, generator=generator) < truth(signal)
    loss, margin = torch.rand(2, rows, RUNGS, generator=generator)
    return Outcomes(signal, correct, correct == correct[:, -1:], loss, margin, torch.tensor([0.2, 0.5, 1.0]))


@pytest.fixture(scope="module")
def table() -> Outcomes:
    return drawn(1200, seed=0)


@pytest.fixture(scope="module")
def raw(table: Outcomes) -> Trees:
    return fit_trees(table, seed=0)


@pytest.fixture(scope="module")
def fresh() -> Outcomes:
    return drawn(3000, seed=2)


def calibrated(model: Trees, outcomes: Outcomes) -> Trees:
    again = Trees(**model.config())
    again.load_state_dict(model.state_dict())
    calibrate(again, outcomes)
    return again


def test_tensors_say_what_lightgbm_says(table: Outcomes, fresh: Outcomes, monkeypatch: pytest.MonkeyPatch) -> None:
    boosters: list[lightgbm.Booster] = []
    train = lightgbm.train

    def kept(*args, valid_sets, callbacks):
        boosters.append(train(*args, valid_sets=valid_sets, callbacks=callbacks))
        return boosters[-1]

    monkeypatch.setattr(lightgbm, "train", kept)
    model = fit_trees(table, seed=0)
    extremes = torch.tensor([[1e30] * 5, [-1e30] * 5, [0.0] * 5])
    standard = model.standardise(torch.cat([fresh.signal, extremes]))
    edges = torch.where(model.threshold.isfinite(), model.threshold, 0).flatten()[:500, None].expand(-1, 5)
    standard = torch.cat([standard, edges, edges.nextafter(torch.tensor(torch.inf)), edges.nextafter(torch.tensor(-torch.inf))])
    wanted = np.stack([np.asarray(b.predict(standard.double().numpy(), raw_score=True, num_iteration=b.best_iteration)) for b in boosters], 1)
    wanted = torch.sigmoid(torch.from_numpy(wanted) + model.base.double())
    assert len(boosters) == RUNGS and len({b.best_iteration for b in boosters}) > 1
    assert (torch.sigmoid(model.logits(standard)).double() - wanted).abs().max() < 1e-6
    assert wanted.std(0).min() > 0.05


def test_chances_are_true_after_calibration(raw: Trees, fresh: Outcomes) -> None:
    model = calibrated(raw, drawn(600, seed=1))
    p = model(fresh.signal)
    assert expected_calibration_error(p, fresh.correct) < 0.03
    known = truth(fresh.signal)
    assert (p - known).abs().mean() < 0.7 * (known.mean(0) - known).abs().mean()
    skewed = fit_trees(drawn(1200, seed=0), seed=0, under_weight=5.0)
    before = expected_calibration_error(skewed(fresh.signal), fresh.correct)
    assert expected_calibration_error(calibrated(skewed, drawn(600, seed=1))(fresh.signal), fresh.correct) < 0.5 * before


def test_weight_on_spending_too_little_lowers_the_chance_of_cheap_rungs(raw: Trees, table: Outcomes, fresh: Outcomes) -> None:
    careful = fit_trees(table, seed=0, under_weight=3.0)(fresh.signal).mean(0)
    plain = raw(fresh.signal).mean(0)
    assert careful[0] < plain[0] - 0.05 and careful[1] < plain[1] - 0.05
    assert careful[2].item() == pytest.approx(plain[2].item(), abs=1e-6)


def test_cumulative_targets_are_the_naive_rule(table: Outcomes, fresh: Outcomes) -> None:
    found = cumulative(table.correct)
    for row, ok in enumerate(table.correct.tolist()):
        assert found[row].tolist() == [all(ok[k:]) for k in range(RUNGS)]
    p = fit_trees(table, seed=0, ordinal=True)(fresh.signal).mean(0)
    assert torch.allclose(p, cumulative(fresh.correct).float().mean(0), atol=0.04)


def test_order_of_features_changes_nothing(raw: Trees, table: Outcomes, fresh: Outcomes) -> None:
    order = torch.tensor([3, 1, 4, 0, 2])
    other = fit_trees(replace(table, signal=table.signal[:, order]), seed=0)
    assert not torch.equal(other.feature, raw.feature)
    assert torch.allclose(other(fresh.signal[:, order]), raw(fresh.signal), atol=1e-6)


def test_a_row_does_not_depend_on_the_batch(raw: Trees, fresh: Outcomes) -> None:
    standard = raw.standardise(fresh.signal[:150])
    together = raw.logits(standard)
    assert torch.equal(together, torch.cat([raw.logits(row) for row in standard.split(1)]))
    assert torch.equal(together, raw.logits(torch.cat([1e3 * standard, standard.flip(0)]))[150:].flip(0))


def test_same_seed_same_trees_saved_and_loaded(raw: Trees, table: Outcomes, fresh: Outcomes) -> None:
    state, again = raw.state_dict(), fit_trees(table, seed=0)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in state.items())
    assert not torch.equal(fit_trees(table, seed=1)(fresh.signal), raw(fresh.signal))
    empty = Trees(**raw.config())
    assert not torch.equal(empty(fresh.signal), raw(fresh.signal))
    empty.load_state_dict({name: value.clone() for name, value in state.items()}, strict=True)
    assert torch.equal(empty(fresh.signal), raw(fresh.signal)) and not list(raw.parameters())


@pytest.mark.slow
def test_compiles_as_one_graph(raw: Trees, fresh: Outcomes) -> None:
    compiled = torch.compile(raw, fullgraph=True, backend="eager")
    assert torch.equal(compiled(fresh.signal[:64]), raw(fresh.signal[:64]))


def test_cost_counts_every_comparison_and_addition(raw: Trees) -> None:
    assert Trees(features=9, rungs=2, trees=5, depth=4).macs == 2 * 5 * (4 + 1)
    assert raw.macs <= Trees(features=5, rungs=RUNGS).macs
    assert raw.macs == sum(leaves.shape[0] * (raw.depth + 1) for leaves in raw.leaf)


def test_reading_of_the_chances(raw: Trees, fresh: Outcomes) -> None:
    chance, signal = raw(fresh.signal[:100]), fresh.signal[:100]
    sufficient = raw.sufficient(signal)
    for row, rung in enumerate(raw.rung(signal, share=0.8).tolist()):
        assert sufficient[row].tolist() == [chance[row, : k + 1].max() for k in range(RUNGS)]
        assert rung == min(k for k in range(RUNGS) if sufficient[row, k] >= 0.8 * sufficient[row, -1])


def test_a_rung_whose_answers_are_all_alike_has_no_trees(table: Outcomes, fresh: Outcomes) -> None:
    always = table.correct.clone()
    always[:, 2], always[:, 0] = True, False
    model = fit_trees(replace(table, quality=always), seed=0)
    assert not model.leaf[2].any() and not model.leaf[0].any() and model.leaf[1].any()
    p = model(fresh.signal)
    assert bool((p[:, 2] > 0.99).all()) and bool((p[:, 0] < 0.01).all())
    alike = fit_trees(replace(table, quality=torch.ones_like(always)), seed=0)
    assert alike.config()["trees"] == 0 and bool((alike(fresh.signal) > 0.99).all())


def test_tables_that_teach_nothing_are_refused(table: Outcomes) -> None:
    broken = table.signal.clone()
    broken[7, 2] = torch.nan
    with pytest.raises(ControlError, match="row 7"):
        fit_trees(replace(table, signal=broken), seed=0)
    with pytest.raises(ControlError, match="10 samples"):
        fit_trees(table.rows(torch.arange(10)), seed=0)


def test_what_is_missing_is_named(table: Outcomes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    with pytest.raises(ControlError, match=r"apportion\[trees\]"):
        fit_trees(table, seed=0)


def crooked(rows: int, *, seed: int) -> Outcomes:
    """Whether an input is easy is the sign of a product: no direction in the signal tells."""
    table = drawn(rows, seed=seed)
    easy = table.signal[:, 1] * table.signal[:, 2] > 0
    correct = torch.stack([easy, easy, torch.ones_like(easy)], 1)
    return replace(table, quality=correct, agree=correct)


def test_a_controller_on_trees_beats_every_mixture() -> None:
    table, fresh = crooked(1000, seed=0), crooked(2000, seed=2)

    def gain(model: Trees | Complexity) -> float:
        controller = Controller(model, fit_policy(table, model, seed=0, epochs=0)).requires_grad_(False)  # pyright: ignore[reportArgumentType]
        controller.cost.copy_(table.cost)
        controller.set_prices(table)
        return adaptive_gain(fresh, controller(fresh.signal, *controller.setting(budget=0.5)))[1]

    torch.manual_seed(0)
    blind = Complexity(features=5, rungs=RUNGS)
    torch.nn.init.zeros_(blind.outer.weight)
    assert gain(calibrated(fit_trees(table, seed=0), crooked(400, seed=1))) > 10.0
    assert gain(blind) <= 0.0
