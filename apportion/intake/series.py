"""Time series of one or several channels, from files of the UEA and UCR archives or .npz; what cannot be used is named, never dropped in silence."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor

from apportion.errors import DataError, PlanError
from apportion.intake.archive import SUFFIXES, Entry, Header, entries, is_series
from apportion.intake.folders import PURPOSE, OnSkip, Split, batched, cut, parted
from apportion.intake.labels import parsed
from apportion.intake.laid import BATCH, HELD, HELD_BYTES, Lay
from apportion.intake.moments import Moments
from apportion.intake.shards import SPLITS
from apportion.intake.sieve import Sieve
from apportion.intake.written import SERIES, picked
from apportion.vocab import Task

Series = Any  # (channels, points) or, of one channel, (points,): a tensor, an array or lists of numbers


@dataclass(frozen=True, slots=True)
class Align:
    """Series in, float32 (b, channels, length) out: each channel less its `mean`, over its `std`, so that all are of one scale; NaN behind the end of a shorter
    series and where nothing was measured, which the tokeniser counts for nothing. What is behind `length` is not read.

    Raises PlanError for fields that do not fit each other, DataError, naming the row, for other channels, an infinite value, and a series without any value.
    """

    length: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        fits = 0 < len(self.mean) == len(self.std) and all(map(math.isfinite, self.mean)) and all(0 < std < math.inf for std in self.std)
        if not fits or self.length < 1:
            found = f"a length of {self.length}, {len(self.mean)} means and {len(self.std)} deviations"
            raise PlanError(found, wanted="a point at least, a finite mean and a std above 0 for each channel", do="Correct them.")

    @classmethod
    def learned(cls, values: Sequence[Tensor], *, length: int | None = None) -> Align:
        """From series that teach; as long as the longest of them where no `length` is said. Raises DataError for a channel that is missing in all of them."""
        moments, longest = Moments(len(values[0])), 0
        for start in range(0, len(values), BATCH):
            part = list(values[start : start + BATCH])
            longest = max(longest, *(one.shape[1] for one in part))
            moments.add(torch.cat(part, 1).double().T)
        if empty := (moments.count == 0).nonzero().flatten().tolist():
            raise DataError(f"channel {empty[0]} with nothing in it", wanted="something to learn from", do="Remove it.")
        return cls(length or longest, tuple(moments.mean.tolist()), tuple(std or 1.0 for std in moments.std.tolist()))

    @property
    def channels(self) -> int:
        return len(self.mean)

    def __call__(self, series: Sequence[Series], *, where: Sequence[str] = ()) -> Tensor:
        """`where`: what to call each series in an error, such as its file and line."""
        if not len(series):
            raise DataError("no series", wanted="at least one, in a list", do="Put it into a list.")
        mean, std = (torch.tensor(facts, dtype=torch.float64)[:, None] for facts in (self.mean, self.std))
        made = torch.full((len(series), self.channels, self.length), math.nan)
        for row, one in enumerate(series):
            name = where[row] if where else f"row {row}"
            values = ((self._given(one, name)[:, : self.length] - mean) / std).float()
            if values.isinf().any() or values.isnan().all():
                fault = "an infinite value" if values.isinf().any() else f"no value in the first {self.length} points"
                raise DataError(f"{name}: {fault}", wanted="finite ones, and NaN where nothing was measured", do="Correct or remove it.")
            made[row, :, : values.shape[1]] = values
        return made

    def _given(self, one: Series, name: str) -> Tensor:
        wanted = f"{self.channels} channels of numbers, NaN where nothing was measured, or a list of such series"
        try:
            values = torch.as_tensor(one, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"{name}: a {type(one).__name__} that is no series ({str(error)[:100]})", wanted=wanted, do="Correct or remove it.") from error
        values = values[None] if values.ndim == 1 and self.channels == 1 else values
        if values.ndim != 2 or values.shape[0] != self.channels:
            raise DataError(f"{name}: a series of shape {tuple(values.shape)}", wanted=wanted, do="Give the channels that the model was taught with.")
        return values


@dataclass(frozen=True, slots=True, eq=False)
class SeriesSet:
    """Time series and their labels: in memory, or where they are too many, in a file (`written`)."""

    values: Sequence[Tensor]  # each (channels, points) float64, NaN where nothing was measured
    labels: Tensor | None  # int64 (n,); numbers (n, outputs) float
    classes: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...] = ()  # file and row, why
    where: Sequence[str] = ()  # file and row of each
    lay: Lay = HELD

    def __len__(self) -> int:
        return len(self.values)

    def rows(self, index: Tensor | Sequence[int]) -> SeriesSet:
        """The same set with these series only, in this order."""
        rows = torch.as_tensor(index, dtype=torch.int64)
        labels = None if self.labels is None else self.lay.picked(self.labels, rows)
        return SeriesSet(picked(self.values, rows), labels, self.classes, self.skipped, picked(self.where, rows), self.lay)

    def split(self, holdout: float, *, seed: int = 0) -> tuple[SeriesSet, SeriesSet]:
        """(rest, held out): `holdout` of the series, spread evenly over the classes, chosen by `seed`. Raises DataError where one side would be empty."""
        rest, held = parted(self.labels, len(self), holdout, seed=seed, what="series")
        return self.rows(rest), self.rows(held)

    def check(self, outputs: int) -> None:
        """Raises DataError, naming the first series whose label a network with so many outputs cannot give."""
        if self.labels is None:
            return
        wide = self.labels.ndim == 2
        bad = [] if wide else ((self.labels < 0) | (self.labels >= outputs)).nonzero().flatten().tolist()
        if (wide and self.labels.shape[1] != outputs) or bad:
            found = f"{self.labels.shape[1]} numbers for a series" if wide else f"label {int(self.labels[bad[0]])} at {self.where[bad[0]]}"
            raise DataError(found, wanted=f"what {outputs} outputs can say", do="Give labels as the model numbers them.")

    def batches(self, batch: int, align: Align, *, seed: int | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """(inputs, labels) of `batch` series and a shorter rest; in order, or shuffled by `seed`. Raises DataError for a series that does not fit."""
        for rows in batched(len(self), batch, seed):
            some = self.rows(rows)
            yield align(some.values, where=some.where), some.labels

    def sizes(self, align: Align) -> None:
        """All are brought to one length."""


def read_series(
    source: str | File,
    *,
    split: Split = "all",
    classes: Sequence[str] | None = None,
    limit: int | None = None,
    on_skip: OnSkip | None = None,
    task: Task = "classification",
    labelled: bool = True,
    bound: int = HELD_BYTES,
    folder: File | None = None,
) -> SeriesSet:
    """Read a file, or a folder with a train and a test file (train.ts, or NAME_TRAIN.ts as the archives call theirs; dev, val and validation are test).

    .ts: channels apart by colons, then the label, as the header says it. .tsv, .csv: the label first, one series of one channel in a row, no header. .npz: x
    (n, channels, points) or (n, points), y (n,). Empty cells, ? and NaN are gaps; behind the last value they say that the series is shorter. Whole numbers
    are names of classes, too. Without `labelled` labels are left alone. Where the data brings no split of its own, every fifth series of each class is `test`.
    Series with a fault are in `skipped`, by file and row, and told to `on_skip`. Row after row is read; more than `bound` bytes of them are written into a file
    in `folder`, or that for temporary files. Raises DataError: nothing there, more than half bad.
    """
    own = File(source).is_dir()
    files = _split(File(source)) if own else {"all": File(source)}
    if own and split != "all" and split not in files:
        wanted = f"a file called {split}, or NAME_{split.upper()}, ending in {', '.join(SUFFIXES)}"
        raise DataError(f"{source} without a file {PURPOSE[split]}", wanted=wanted, do="Correct the path or the names.")
    lay, channels = Lay(bound, folder), 0
    with Sieve[Tensor](SERIES, lay, task) as sieve:
        for kind, file in files.items():
            header, found = entries(file)
            _fits(file, header, task if labelled else "regression")
            classes = classes or (header.classes if task == "classification" else None) or None
            for entry in found:
                row = _labelled(entry, task) if labelled else entry._replace(label=None)
                channels, fault = channels or (0 if row.values is None else len(row.values)), row.fault
                if row.values is not None and len(row.values) != channels:
                    fault = f"{len(row.values)} channels where the first series has {channels}"
                values = torch.empty(0, 0) if row.values is None else row.values
                sieve.take(row.where, values, row.label, fault, chosen=split == "all" or kind in ("all", split))
        if task == "classification":
            classes = classes or _names(sieve.names)
            _known(sieve.known, classes)
        made = sieve.sieved(source, "series", classes, on_skip)
    return cut(SeriesSet(made.values, made.labels, made.classes, made.skipped, made.where, lay), "all" if own else split, limit, "series")


def holds_series(source: File) -> bool:
    """Whether a file, or the files of a folder by their split, are of series."""
    if source.is_file():
        return is_series(source)
    files = [file for file in sorted(source.iterdir()) if file.is_file()] if source.is_dir() else []
    return any(_kind(file) and is_series(file) for file in files)


def _split(folder: File) -> dict[str, File]:
    """The files for train and for test, of the first format that has any. Raises DataError where there are several for one."""
    inside = [file for file in sorted(folder.iterdir()) if file.is_file() and _kind(file)]
    for suffix in SUFFIXES:
        found = {kind: [file for file in inside if _kind(file) == kind and file.name.removesuffix(".gz").endswith(suffix)] for kind in SPLITS}
        for kind, files in found.items():
            if len(files) > 1:
                raise DataError(f"{files[0]} and {files[1].name}", wanted=f"one file for {kind}", do="Give each set of series a folder of its own.")
        if any(found.values()):
            return {kind: files[0] for kind, files in found.items() if files}
    wanted = f"files called train and test, or NAME_TRAIN and NAME_TEST, ending in {', '.join(SUFFIXES)}"
    raise DataError(f"no series in {folder}", wanted=wanted, do="Correct the path or the names.")


def _kind(file: File) -> str:
    """Which split a file is by its name; empty for none, and for no file of series."""
    plain = file.name.removesuffix(".gz")
    stem = next((plain.removesuffix(suffix) for suffix in SUFFIXES if plain.endswith(suffix)), "").lower()
    return next((kind for kind, names in SPLITS.items() if stem.rsplit("_", 1)[-1] in names), "")


def _fits(file: File, header: Header, task: Task) -> None:
    if header.numbers and task != "regression":
        raise DataError(f"{file} with numbers for labels (@targetLabel)", wanted="names of classes", do="If numbers shall be foretold: --task regression.")


def _known(known: Mapping[tuple[type, Any], str], classes: Sequence[str] | None) -> None:
    """Raises DataError for the first label that is none of the classes."""
    for (_, label), where in known.items() if classes else ():
        if label not in (classes or ()):
            raise DataError(f"{where}: label {label!r}", wanted=f"one of {', '.join(classes or ())}", do="Correct the labels.")


def _labelled(entry: Entry, task: Task) -> Entry:
    """With its label as `numbered` takes it: of classes a name, also where it is a whole number, written as 2 or as 2.0."""
    if entry.fault or entry.label is None:
        return entry
    label = entry.label.strip() if isinstance(entry.label, str) else entry.label
    if task == "classification":
        label = _whole(label)
    value, fault = parsed(label, task)
    return Entry(entry.where, None, None, fault) if fault else entry._replace(label=value)


def _whole(label: Any) -> Any:
    """A whole number as its digits; anything else as it is."""
    try:
        number = float(label)
    except (TypeError, ValueError):
        return label
    return str(int(number)) if number.is_integer() else label


def _names(known: Sequence[str]) -> tuple[str, ...] | None:
    """Of the classes, in the order of numbers where all are numbers."""
    if not known:
        return None
    numbers = all(name.removeprefix("-").isdecimal() for name in known)
    return tuple(sorted(known, key=int if numbers else None))
