"""Times of paths that were never measured, from those that were."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from apportion.errors import DataError, EngineError
from apportion.measure.forecast import TERMS, Forecast, fit, forecast, spread, work
from apportion.network import Architecture, Network, put
from apportion.vocab import Choice, Path

torch.set_num_threads(1)


def network() -> Network:
    torch.manual_seed(0)
    made = Network(Architecture(image_size=32, patch=4, dim=32, depth=6, heads=4, hidden=64, classes=5)).eval()
    for slot, name in (("reducer", "tome"), ("ffn", "matformer"), ("mixer", "head_prefix"), ("depth", "skip")):
        put(made, Choice(slot, name))
    return made


def paths(of: Network) -> list[Path]:
    space = of.space
    exits = [space.path(blocks=range(depth)) for depth in range(1, 6)]
    narrow = [space.path(width=width, heads=heads) for width in space.width for heads in space.heads]
    merged = [space.path(tokens=space.merging(rate, start=1)) for rate in (2, 5, 9)]
    return [*exits, *merged, *narrow]


TRUE = np.array([0.3, 0.05, 0.02, 0.03, 0.5, 0.4, 0.1, 0.02])


def test_known_times_are_found_again_and_what_was_left_out_is_foretold() -> None:
    of, generator = network(), np.random.default_rng(0)
    every = paths(of)
    noisy = {(path, b): float(work(of, path, b) @ TRUE) * generator.normal(1, 0.02) for path in spread(of, every, 10) for b in (1, 8)}
    found = fit(of, noisy, backend="made up")
    errors = [abs(found.ms(of, path, b) / float(work(of, path, b) @ TRUE) - 1) for path in every for b in (1, 4, 16)]
    assert np.median(errors) < 0.03 and max(errors) < 0.15
    assert 0 < found.error < 0.05 and found.error <= found.worst and found.points == 20
    exact = fit(of, {(path, b): float(work(of, path, b) @ TRUE) for path in every for b in (1, 3, 8)}, backend="made up")
    assert exact.worst < 1e-6


def test_work_adds_up_to_the_multiply_adds() -> None:
    of = network()
    for path in paths(of):
        terms = dict(zip(TERMS, work(of, path, 3), strict=True))
        assert terms["products"] + terms["attention"] + terms["matching"] == pytest.approx(3 * of.macs(path) / 1e6)
        assert terms["blocks"] == len(path.blocks) and terms["call"] == 1 and min(terms.values()) >= 0
    assert dict(zip(TERMS, work(of, of.space.path(tokens=of.space.merging(5, start=1)), 1), strict=True))["cuts"] == 5


def test_attention_meets_the_tokens_that_the_step_before_left() -> None:
    of = network()
    schedule = of.space.merging(9, start=1)
    found = dict(zip(TERMS, work(of, of.space.path(tokens=schedule), 2), strict=True))
    seen = (of.space.tokens, *schedule[:-1])
    assert found["attention"] == pytest.approx(2 * sum(2 * n * n * 32 for n in seen) / 1e6)
    assert found["rows"] == pytest.approx(2 * sum(before + after for before, after in zip(seen, schedule, strict=True)) * 32 / 1e6)
    assert found["activations"] == pytest.approx(2 * sum(schedule) * 64 / 1e6)


def test_more_work_never_takes_less() -> None:
    of = network()
    every = paths(of)
    generator = np.random.default_rng(1)
    wild = fit(of, {(path, b): float(generator.uniform(1, 3)) for path in every for b in (1, 8)}, backend="made up")
    assert min(wild.weights) >= 0 and wild.worst > 0.2  # it says of itself that it knows nothing


def test_spread_takes_both_ends_and_no_path_twice() -> None:
    of = network()
    every = paths(of)
    chosen = spread(of, every, 6)
    assert chosen[:2] == [every[0], every[-1]] and len(set(chosen)) == 6
    assert set(spread(of, every, 99)) <= set(every)


def test_measured_for_real_on_eager_calls() -> None:
    of = network()
    found = forecast(of, paths(of), torch.zeros(1, 3, 32, 32), build=lambda module, _: module, backend="eager", batches=(1, 16), count=4, repeats=3)
    assert found.points == 8 and found.ms(of, of.space.full, 16) > found.ms(of, of.space.path(blocks=(0,)), 1) > 0


def test_another_device_is_refused_and_files_come_back() -> None:
    of = network()
    found = fit(of, {(path, 1): 1.0 + len(path.blocks) for path in paths(of)}, backend="eager")
    assert Forecast.from_dict(found.to_dict()) == found
    with pytest.raises(EngineError, match="Measure again here"):
        replace(found, fingerprint="0" * 12).ms(of, of.space.full, 1)
    with pytest.raises(DataError, match="Measure again"):
        Forecast.from_dict({**found.to_dict(), "weights": {"call": 1.0}})
    with pytest.raises(DataError, match="at least three"):
        fit(of, {(of.space.full, 1): 1.0}, backend="eager")
