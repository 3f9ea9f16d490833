"""Batch sizes and lengths of text are few and fixed: any number of samples is split into them, and which they are follows from what was asked before."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from apportion.errors import EngineError

CALL_ROWS = 0.5
"""What calling a graph costs beside its rows, in rows: six blocks of width 96 took 3.2 ms at batch 1 and 2.2 ms a row at batch 8 and 32, on one CPU thread."""

SHORTEST = 32
"""Tokens below which no graph of its own is built: a call costs more than the padding."""

MOST_SETS = 1_000_000  # of buckets that are tried
AT_ONCE = 1 << 14  # sets


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


def choose(traffic: Mapping[int, float], *, at_most: int, costs: Mapping[int, float] | None = None) -> tuple[int, ...]:
    """The batch sizes, `at_most` of them, at which groups as they came would have cost least, each group split as `split` does it.

    `traffic`: size of a group -> how often it came (`Engine.traffic`). `costs`: what a graph costs at each size that may be built, in any unit (measured
    latency is best); without it rows plus CALL_ROWS, at every size up to 16 and eight in each doubling from there. Every set of these is tried, so there is no
    better one among them; sizes that no group would use are left out. Cost: sets x largest group steps; for groups of up to 64
    0.04 s for three sizes and 0.2 s for four, of up to 256 0.6 s and 7 s, on one CPU thread.
    Raises EngineError for traffic without a group, numbers that make no sense, and for more sets than can be tried.
    """
    largest = _largest(traffic, at_most)
    prices = {size: size + CALL_ROWS for size in offered(largest)} if costs is None else dict(costs)
    _check(prices)
    count = min(at_most, len(prices))
    if (sets := math.comb(len(prices), count)) > MOST_SETS:
        raise EngineError(f"{sets} sets of {count} among {len(prices)} sizes", wanted=f"at most {MOST_SETS}", do="Give costs for fewer sizes.")
    tried = torch.combinations(torch.tensor(sorted(prices)), count)
    totals = torch.cat([_totals(some, prices, traffic, largest) for some in tried.split(AT_ONCE)])
    best = tried[totals.argmin()].tolist()
    used = {size for group, often in traffic.items() if often for size in split(group, best, [prices[size] for size in best])}
    return tuple(sorted(used))


def expected(traffic: Mapping[int, float], buckets: Sequence[int], costs: Mapping[int, float] | None = None) -> float:
    """What a group costs in the mean over the traffic when it is split among these buckets; units and errors as in `choose`."""
    largest = _largest(traffic, len(buckets))
    prices = {size: size + CALL_ROWS for size in buckets} if costs is None else {size: costs[size] for size in buckets}
    _check(prices)
    return float(_totals(torch.tensor([list(buckets)]), prices, traffic, largest)) / sum(traffic.values())


def choose_lengths(tokens: Mapping[int, float], *, at_most: int, longest: int, costs: Mapping[int, float] | None = None) -> tuple[int, ...]:
    """The lengths, `at_most` of them and `longest` the last, at which texts cost least, each padded to the shortest that holds it.

    `tokens`: length of a text -> how many have it. `costs`: what a text costs at each length that may be built (multiply-adds, or measured time); without it
    its tokens, at every length that was seen. The best there is among these: a length serves a stretch of texts, so the best for all texts up to it
    is the best for those up to the length before, and this one (dynamic programme, lengths squared x `at_most` steps).
    Calls are not priced: the fewer texts come together, the fewer lengths are worth their graphs.
    Raises EngineError as `choose`, and for a text above `longest`.
    """
    if _largest(tokens, at_most) > longest:
        raise EngineError(f"a text of {max(tokens)} tokens", wanted=f"at most {longest}", do="Cut the texts to the network's length.")
    prices = dict.fromkeys(sorted({*tokens, longest}), 0.0) if costs is None else dict(sorted(costs.items()))
    prices = {size: float(size) for size in prices} if costs is None else prices
    _check(prices)
    if max(prices) != longest:
        raise EngineError(f"costs up to {max(prices)} tokens", wanted=f"costs up to {longest}", do="Give the cost of the longest as well.")
    sizes, price = [0, *prices], torch.tensor([0.0, *prices.values()], dtype=torch.float64)
    held = torch.tensor([sum(often for size, often in tokens.items() if size <= most) for most in sizes], dtype=torch.float64)
    # From length j to the next one i: all texts between them are padded to i.
    stretch = ((held - held[:, None]) * price).masked_fill(torch.ones(len(sizes), len(sizes)).tril().bool(), math.inf)
    best, steps, totals = torch.full_like(price, math.inf).index_fill_(0, torch.tensor(0), 0.0), [], []
    for _ in range(min(at_most, len(prices))):
        best, before = (best[:, None] + stretch).min(0)
        steps.append(before.tolist())
        totals.append(float(best[-1]))
    place, chosen = len(sizes) - 1, []
    for before in reversed(steps[: totals.index(min(totals)) + 1]):  # fewer lengths where more would not help
        chosen.append(sizes[place])
        place = before[place]
    return tuple(reversed(chosen))


def _totals(sets: torch.Tensor, prices: Mapping[int, float], traffic: Mapping[int, float], largest: int) -> torch.Tensor:
    """What all groups cost together for each set of sizes (sets, count): the cheapest cover of every number of samples, all sets at once."""
    price = torch.zeros(max(prices) + 1, dtype=torch.float64)
    price[torch.tensor(list(prices))] = torch.tensor(list(prices.values()), dtype=torch.float64)
    each, cover = price[sets], torch.zeros(len(sets), largest + 1, dtype=torch.float64)
    for group in range(1, largest + 1):
        cover[:, group] = (each + cover.gather(1, (group - sets).clamp_min(0))).amin(1)
    return cover[:, list(traffic)] @ torch.tensor(list(traffic.values()), dtype=torch.float64)


def offered(largest: int) -> list[int]:
    """Sizes an eighth apart or less, up to the largest group."""
    return sorted({size for size in range(1, largest) if size % (1 << max(0, (size - 1).bit_length() - 4)) == 0} | {largest})


def _largest(traffic: Mapping[int, float], at_most: int) -> int:
    if not traffic or min(traffic) < 1 or min(traffic.values()) < 0 or not math.isfinite(sum(traffic.values())) or not sum(traffic.values()) or at_most < 1:
        found = f"traffic of {dict(list(traffic.items())[:5])} for at most {at_most} sizes"
        raise EngineError(found, wanted="groups of one or more, how often each came, and a size at least", do="Count some traffic first.")
    return max(traffic)


def _check(prices: Mapping[int, float]) -> None:
    if not prices or min(prices) < 1 or not all(math.isfinite(price) and price > 0 for price in prices.values()):
        raise EngineError(f"costs {dict(list(prices.items())[:5])}", wanted="a finite positive cost for each size from 1", do="Measure each.")
