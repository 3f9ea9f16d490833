"""Never slower: which rungs are faster than the dense network on the device at hand, and which are therefore not served."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from apportion.errors import EngineError


@dataclass(frozen=True, slots=True)
class Dropped:
    """A rung that is not served, and its time over the dense network's at every bucket where that is too much."""

    rung: int
    ratios: Mapping[int, float]

    @property
    def reason(self) -> str:
        return f"rung {self.rung} takes " + ", ".join(f"{ratio:.3f} of the dense time at batch {bucket}" for bucket, ratio in self.ratios.items())


@dataclass(frozen=True, slots=True)
class Gate:
    """What passed: `served` are rungs of the ladder as it was, ascending, full last; `remap[k]` is the place in `served` for what would have taken rung k."""

    served: tuple[int, ...]
    dropped: tuple[Dropped, ...]
    remap: tuple[int, ...]

    @property
    def adapts(self) -> bool:
        """Whether there is a choice left: with the full path alone, the dense network is the better thing to serve."""
        return len(self.served) > 1


def never_slower(times_ms: Mapping[int, Sequence[float]], dense_ms: Mapping[int, float], *, limit: float = 0.98) -> Gate:
    """Drop every rung whose time is above `limit` of the dense network's at any of these buckets; the last rung, full, always stays.

    `times_ms`: bucket -> median per input of each rung, cheapest first, glance and decision included; `dense_ms`: bucket -> the dense network's median, of
    the same interleaved run, compiled by the same back-end. Give the buckets that are served, and no others: one ladder holds for all of them, because
    a path that depended on the bucket would depend on the company that a sample comes in.

    What would have taken a dropped rung goes to the next dearer one that is served: a cheaper one would lose quality. Its time falls, since what is served
    is within the limit that the dropped rung broke, unless only full is left above; its multiply-adds rise. So a budget in multiply-adds has to be placed
    anew: learn the controller on the served columns (`Outcomes.columns`), which lets each sample take its best served rung, dearer or cheaper,
    at a price that keeps the budget. The remap alone is for a device on which nothing can be learned.
    Raises EngineError for tables that do not fit each other or hold no times.
    """
    counts = {len(row) for row in times_ms.values()}
    every = [*dense_ms.values(), *(time for row in times_ms.values() for time in row)]
    if set(times_ms) != set(dense_ms) or len(counts) != 1 or 0 in counts or not all(math.isfinite(time) and time > 0 for time in every) or not 0 < limit <= 1:
        raise EngineError(
            f"times of {sorted(counts)} rungs at buckets {sorted(times_ms)} against dense at {sorted(dense_ms)}, limit {limit}",
            wanted="finite positive times of the same rungs and of dense at the same buckets, a limit above 0 and up to 1",
            do="Measure all of them in one interleaved run.",
        )
    rungs = counts.pop()
    slow = {rung: {bucket: row[rung] / dense_ms[bucket] for bucket, row in times_ms.items() if row[rung] > limit * dense_ms[bucket]} for rung in range(rungs)}
    served = tuple(rung for rung in range(rungs) if not slow[rung] or rung == rungs - 1)
    dropped = tuple(Dropped(rung, ratios) for rung, ratios in slow.items() if rung not in served)
    return Gate(served, dropped, tuple(next(place for place, kept in enumerate(served) if kept >= rung) for rung in range(rungs)))
