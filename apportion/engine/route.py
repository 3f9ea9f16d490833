"""Who goes where: samples grouped by path, groups cut into buckets, tokens gathered by row."""

from __future__ import annotations

from collections.abc import Sequence

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


def fill(rows: Sequence[int], buckets: Sequence[int]) -> list[tuple[Tensor, int]]:
    """These rows cut into buckets: the (bucket,) rows to gather, and how many of them are real. Padding repeats a row of the same group."""
    pieces, start = [], 0
    for size in split(len(rows), buckets):
        real = list(rows[start : start + size])
        pieces.append((torch.tensor(real + real[-1:] * (size - len(real))), len(real)))
        start += size
    return pieces


def take(state: Tokens, rows: Tensor) -> Tokens:
    """Some rows of a state. Always a fresh contiguous copy, so that strides, which a static graph insists on, never vary."""
    rows = rows.to(state.x.device)
    return Tokens(state.x.index_select(0, rows), state.size.index_select(0, rows), state.origin.index_select(0, rows), state.prefix)


def join(states: Sequence[Tokens]) -> Tokens:
    """States of several batches as one."""
    x, size, origin, prefix = zip(*states, strict=True)
    return Tokens(torch.cat(x), torch.cat(size), torch.cat(origin), prefix[0])
