"""Batch sizes for the traffic that came: what they would cost, and which would have cost least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apportion.engine import CALL_ROWS, Backend, choose, expected, offered
from apportion.errors import EngineError

STEEPEST = 1e3  # rows that a call may be worth: on a device where many rows take no longer than one, that is all that can be said


@dataclass(frozen=True, slots=True)
class Retuned:
    """Batch sizes before and after, the groups that they were chosen by, and what became of the graphs."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    groups: float
    saved: float  # share of what those groups were expected to cost, in rows and calls; below 0 where fewer sizes were asked for
    kept: int = 0  # graphs
    built: int = 0

    @property
    def promise(self) -> str:
        """What is expected of them, in words."""
        return f"{spelled(self.after)} save {100 * self.saved:.1f} % of the expected cost of {self.groups:g} groups"


def chosen(traffic: Mapping[int, float], before: Sequence[int], *, sizes: int, largest: int, call: float) -> Retuned:
    """The batch sizes, at most `sizes` and none above `largest`, at which these groups cost least, and what they save against `before`.

    A call costs as much as `call` rows. Groups above `largest` are counted in pieces of it. Every choice of `engine.choose`'s sizes and those of
    before is tried (it says what that costs). Raises EngineError for traffic without a group and sizes that make no sense.
    """
    if largest < 1:
        raise EngineError(f"a largest batch of {largest}", wanted="1 or more", do="Correct it.")
    groups = pieces(traffic, largest)
    usual = {size: size + call for size in {*offered(largest), *before}}
    after = choose(groups, at_most=sizes, costs={size: cost for size, cost in usual.items() if size <= largest})
    return Retuned(tuple(before), after, sum(traffic.values()), 1 - expected(groups, after, usual) / expected(groups, before, usual))


def pieces(traffic: Mapping[int, float], largest: int) -> dict[int, float]:
    """The same groups with those above `largest` cut into pieces of it and a rest."""
    found = dict[int, float]()
    for size, often in traffic.items():
        whole, rest = divmod(size, largest) if size > largest else (0, size)
        for piece, times in ((largest, whole), *([(rest, 1)] if rest or not whole else [])):
            found[piece] = found.get(piece, 0) + times * often
    return {size: often for size, often in found.items() if often}


def call_rows(table: Mapping[str, Any] | None, backend: Backend) -> float:
    """How many rows a call is worth by a table of times: the straight line through its smallest and largest batch, over all rungs; CALL_ROWS without one."""
    times = {} if table is None or table["backend"] != backend else {int(batch): int(batch) * sum(row) for batch, row in table["rungs_ms"].items()}
    few, many = (min(times), max(times)) if times else (0, 0)
    if few == many:
        return CALL_ROWS
    row = (times[many] - times[few]) / (many - few)
    call = max(0.0, times[few] - few * row)
    return call / row if row * STEEPEST > call else STEEPEST


def spelled(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes))
