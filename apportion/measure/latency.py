"""Milliseconds, always side by side: calls to be compared run in the same rounds, so that a drift of the machine hits all alike."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from apportion.errors import DataError, NoEffect, PlanError


@dataclass(frozen=True, slots=True)
class Timing:
    """Median and quartiles in milliseconds; `rounds_ms` keeps every round in order, for paired comparisons."""

    median_ms: float
    low_ms: float
    high_ms: float
    repeats: int
    rounds_ms: tuple[float, ...] = field(repr=False)

    @classmethod
    def of(cls, rounds_ms: Sequence[float]) -> Timing:
        """Raises DataError on an empty run or a time that is not finite and positive."""
        times = np.asarray(rounds_ms, dtype=np.float64)
        if not times.size or not np.isfinite(times).all() or (times <= 0).any():
            raise DataError(f"times {list(rounds_ms)[:5]}", wanted="at least one finite, positive time in ms", do="Measure again with more work in a call.")
        low, median, high = np.percentile(times, [25, 50, 75]).tolist()
        return cls(median, low, high, times.size, tuple(times.tolist()))


class Ratio(NamedTuple):
    """A ratio with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def _wait() -> None:
    """Accelerators run behind Python's back: without this only the launch would be timed."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def interleaved(calls: Mapping[str, Callable[[], Any]], *, repeats: int = 30, warmup: int = 3, min_seconds: float = 0.0, seed: int = 0) -> dict[str, Timing]:
    """Time every call once per round, in an order shuffled anew each round, for `repeats` rounds and at least `min_seconds`.

    The first `warmup` rounds are dropped. Raises PlanError on an empty mapping or numbers that make no sense.
    Not for throughput under load: one call runs at a time.
    """
    if not calls or repeats < 1 or warmup < 0 or min_seconds < 0:
        raise PlanError(
            f"{len(calls)} calls, {repeats} repeats, {warmup} warm-ups, {min_seconds} s", wanted="one call and one repeat at least", do="Give more."
        )
    names, shuffle = list(calls), random.Random(seed).shuffle
    rounds: dict[str, list[float]] = {name: [] for name in names}
    done, start = -warmup, time.perf_counter()
    while done < repeats or time.perf_counter() - start < min_seconds:
        if done == 0:
            start = time.perf_counter()
        shuffle(names)
        for name in names:
            _wait()
            begin = time.perf_counter_ns()
            calls[name]()
            _wait()
            elapsed = time.perf_counter_ns() - begin
            if done >= 0:
                rounds[name].append(elapsed / 1e6)
        done += 1
    return {name: Timing.of(rounds[name]) for name in calls}


def ratio(a: Timing, b: Timing, *, seed: int = 0, repeats: int = 2000) -> Ratio:
    """Median over rounds of time a / time b, with a percentile bootstrap over rounds. Raises DataError where the two did not share their rounds."""
    if a.repeats != b.repeats:
        raise DataError(f"{a.repeats} rounds against {b.repeats}", wanted="timings of one interleaved run", do="Measure both in the same call of interleaved.")
    each = np.asarray(a.rounds_ms) / np.asarray(b.rounds_ms)
    drawn = np.random.default_rng(seed).integers(0, each.size, (repeats, each.size))
    low, high = np.percentile(np.median(each[drawn], axis=1), [2.5, 97.5]).tolist()
    return Ratio(float(np.median(each)), low, high)


def realisation_ratio(time_full: float, time_path: float, macs_full: float, macs_path: float) -> float:
    """Share of the saved multiply-adds that shows up as saved time, (1 - t/t0) / (1 - F/F0); 1 is all of it, below 0 is slower than full.

    Raises DataError on amounts that are not positive, NoEffect where no MACs were saved.
    """
    if min(time_full, time_path, macs_full, macs_path) <= 0:
        raise DataError(f"times {time_full}, {time_path} and MACs {macs_full}, {macs_path}", wanted="positive amounts", do="Measure both paths.")
    if macs_path >= macs_full:
        raise NoEffect(f"{macs_path} MACs against {macs_full} at full", wanted="a path that saves some", do="Leave this path out of the comparison.")
    return (1 - time_path / time_full) / (1 - macs_path / macs_full)
