"""Labels as they stand in a table, and the tensor they become, task by task; what cannot be a label is named."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from apportion.errors import DataError
from apportion.methods.task import UNKNOWN
from apportion.vocab import Task

MOST_CLASSES = 1_000_000  # a larger label is an id from another column, and would fill the memory with names
APART = "|"  # what stands between several labels in one cell


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
    known: Iterable[Any], labels: Sequence[Any], classes: Sequence[str] | None, task: Task = "classification"
) -> tuple[tuple[str, ...], Tensor | None]:
    """Names of the classes and the labels: int64 (n,); several 0 or 1 (n, classes); numbers (n, outputs); of words int64 (n, most words), -100 behind the last.

    `known`: every value that occurs, also where `labels` is a part of the data. No labels where no row has one. Raises DataError.
    """
    seen = [value for value in known if value is not None]
    if not seen or task == "embedding":
        return tuple(classes or ()), None
    if task == "regression":
        return tuple(classes or ()), _table(labels)
    if task == "classification":
        return _places(seen, list(labels), classes)
    names, flat = _places(list(chain.from_iterable(seen)), list(chain.from_iterable(labels)), classes)
    parts = torch.zeros(0, dtype=torch.int64) if flat is None else flat
    counts = [len(row) for row in labels]
    rows = torch.arange(len(labels)).repeat_interleave(torch.tensor(counts))
    if task == "multilabel":
        return names, torch.zeros(len(labels), len(names)).index_put_((rows, parts), torch.ones(()))
    columns = torch.cat([torch.arange(count) for count in counts])
    return names, torch.full((len(labels), max(counts)), UNKNOWN).index_put_((rows, columns), parts)


def span(labels: Sequence[Tensor | None]) -> float:
    """How far the numbers range, over all outputs; 0 where there are none."""
    found = [part for part in labels if part is not None]
    return float(torch.cat(found).max() - torch.cat(found).min()) if found else 0.0


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


def _table(labels: Sequence[Any]) -> Tensor:
    widths = {len(row) for row in labels}
    if len(widths) > 1:
        raise DataError(f"rows of {min(widths)} and of {max(widths)} numbers", wanted="as many in every row", do="Correct the labels.")
    return torch.tensor(labels, dtype=torch.float32)


def _places(known: list[Any], labels: list[Any], classes: Sequence[str] | None) -> tuple[tuple[str, ...], Tensor | None]:
    """Whole numbers from 0 as they are; names by their place in `classes`, or else in the alphabet."""
    found = {value if type(value) is int else str(value) for value in known}
    if not found:
        return tuple(classes or ()), None
    if all(type(value) is int or str(value).isdecimal() for value in found) and not (classes and found <= set(classes)):
        top = max(map(int, found))
        if strange := [value for value in (min(map(int, found)), top) if not 0 <= value < MOST_CLASSES]:
            raise DataError(f"label {strange[0]}", wanted=f"whole numbers from 0, below {MOST_CLASSES}", do="Correct the labels.")
        return tuple(classes or map(str, range(top + 1))), torch.tensor([int(value) for value in labels], dtype=torch.int64)
    if strange := [value for value in found if type(value) is int]:
        raise DataError(f"label {strange[0]} beside names", wanted="numbers or names, not both", do="Correct the labels.")
    names = tuple(classes or sorted(map(str, found)))
    if missing := sorted(map(str, found - set(names))):
        raise DataError(f"label {missing[0]!r}", wanted=f"one of {', '.join(names)}", do="Correct the labels, or leave classes out.")
    place = {name: number for number, name in enumerate(names)}
    return names, torch.tensor([place[str(value)] for value in labels], dtype=torch.int64)
