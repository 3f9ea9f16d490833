"""Labels as they stand in a table, and the tensor they become, task by task; what cannot be a label is named."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from apportion.errors import DataError
from apportion.intake.laid import HELD, Lay, laid
from apportion.methods.task import UNKNOWN
from apportion.vocab import Task

MOST_CLASSES = 1_000_000  # a larger label is an id from another column, and would fill the memory with names
APART = "|"  # what stands between several labels in one cell
BLOCK = 256  # rows of labels that are looked at, or made into a tensor, at a time


def parsed(value: Any, task: Task, words: int = 0) -> tuple[Any, str]:
    """A cell as labels of this task, and what is wrong with it ("" where nothing is): one name or number; a list or a|b of names; a number or a list of them;
    several numbers also as 1.5|2; a list of names, or names with spaces between them, one for each of the text's `words`."""
    value = _plain(value)
    if value is None or (value == "" and task != "multilabel"):
        return None, "no label"
    if task == "classification":
        return value, "" if isinstance(value, str | int) else f"{type(value).__name__} where a label was wanted"
    if task == "regression":
        return _numbers(value)
    if isinstance(value, str):
        value = [part for part in (value.split() if task == "token_classification" else value.split(APART)) if part]
    several = [_plain(one) for one in value] if isinstance(value, list | tuple) else [None if task == "token_classification" else value]
    if not all(isinstance(one, str | int) for one in several):
        return None, f"{value!r:.80} where a list of labels was wanted"
    if task == "token_classification" and len(several) != words:
        return None, f"{len(several)} labels for {words} words"
    return several, ""


def numbered(
    known: Iterable[Any], labels: Sequence[Any], classes: Sequence[str] | None, task: Task = "classification", *, lay: Lay = HELD
) -> tuple[tuple[str, ...], Tensor | None]:
    """Names of the classes and the labels: int64 (n,); several 0 or 1 (n, classes); numbers (n, outputs); of words int64 (n, most words), -100 behind the last.

    `known`: every value that occurs, also where `labels` is a part of the data. No labels where no row has one; where they are too many, they are laid as
    `lay` says. Raises DataError.
    """
    seen = [value for value in known if value is not None]
    if not seen or task == "embedding":
        return tuple(classes or ()), None

    def made(rows: Callable[[Sequence[Any]], Tensor]) -> Tensor:
        return laid(map(rows, _blocks(labels)), len(labels), bound=lay.bound, folder=lay.folder)

    if task == "regression":
        widths = {len(row) for row in labels}
        if len(widths) > 1:
            raise DataError(f"rows of {min(widths)} and of {max(widths)} numbers", wanted="as many in every row", do="Correct the labels.")
        return tuple(classes or ()), made(lambda rows: torch.tensor(rows, dtype=torch.float32))
    if task == "classification":
        names, place = _places(seen, classes)
        return names, made(lambda rows: torch.tensor([place(label) for label in rows], dtype=torch.int64))
    names, place = _places(list(chain.from_iterable(seen)), classes)
    if task == "multilabel":
        return names, made(lambda rows: _scattered(torch.zeros(len(rows), len(names)), rows, lambda _, label: (place(label), 1)))
    longest = max(map(len, labels))
    return names, made(lambda rows: _scattered(torch.full((len(rows), longest), UNKNOWN), rows, lambda column, label: (column, place(label))))


def span(labels: Sequence[Tensor | None]) -> float:
    """How far the numbers range, over all outputs; 0 where there are none."""
    found = [part for part in labels if part is not None]
    return float(torch.cat(found).max() - torch.cat(found).min()) if found else 0.0


def outside(labels: Tensor, outputs: int) -> list[int]:
    """The rows of integer labels (n, ...) with one that so many outputs cannot give."""
    parts = (some.flatten(1) if some.ndim > 1 else some[:, None] for some in labels.split(BLOCK))
    bad = torch.cat([(((some < 0) & (some != UNKNOWN)) | (some >= outputs)).any(1) for some in parts])
    return bad.nonzero().flatten().tolist()


def _plain(value: Any) -> Any:
    """Whole numbers that lie in a column with gaps are written as 1.0, and the gaps as NaN: pandas does so."""
    if not isinstance(value, float):
        return value
    return int(value) if value.is_integer() else None if math.isnan(value) else value


def _numbers(value: Any) -> tuple[Any, str]:
    several = list(value) if isinstance(value, list | tuple) else value.split(APART) if isinstance(value, str) else [value]
    try:
        found = [float(one) for one in several]
    except (TypeError, ValueError):
        return None, f"{value!r:.80} where a number was wanted"
    return (found, "") if found and all(map(math.isfinite, found)) else (None, f"{value!r:.80} where a finite number was wanted")


def _blocks(labels: Sequence[Any]) -> Iterator[Sequence[Any]]:
    return (list(labels[start : start + BLOCK]) for start in range(0, len(labels), BLOCK))


def _scattered(table: Tensor, rows: Sequence[Sequence[Any]], entry: Callable[[int, Any], tuple[int, int]]) -> Tensor:
    """`entry` says for the number of a label in its row, and the label, which column it sets to what."""
    found = [(row, *entry(number, label)) for row, several in enumerate(rows) for number, label in enumerate(several)]
    if found:
        row, column, value = torch.tensor(found).T
        table[row, column] = value.to(table.dtype)
    return table


def _places(known: list[Any], classes: Sequence[str] | None) -> tuple[tuple[str, ...], Callable[[Any], int]]:
    """Names, and the number of a label: whole numbers from 0 as they are; names by their place in `classes`, or else in the alphabet."""
    found = {value if type(value) is int else str(value) for value in known}
    if found and all(type(value) is int or str(value).isdecimal() for value in found) and not (classes and found <= set(classes)):
        top = max(map(int, found))
        if strange := [value for value in (min(map(int, found)), top) if not 0 <= value < MOST_CLASSES]:
            raise DataError(f"label {strange[0]}", wanted=f"whole numbers from 0, below {MOST_CLASSES}", do="Correct the labels.")
        return tuple(classes or map(str, range(top + 1))), int
    if strange := [value for value in found if type(value) is int]:
        raise DataError(f"label {strange[0]} beside names", wanted="numbers or names, not both", do="Correct the labels.")
    names = tuple(classes or sorted(map(str, found)))
    if missing := sorted(map(str, found - set(names))):
        raise DataError(f"label {missing[0]!r}", wanted=f"one of {', '.join(names)}", do="Correct the labels, or leave classes out.")
    number = {name: place for place, name in enumerate(names)}
    return names, lambda label: number[str(label)]
