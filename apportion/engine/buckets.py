"""Batch sizes and lengths of text are few and fixed: any number of samples is split into them."""

from __future__ import annotations

from collections.abc import Sequence

CALL_ROWS = 0.5
"""What calling a graph costs beside its rows, in rows: six blocks of width 96 took 3.2 ms at batch 1 and 2.2 ms a row at batch 8 and 32, on one CPU thread."""

SHORTEST = 32
"""Tokens below which no graph of its own is built: a call costs more than the padding."""


def lengths(longest: int) -> tuple[int, ...]:
    """Numbers of tokens for which graphs are built: each twice the one before, up to `longest`, so that less than half of a long text is padding."""
    found = []
    while SHORTEST << len(found) < longest:
        found.append(SHORTEST << len(found))
    return (*found, longest)


def split(count: int, buckets: Sequence[int], costs: Sequence[float] | None = None) -> list[int]:
    """The cheapest buckets that hold `count` samples, largest first; the last one may be partly padding.

    `costs` has one entry for each bucket in any unit (measured latency is best); without it a bucket costs its rows plus CALL_ROWS.
    A shortest path over the number of samples left: count x buckets steps.
    """
    prices = [size + CALL_ROWS for size in buckets] if costs is None else costs
    best, choice = [0.0], [0]
    for left in range(1, count + 1):
        # Ties go to the larger bucket: fewer calls.
        total, negative = min((price + best[max(0, left - size)], -size) for size, price in zip(buckets, prices, strict=True))
        best.append(total)
        choice.append(-negative)
    sizes = []
    while count > 0:
        sizes.append(choice[count])
        count -= choice[count]
    return sorted(sizes, reverse=True)
