"""Who goes where: samples grouped by path, groups cut into buckets, tokens gathered by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from apportion.engine.buckets import split
from apportion.vocab import Tokens


def group(index: Tensor) -> list[tuple[int, list[int]]]:
    """The rows of every rung that was chosen, rungs ascending and rows in order. The one place where the host waits for the device."""
    rows: dict[int, list[int]] = {}
    for row, rung in enumerate(index.tolist()):
        rows.setdefault(rung, []).append(row)
    return sorted(rows.items())


class Piece(NamedTuple):
    """Rows that one graph call takes: `real` of the `size` it was built for, the others repeat the last. `rows` is None for all there are, in order."""

    rows: Tensor | None
    real: int
    size: int


def fill(rows: Sequence[int], buckets: Sequence[int], *, among: int) -> list[Piece]:
    """These rows, ascending, of `among`, cut into buckets."""
    if len(rows) == among and among in buckets:
        return [Piece(None, among, among)]  # one call is the cheapest; and this is every call at a batch size that was built
    pieces, start = [], 0
    for size in split(len(rows), buckets):
        real = list(rows[start : start + size])
        pieces.append(Piece(torch.tensor(real + real[-1:] * (size - len(real))), len(real), size))
        start += size
    return pieces


def some(x: Tensor, rows: Tensor | None) -> Tensor:
    """Some rows, or all of them for None. Always of plain strides, which a static graph insists on; all rows that have them are not copied."""
    if rows is not None:
        return x.index_select(0, rows.to(x.device))
    return x if x.stride() == _strides(x.shape) else x.clone(memory_format=torch.contiguous_format)


def take(state: Tokens, rows: Tensor | None) -> Tokens:
    """Some rows of a state, as `some` does it."""
    rows = None if rows is None else rows.to(state.x.device)
    return Tokens(some(state.x, rows), some(state.size, rows), some(state.origin, rows), state.prefix)


def join(states: Sequence[Tokens], real: Sequence[int]) -> Tokens:
    """The `real` first rows of several batches as one."""
    x, size, origin, prefix = zip(*states, strict=True)
    return Tokens(whole(x, real), whole(size, real), whole(origin, real), prefix[0])


def whole(parts: Sequence[Tensor], real: Sequence[int]) -> Tensor:
    """The `real` first rows of each part, one after the other. A single part without padding is not copied."""
    kept = [first(part, count) for part, count in zip(parts, real, strict=True)]
    return kept[0] if len(kept) == 1 else torch.cat(kept)


def first(x: Tensor, real: int) -> Tensor:
    return x if len(x) == real else x[:real]


def ordered(parts: Sequence[Tensor], rows: Sequence[Tensor | None]) -> Tensor:
    """Answers of groups put back in the order of the samples; `rows` says whose they are, None that they are everybody's."""
    if rows[0] is None:
        return parts[0]
    grouped = torch.cat(list(parts))
    return torch.empty_like(grouped).index_copy_(0, torch.cat([row for row in rows if row is not None]).to(grouped.device), grouped)


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Of a contiguous tensor; not is_contiguous(), which says nothing about dimensions of one."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))
