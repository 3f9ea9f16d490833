"""Unfamiliar signals and drifting choices: scikit-learn and a plain loop as oracles, planted shifts, and false alarms counted."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.covariance import LedoitWolf
from torch import Tensor

from apportion.control import drift
from apportion.control.drift import Alarm, Familiar, fit_familiar, guarded, ledoit_wolf
from apportion.errors import ControlError
from apportion.measure.macs import executed_macs

FEATURES = 120
USUAL = torch.tensor([0.3, 0.25, 0.2, 0.15, 0.1])


def signals(rows: int, *, seed: int, features: int = FEATURES) -> Tensor:
    """Correlated features of very different scales, with heavy tails, one of them constant."""
    generator, mixing = torch.Generator().manual_seed(seed), torch.randn(features, features, generator=torch.Generator().manual_seed(99))
    scale = torch.logspace(-3, 2, features)
    tails = 1 + torch.rand(rows, 1, generator=generator)
    signal = 5 + torch.randn(rows, features, generator=generator) * tails @ mixing * scale
    signal[:, 0] = 7.0
    return signal


def fitted(rows: int, *, seed: int = 0) -> Familiar:
    order = torch.arange(rows)
    return fit_familiar(signals(rows, seed=seed), fit_rows=order[: rows // 2], calibrate_rows=order[rows // 2 :])


def drawn(share: Tensor, rows: int, *, seed: int) -> Tensor:
    return torch.multinomial(share, rows, True, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("rows", "features"), [(30, 80), (400, 20), (50, 1)])
def test_shrinkage_is_ledoit_and_wolfs(rows: int, features: int) -> None:
    generator = torch.Generator().manual_seed(0)
    values = (torch.randn(rows, features, generator=generator) @ torch.randn(features, features, generator=generator)).double()
    values = values - values.mean(0)
    oracle = LedoitWolf(assume_centered=True).fit(values.numpy())
    covariance, shrink = ledoit_wolf(values)
    assert shrink == pytest.approx(oracle.shrinkage_, abs=1e-10)
    assert np.allclose(covariance.numpy(), oracle.covariance_)


def test_score_is_the_mahalanobis_distance() -> None:
    signal, rows = signals(500, seed=0, features=12)[:, 1:], torch.arange(500)
    familiar = fit_familiar(signal, fit_rows=rows[:250], calibrate_rows=rows[250:])
    part = signal[:250].double()
    mean, std = part.mean(0), part.std(0)
    covariance = torch.from_numpy(LedoitWolf(assume_centered=True).fit(((part - mean) / std).numpy()).covariance_) * std[:, None] * std
    away = signal[:40].double() - mean
    naive = torch.stack([row @ torch.linalg.solve(covariance, row) for row in away]) / 11
    assert torch.allclose(familiar(signal[:40]).double(), naive, rtol=1e-3)


def test_the_stated_share_of_familiar_samples_passes_the_threshold() -> None:
    """Also in 120 dimensions with 300 rows to fit on; a threshold from the fitted rows themselves lets far more pass."""
    fresh = signals(8000, seed=7)
    over = [float((familiar(fresh) > familiar.threshold).double().mean()) for familiar in (fitted(600, seed=seed) for seed in range(5))]
    assert sum(over) / 5 < 0.0075
    own = fitted(600)
    careless = own(signals(600, seed=0)[:300]).quantile(0.995)
    assert float((own(fresh) > careless).double().mean()) > 0.02


def test_what_is_strange_is_over_and_a_constant_that_moves_is_strange() -> None:
    familiar, fresh = fitted(600), signals(500, seed=8)
    moved = fresh + 4 * fresh.std(0) * torch.randn(FEATURES, generator=torch.Generator().manual_seed(0)).sign()
    assert bool((familiar(moved) > familiar.threshold).double().mean() > 0.95)
    fresh[:, 0] += 0.5
    assert bool((familiar(fresh) > familiar.threshold).all())


def test_a_score_depends_on_the_sample_alone_and_survives_saving() -> None:
    familiar, fresh = fitted(600), signals(200, seed=8)
    alone = torch.cat([familiar(row) for row in fresh.split(1)])
    assert torch.allclose(familiar(torch.cat([1e3 * signals(50, seed=3), fresh]))[50:], alone, rtol=1e-4)
    again = Familiar(features=FEATURES)
    assert not torch.equal(again(fresh), familiar(fresh)) and not list(again.parameters())
    again.load_state_dict({name: value.clone() for name, value in familiar.state_dict().items()}, strict=True)
    assert torch.equal(again(fresh), familiar(fresh)) and torch.equal(again.threshold, familiar.threshold)


def test_macs_are_what_runs() -> None:
    familiar, signal = fitted(600), signals(1, seed=0)
    assert executed_macs(lambda: familiar(signal)) == familiar.macs == FEATURES**2


def test_the_guard_sends_strange_samples_to_the_dearest_rung_within_the_cap() -> None:
    cost, choice = torch.tensor([0.2, 0.5, 0.6, 1.0]), torch.tensor([0, 1, 2, 3, 0])
    score = torch.tensor([0.9, 1.0, 1.1, 1.2, math.nan])
    threshold = torch.tensor(1.0)
    assert guarded(choice, score, threshold, cost=cost, cap=torch.tensor(math.inf)).tolist() == [0, 1, 3, 3, 3]
    assert guarded(choice[:3], score[[0, 2, 4]], threshold, cost=cost, cap=cost[2]).tolist() == [0, 2, 2]
    assert guarded(choice[:1], score[4:], threshold, cost=cost, cap=cost[0]).tolist() == [0]


def test_tables_that_no_threshold_can_be_learned_from_are_refused() -> None:
    signal, rows = signals(600, seed=0), torch.arange(600)
    with pytest.raises(ControlError, match="row 290 in both"):
        fit_familiar(signal, fit_rows=rows[:300], calibrate_rows=rows[290:])
    with pytest.raises(ControlError, match="150 to calibrate"):
        fit_familiar(signal, fit_rows=rows[:300], calibrate_rows=rows[450:])
    with pytest.raises(ControlError, match=r"quantile of 1\.0"):
        fit_familiar(signal, fit_rows=rows[:300], calibrate_rows=rows[300:], quantile=1.0)
    signal[17, 3] = math.nan
    with pytest.raises(ControlError, match="row 17"):
        fit_familiar(signal, fit_rows=rows[:300], calibrate_rows=rows[300:])


def naive_alarm(calibrated: Tensor, stream: Tensor, *, seed: int) -> list[float]:
    """The evidence after each choice, one at a time, by the definitions."""
    before, bins = calibrated.tolist(), []
    draws = np.random.Generator(np.random.PCG64(seed)).random(len(stream))
    sums, told = [0.0] * len(drift.WINDOWS), []
    for rung, draw in zip(stream.tolist(), draws, strict=True):
        before.append(rung)
        rank = (sum(other < rung for other in before) + draw * before.count(rung)) / len(before)
        place = min(int(rank * drift.BINS), drift.BINS - 1)
        for i, window in enumerate(drift.WINDOWS):
            recent = bins[-window:]
            bet = drift.BINS * (recent.count(place) + drift.PRIOR) / (len(recent) + drift.BINS * drift.PRIOR)
            sums[i] = (sums[i] + 1) * bet
        bins.append(place)
        told.append(sum(sums) / len(sums))
    return told


def test_the_alarm_is_its_definition_however_the_stream_is_cut() -> None:
    calibrated, stream = drawn(USUAL, 100, seed=0), torch.cat([drawn(USUAL, 500, seed=1), drawn(USUAL.flip(0), 200, seed=2)])
    told, alarm = naive_alarm(calibrated, stream, seed=5), Alarm.start(calibrated, rungs=5, run_length=100_000, seed=5)
    whole, first = alarm.after(stream), next(i + 1 for i, level in enumerate(told) if level >= 100_000)
    for piece in (*stream[:600].split([1, 0, 299, 300]), stream[600:]):
        alarm = alarm.after(piece)
        assert not alarm.count or alarm.level == pytest.approx(told[alarm.count - 1] / 100_000)
    assert whole.raised_at == alarm.raised_at == first and first > 500
    assert whole.level == pytest.approx(alarm.level) and torch.equal(whole.seen, alarm.seen)


def false_alarms(runs: int, choices: int, run_length: float) -> float:
    """Share of streams without drift that ring, each with a small calibration of its own."""
    rung = 0
    for seed in range(runs):
        both = drawn(USUAL, 100 + choices, seed=seed)
        rung += Alarm.start(both[:100], rungs=5, run_length=run_length, seed=seed).after(both[100:]).raised_at is not None
    return rung / runs


def test_false_alarms_stay_within_the_bound() -> None:
    assert 0 < false_alarms(100, 500, 2500) <= 0.2


@pytest.mark.slow
def test_false_alarms_over_a_thousand_runs_stay_within_the_bound() -> None:
    assert 0 < false_alarms(1000, 1000, 20_000) <= 0.05


def test_a_calibration_that_later_choices_do_not_join_would_ring_too_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: one row of the calibration is weighed as ten, as if its histogram were known better than it is."""
    honest = drift._counts
    monkeypatch.setattr(drift, "_counts", lambda choice, rungs: honest(choice, rungs) * (10 if len(choice) == 100 else 1))
    assert false_alarms(60, 500, 2500) > 0.2


def delays(share: Tensor, *, calibrated: int, runs: int = 10) -> list[int]:
    found = []
    for seed in range(runs):
        alarm = Alarm.start(drawn(USUAL, calibrated, seed=seed), rungs=5, seed=seed).after(drawn(USUAL, 1000, seed=seed + 100))
        alarm = alarm.after(drawn(share, 2000, seed=seed + 200))
        assert alarm.raised_at is not None and alarm.raised_at > 1000
        found.append(alarm.raised_at - 1000)
    return sorted(found)


def test_planted_shifts_are_found() -> None:
    assert delays(torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0]), calibrated=500)[-1] <= 40
    assert delays(USUAL.flip(0), calibrated=500)[-1] <= 200


def test_an_alarm_keeps_ringing_and_unusable_input_is_refused() -> None:
    alarm = Alarm.start(drawn(USUAL, 200, seed=0), rungs=5, run_length=1000).after(torch.full((60,), 4))
    assert alarm.raised_at is not None
    assert alarm.after(drawn(USUAL, 3000, seed=1)).raised_at == alarm.raised_at
    with pytest.raises(ControlError, match="rungs 0 to 4"):
        alarm.after(torch.tensor([5]))
    with pytest.raises(ControlError, match="10 calibration choices"):
        Alarm.start(drawn(USUAL, 10, seed=0), rungs=5)
    with pytest.raises(ControlError, match="run length of 1"):
        Alarm.start(drawn(USUAL, 100, seed=0), rungs=5, run_length=1)
