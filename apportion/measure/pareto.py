"""Which paths are worth having: the non-dominated ones, and the envelope that random mixing of them reaches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from apportion.errors import DataError


def pareto(cost: Sequence[float], quality: Sequence[float]) -> list[int]:
    """Indices, cheapest first, of points that no other point matches in quality at the same cost or less. Of equal points the first stays. O(n log n).

    Raises DataError on lists that are empty, of different lengths, or not finite.
    """
    if len(cost) != len(quality) or not len(cost) or not (np.isfinite(cost).all() and np.isfinite(quality).all()):
        raise DataError(f"{len(cost)} costs and {len(quality)} qualities", wanted="equally many finite numbers, at least one", do="Measure every path.")
    kept: list[int] = []
    for index in sorted(range(len(cost)), key=lambda i: (cost[i], -quality[i], i)):
        if not kept or quality[index] > quality[kept[-1]]:
            kept.append(index)
    return kept


def hull(cost: Sequence[float], quality: Sequence[float]) -> list[tuple[float, float]]:
    """Corners (cost, quality), cheapest first, of the least concave rising curve above all points.

    It is what a coin between two static paths reaches on average, whatever the input: an adaptive model has to beat it, not the points.
    Upper chain after Andrew, 1979 (Information Processing Letters 9). Raises DataError as `pareto` does.
    """
    chain: list[tuple[float, float]] = []
    for x, y in ((float(cost[i]), float(quality[i])) for i in pareto(cost, quality)):
        while len(chain) > 1 and (chain[-1][0] - chain[-2][0]) * (y - chain[-2][1]) >= (chain[-1][1] - chain[-2][1]) * (x - chain[-2][0]):
            chain.pop()
        chain.append((x, y))
    return chain
