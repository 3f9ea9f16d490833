"""Rows of tables as they come: what is good is kept with its label and its place, what is not is named; no more than a bound of it in memory."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Generic, NamedTuple, Self, TypeVar, final

import torch
from torch import Tensor

from apportion.errors import DataError
from apportion.intake.folders import OnSkip
from apportion.intake.labels import numbered
from apportion.intake.laid import Lay
from apportion.intake.written import PLAIN, Form, Keeper, picked
from apportion.vocab import Task

T = TypeVar("T")
NO_LABEL = "no label"


class Sieved(NamedTuple, Generic[T]):
    """What a set is made of."""

    values: Sequence[T]
    labels: Tensor | None
    classes: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]  # file and row, why
    where: Sequence[str]  # file and row of each


@final
class Sieve(Generic[T]):
    """Takes every row of the data; those of another split count for the names of the classes alone."""

    def __init__(self, form: Form[T], lay: Lay, task: Task) -> None:
        self.task: Task = task
        self.lay = lay
        self.known: dict[tuple[type, Any], str] = {}  # every label that occurs, and where first
        self._values, self._where, self._labels = Keeper(form, lay), Keeper[str](PLAIN, lay), Keeper[Any](PLAIN, lay)
        self._bad: list[tuple[int, str, str]] = []  # behind how many good rows, where and why
        self._bare = array("q")  # which good rows came without a label before any had one

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for kept in (self._values, self._where, self._labels):
            kept.close()

    def take(self, where: str, value: T, label: Any, fault: str, *, chosen: bool = True) -> None:
        """`chosen`: of the split that was asked for."""
        if not fault and label is None and self.known:
            fault = NO_LABEL
        if fault:
            self._bad += [(len(self._values), where, fault)] if chosen else []
            return
        if label is not None:
            self._learn(label, where)
        if chosen:
            if label is None:
                self._bare.append(len(self._values))
            self._values.add(value)
            self._where.add(where)
            self._labels.add(label)

    def _learn(self, label: Any, where: str) -> None:
        """A set of names, however many rows have them; of numbers that there are some is enough."""
        if self.task in ("regression", "embedding"):
            self.known = self.known or {(list, ()): where}
        elif isinstance(label, list):
            self.known.setdefault((list, ()), where)
            for one in label:
                self.known.setdefault((type(one), one), where)
        else:
            self.known.setdefault((type(label), label), where)

    @property
    def names(self) -> list[Any]:
        """Every label that occurs, once."""
        return [list(label) if kind is list else [label] if self.task in ("multilabel", "token_classification") else label for kind, label in self.known]

    def sieved(self, source: object, what: str, classes: Sequence[str] | None, on_skip: OnSkip | None) -> Sieved[T]:
        """Raises DataError where more than half of the rows are bad, or none is there, and for labels of two kinds."""
        values, where, labels = self._values.done(), self._where.done(), self._labels.done()
        if self.known and self._bare:
            self._bad = sorted([*self._bad, *((row, where[row], NO_LABEL) for row in self._bare)], key=lambda entry: entry[0])
            stay = torch.ones(len(values), dtype=torch.bool)
            stay[torch.tensor(self._bare)] = False
            index = stay.nonzero().flatten()
            values, where, labels = picked(values, index), picked(where, index), picked(labels, index)
        bad, count = tuple((place, why) for _, place, why in self._bad), len(self._bad) + len(values)
        if not count:
            raise DataError(f"{source} without any {what}", wanted="at least one", do="Give some, or correct the path.")
        if 2 * len(bad) > count:
            found = f"{source}: {len(bad)} of {count} {what} that cannot be used{f', such as {bad[0][0]}: {bad[0][1]}' if bad else ''}"
            raise DataError(found, wanted="at most half of them bad", do="Correct or remove them.")
        names, numbers = numbered(self.names, labels, classes, self.task, lay=self.lay)
        for place, why in bad if on_skip else ():
            assert on_skip is not None
            on_skip(place, why)
        return Sieved(values, numbers, names, bad, where)
