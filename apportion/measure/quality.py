"""How sure an accuracy is, and how sure a difference between two models on the same samples."""

from __future__ import annotations

import math
from itertools import accumulate
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from apportion.errors import DataError


class Interval(NamedTuple):
    """Both ends, in the unit of what they enclose."""

    low: float
    high: float


class Drop(NamedTuple):
    """Accuracy lost against the full path, in percentage points, with its 95 % interval; negative is a gain."""

    points: float
    low: float
    high: float


def wilson(correct: int, n: int, *, confidence: float = 0.95) -> Interval:
    """Score interval of a share `correct / n`, both ends in 0..1.

    Wilson, 1927 (JASA 22). Good also near 0 and 1, where the normal interval leaves the range. Raises DataError on counts that make no sense.
    """
    if not 0 <= correct <= n or n < 1 or not 0 < confidence < 1:
        raise DataError(f"{correct} correct of {n} at confidence {confidence}", wanted="0 <= correct <= n, n > 0, 0 < confidence < 1", do="Check the counts.")
    z, share = NormalDist().inv_cdf((1 + confidence) / 2), correct / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Interval(centre - half if correct else 0.0, centre + half if correct < n else 1.0)  # rounding must not move an end off 0 or 1


def mean_interval(quality: ArrayLike) -> Interval:
    """95 % interval of a mean of numbers between 0 and 1, (n,): Wilson's where all are 0 or 1, else the normal one, which wants some dozens of rows."""
    values = np.asarray(quality, np.float64)
    if values.ndim != 1 or not values.size or not ((values >= 0) & (values <= 1)).all():
        raise DataError(f"values {values.shape}", wanted="a column of numbers from 0 to 1", do="Judge every sample.")
    if ((values == 0) | (values == 1)).all():
        return wilson(int(values.sum()), values.size)
    half = NormalDist().inv_cdf(0.975) * float(values.std(ddof=1)) / math.sqrt(values.size) if values.size > 1 else 1.0
    return Interval(max(0.0, float(values.mean()) - half), min(1.0, float(values.mean()) + half))


def _disagreements(full_correct: ArrayLike, ours_correct: ArrayLike) -> tuple[int, int, int]:
    """Samples that only the full path gets right, that only ours does, and all. Raises DataError on columns that do not pair up."""
    full, ours = np.asarray(full_correct), np.asarray(ours_correct)
    if full.ndim != 1 or full.shape != ours.shape or not full.size or full.dtype != np.bool_ or ours.dtype != np.bool_:
        raise DataError(
            f"{full.dtype} {full.shape} against {ours.dtype} {ours.shape}", wanted="two bool columns over the same samples", do="Answer the same samples."
        )
    return int((full & ~ours).sum()), int((ours & ~full).sum()), full.size


def paired_drop(full_correct: ArrayLike, ours_correct: ArrayLike, *, seed: int = 0, repeats: int = 2000) -> Drop:
    """Percentage points of accuracy lost, with a 95 % percentile bootstrap over samples (Efron, 1979, Annals of Statistics 7).

    Resampling n pairs with replacement draws only how many of each kind come up, hence one multinomial per repeat: O(repeats), whatever n.
    Not a guarantee: see the risk control of the deciding side for a bound that holds at a stated confidence. Columns of bool; or of numbers from 0 to 1, of
    which the pairs themselves are drawn again: O(repeats n).
    """
    if np.asarray(full_correct).dtype != np.bool_:
        return _mean_drop(np.asarray(full_correct, np.float64), np.asarray(ours_correct, np.float64), seed, repeats)
    lost, won, n = _disagreements(full_correct, ours_correct)
    drawn = np.random.default_rng(seed).multinomial(n, [lost / n, won / n, (n - lost - won) / n], size=repeats)
    low, high = (100 * np.percentile(drawn[:, 0] - drawn[:, 1], [2.5, 97.5]) / n).tolist()
    return Drop(100 * (lost - won) / n, low, high)


def _mean_drop(full: np.ndarray, ours: np.ndarray, seed: int, repeats: int) -> Drop:
    if full.ndim != 1 or full.shape != ours.shape or not full.size or not ((full >= 0) & (full <= 1) & (ours >= 0) & (ours <= 1)).all():
        found = f"{full.dtype} {full.shape} against {ours.dtype} {ours.shape}"
        raise DataError(found, wanted="two columns over the same samples, of bool or of numbers from 0 to 1", do="Answer the same samples.")
    lost, generator = 100 * (full - ours), np.random.default_rng(seed)
    drawn = [lost[generator.integers(0, lost.size, lost.size)].mean() for _ in range(repeats)]
    low, high = np.percentile(drawn, [2.5, 97.5]).tolist()
    return Drop(float(lost.mean()), low, high)


def mcnemar(full_correct: ArrayLike, ours_correct: ArrayLike) -> float:
    """Two-sided exact p that both are equally often right (McNemar, 1947, Psychometrika 12): a fair coin over the samples where they differ."""
    lost, won, _ = _disagreements(full_correct, ours_correct)
    n, fewer = lost + won, min(lost, won)
    ways = accumulate(range(fewer), lambda choose, k: choose * (n - k) // (k + 1), initial=1)
    return min(1.0, 2 * sum(ways) / 2**n)
