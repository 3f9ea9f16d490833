"""Latency, quality, Pareto and doctor against definitions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from apportion.errors import DataError, NoEffect, PlanError
from apportion.measure.doctor import advice, device, fingerprint
from apportion.measure.latency import Timing, interleaved, ratio, realisation_ratio
from apportion.measure.pareto import hull, pareto
from apportion.measure.quality import mcnemar, paired_drop, wilson


def test_every_call_runs_once_a_round_in_shuffled_order():
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    timings = interleaved(calls, repeats=8, warmup=2, seed=3)
    rounds = [tuple(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert len(rounds) == 10 and all(sorted(each) == ["a", "b", "c"] for each in rounds) and len(set(rounds)) > 2
    assert list(timings) == ["a", "b", "c"] and all(t.repeats == 8 and t.low_ms <= t.median_ms <= t.high_ms for t in timings.values())
    again = order.copy()
    order.clear()
    interleaved(calls, repeats=8, warmup=2, seed=3)
    assert order == again


def test_min_seconds_adds_rounds():
    assert interleaved({"a": lambda: None}, repeats=1, min_seconds=0.02)["a"].repeats > 5


@pytest.mark.parametrize("options", [{"repeats": 0}, {"warmup": -1}, {"min_seconds": -1.0}])
def test_senseless_timing_is_refused(options):
    with pytest.raises(PlanError):
        interleaved({"a": lambda: None}, **options)


def test_ratio_is_paired():
    drift = np.linspace(1, 5, 41)  # a machine that slows down: each round has the same ratio all the same
    value = ratio(Timing.of(tuple(drift)), Timing.of(tuple(2 * drift)))
    assert value == (0.5, 0.5, 0.5)
    noisy = ratio(Timing.of(tuple(np.random.default_rng(0).uniform(1, 2, 50))), Timing.of((1.0,) * 50))
    assert noisy.low < noisy.value < noisy.high
    with pytest.raises(DataError, match="rounds"):
        ratio(Timing.of((1.0,)), Timing.of((1.0, 2.0)))


@pytest.mark.parametrize("times", [(), (1.0, math.nan), (0.0,)])
def test_senseless_times_are_refused(times):
    with pytest.raises(DataError):
        Timing.of(times)


def test_realisation_ratio():
    assert realisation_ratio(10, 5, 4, 2) == 1
    assert realisation_ratio(10, 8, 4, 2) == pytest.approx(0.4)
    assert realisation_ratio(10, 12, 4, 2) < 0
    with pytest.raises(NoEffect):
        realisation_ratio(10, 5, 4, 4)
    with pytest.raises(DataError):
        realisation_ratio(0, 5, 4, 2)


def test_wilson_solves_its_equation():
    for correct, n in ((0, 10), (3, 10), (10, 10), (4071, 5000)):
        for end in wilson(correct, n):
            if 0 < end < 1:
                assert abs(correct / n - end) == pytest.approx(1.959963985 * math.sqrt(end * (1 - end) / n), rel=1e-6)
    assert wilson(0, 10).low == 0 and wilson(10, 10).high == 1
    with pytest.raises(DataError):
        wilson(11, 10)


def test_paired_drop_agrees_with_resampling_rows():
    rng = np.random.default_rng(0)
    full = rng.random(400) < 0.8
    ours = np.where(rng.random(400) < 0.1, ~full, full)
    drop = paired_drop(full, ours, repeats=4000)
    rows = rng.integers(0, 400, (4000, 400))
    naive = 100 * (full.astype(float) - ours)[rows].mean(1)
    assert drop.points == pytest.approx(100 * (full.mean() - ours.mean()))
    assert (drop.low, drop.high) == pytest.approx(tuple(np.percentile(naive, [2.5, 97.5])), abs=0.35)
    assert paired_drop(full, full) == (0, 0, 0)
    assert paired_drop(torch.from_numpy(full), torch.from_numpy(ours), repeats=4000) == drop
    with pytest.raises(DataError):
        paired_drop(full, ours[:-1])
    with pytest.raises(DataError, match="float"):
        paired_drop(full * 1.5, ours * 1.0)
    halved = paired_drop(full * 0.5, ours * 0.5)
    assert halved.points == pytest.approx(drop.points / 2) and (halved.low, halved.high) == pytest.approx((drop.low / 2, drop.high / 2), abs=0.35)


def test_mcnemar_by_enumeration():
    for lost, won in itertools.product(range(6), repeat=2):
        full = np.array([True] * lost + [False] * won + [True] * 4)
        ours = np.array([False] * lost + [True] * won + [True] * 4)
        coins = list(itertools.product((0, 1), repeat=lost + won))
        as_far = sum(abs(2 * sum(c) - lost - won) >= abs(lost - won) for c in coins) / len(coins)
        assert mcnemar(full, ours) == pytest.approx(as_far)
    assert 0 < mcnemar(np.arange(20000) < 10500, np.arange(20000) >= 10500) < 1e-10


def test_pareto_and_hull_by_definition():
    rng = np.random.default_rng(1)
    cost, quality = rng.integers(0, 12, 40).astype(float), rng.integers(0, 12, 40).astype(float)
    pairs = list(zip(cost, quality, strict=True))

    def beaten(i: int) -> bool:
        return any((c <= cost[i] and q >= quality[i]) and ((c, q) != pairs[i] or j < i) for j, (c, q) in enumerate(pairs) if j != i)

    kept = pareto(cost.tolist(), quality.tolist())
    assert sorted(kept) == [i for i in range(40) if not beaten(i)]
    assert [cost[i] for i in kept] == sorted(cost[i] for i in kept)
    corners = hull(cost.tolist(), quality.tolist())
    xs, ys = zip(*corners, strict=True)
    assert all(np.interp(c, xs, ys) >= q - 1e-12 for c, q in pairs) and set(corners) <= set(pairs)
    slopes = np.diff(ys) / np.diff(xs)
    assert (np.diff(slopes) < 0).all() and (slopes > 0).all()
    assert hull([1, 2, 3], [0, 1, 2]) == [(1, 0), (3, 2)]
    for bad in (([], []), ([1.0], [1.0, 2.0]), ([math.nan], [1.0])):
        with pytest.raises(DataError):
            pareto(*bad)


def test_doctor_tells_what_is_here():
    facts = device()
    assert facts["fingerprint"] == fingerprint() and len(fingerprint()) == 12
    assert facts["threads"] == torch.get_num_threads() and set(facts["matmul_gflops"]) == {"float32", "bfloat16"}
    assert min(facts["matmul_gflops"].values()) > 0 and facts["cpu"]
    quick = max(facts["matmul_gflops"], key=facts["matmul_gflops"].get)
    assert facts["advice"][0].startswith(f"Run in {quick}")


def test_advice_follows_the_facts():
    said = advice({"matmul_gflops": {"float32": 100.0, "bfloat16": 300.0}, "measured_on": "cpu", "threads": 1, "cores": 4})
    assert "bfloat16: its products are 3.0 times" in said[0] and "1 of 4 cores" in said[1]
    assert len(advice({"matmul_gflops": {"float32": 100.0, "bfloat16": 300.0}, "measured_on": "cuda", "threads": 1, "cores": 4})) == 1
