"""Tables with numbers and categories in their columns, from .csv, .tsv, .jsonl (also .gz) or .parquet files; what cannot be used is named, and told."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor

from apportion.errors import DataError, PlanError
from apportion.intake import parquet
from apportion.intake.folders import OnSkip, Split, batched, cut, parted
from apportion.intake.labels import parsed
from apportion.intake.laid import HELD, HELD_BYTES, Lay
from apportion.intake.moments import Moments
from apportion.intake.shards import TORN, columns_of, ending, opened, pieces, unread
from apportion.intake.sieve import Sieve
from apportion.intake.written import PLAIN, picked
from apportion.vocab import Task

NOTHING = frozenset({"", "na", "n/a", "nan", "null", "none"})  # in lower case: a cell that says that it is empty
MISSING, UNKNOWN, KNOWN = 0, 1, 2  # entries of a category: nothing there, a value not learned, the first that was
SEEN = 2  # rows that a value must be in to be learned: so what is unknown is taught, too
BLOCK = 1024  # rows that are learned from at a time
DISTINCT = 20  # values that a column of words may always have; with more, most of them must occur again
Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Tabulate:
    """Rows, each a mapping from column to cell, in; float32 (b, columns) out: `numbers` less `mean`, over `std`, NaN where one is missing; then the entries of
    `categories`: 0 nothing there, 1 a value that is not among its `values`, then those in order. Other columns are left alone.

    Raises PlanError for fields that do not fit each other, DataError, naming row and column, for a column that is missing and a number that is none.
    """

    numbers: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    categories: tuple[str, ...]
    values: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        columns = (*self.numbers, *self.categories)
        fits = len(self.numbers) == len(self.mean) == len(self.std) and len(self.categories) == len(self.values)
        fits = fits and 0 < len(columns) == len(set(columns)) and all(map(math.isfinite, self.mean)) and all(0 < std < math.inf for std in self.std)
        if not fits:
            wanted = "a finite mean and a std above 0 for each number, values for each category, every column once"
            raise PlanError(f"columns {', '.join(columns) or 'of which there are none'}", wanted=wanted, do="Correct them.")

    @classmethod
    def learned(cls, rows: Sequence[Row]) -> Tabulate:
        """From rows that teach. A column is of numbers where each of its cells is one, or nothing: write a category's numbers as words if they are none.

        Raises DataError for columns that differ from row to row, for one with nothing in it, and for one of words that hardly ever occur again.
        """
        names = tuple(rows[0]) if len(rows) else ()
        if not names or any(row.keys() != set(names) for row in rows):
            raise DataError(f"{len(rows)} rows with {len(names)} columns, or with different ones", wanted="the same columns in each", do="Correct the data.")
        there, words = dict.fromkeys(names, 0), dict[str, Counter[str]]()
        moments = Moments(len(names))
        for part in _blocks(rows):
            cells = {name: [_cell(row[name]) for row in part] for name in names}
            for name, column in cells.items():
                there[name] += sum(cell is not None for cell in column)
                if name not in words and any(cell is not None and _number(cell) is None for cell in column):
                    words[name] = Counter()
            columns = [[math.nan if name in words or cell is None else _number(cell) for cell in column] for name, column in cells.items()]
            moments.add(torch.tensor(columns, dtype=torch.float64).T)
        if empty := [name for name, count in there.items() if not count]:
            raise DataError(f"column {empty[0]!r} with nothing in it", wanted="something to learn from", do="Remove it.")
        for row in rows if words else ():
            for name, count in words.items():
                if (cell := _cell(row[name])) is not None:
                    count[str(cell)] += 1
        words = {name: words[name] for name in names if name in words}
        for name, count in words.items():
            if len(count) > max(DISTINCT, count.total() / 2):
                do = f"If it holds texts, say so: --columns text={name}, or columns={{'text': {name!r}}}; if it names rows, remove it."
                raise DataError(f"column {name!r} with {len(count)} values in {count.total()} rows", wanted="numbers, or words that occur again", do=do)
        facts = {name: fact for name, *fact in zip(names, moments.mean.tolist(), moments.std.tolist(), strict=True) if name not in words}
        return cls(
            tuple(facts),
            tuple(mean for mean, _ in facts.values()),
            tuple(std or 1.0 for _, std in facts.values()),
            tuple(words),
            tuple(tuple(sorted(value for value, times in count.items() if times >= SEEN)) for count in words.values()),
        )

    @property
    def entries(self) -> tuple[int, ...]:
        """Of each category, with those for nothing and for what is unknown."""
        return tuple(KNOWN + len(values) for values in self.values)

    def __call__(self, rows: Sequence[Row], *, where: Sequence[str] = ()) -> Tensor:
        """`where`: what to call each row in an error, such as its file and line."""
        if isinstance(rows, str | Mapping) or not len(rows):
            raise DataError("no list of rows", wanted="at least one, in a list", do="Put it into a list.")
        place = [{value: number for number, value in enumerate(values, KNOWN)} for values in self.values]

        def cells(index: int, row: Row) -> Iterator[float]:
            name = where[index] if where else f"row {index}"
            if not isinstance(row, Mapping) or any(column not in row for column in (*self.numbers, *self.categories)):
                missing = [column for column in (*self.numbers, *self.categories) if not isinstance(row, Mapping) or column not in row]
                raise DataError(f"{name}: no {missing[0]!r}", wanted=f"a mapping with {', '.join((*self.numbers, *self.categories))}", do="Add the column.")
            for column, mean, std in zip(self.numbers, self.mean, self.std, strict=True):
                number = math.nan if (cell := _cell(row[column])) is None else _number(cell)
                if number is None:
                    raise DataError(f"{name}: {cell!r:.80} in column {column!r}", wanted="a finite number, or nothing", do="Correct or remove the row.")
                yield (number - mean) / std
            for column, known in zip(self.categories, place, strict=True):
                cell = _cell(row[column])
                yield MISSING if cell is None else known.get(str(cell), UNKNOWN)

        return torch.tensor([list(cells(index, row)) for index, row in enumerate(rows)], dtype=torch.float32)


@dataclass(frozen=True, slots=True, eq=False)
class RowSet:
    """Rows of a table and their labels: in memory, or where they are too many, in a file (`written`)."""

    cells: Sequence[Row]
    labels: Tensor | None  # int64 (n,); several, or numbers, (n, outputs) float
    classes: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...] = ()  # file and row, why
    where: Sequence[str] = ()  # file and row of each
    lay: Lay = HELD

    def __len__(self) -> int:
        return len(self.cells)

    def rows(self, index: Tensor | Sequence[int]) -> RowSet:
        """The same set with these rows only, in this order."""
        rows = torch.as_tensor(index, dtype=torch.int64)
        labels = None if self.labels is None else self.lay.picked(self.labels, rows)
        return RowSet(picked(self.cells, rows), labels, self.classes, self.skipped, picked(self.where, rows), self.lay)

    def split(self, holdout: float, *, seed: int = 0) -> tuple[RowSet, RowSet]:
        """(rest, held out): `holdout` of the rows, spread evenly over the classes, chosen by `seed`. Raises DataError where one side would be empty."""
        rest, held = parted(self.labels, len(self), holdout, seed=seed, what="rows")
        return self.rows(rest), self.rows(held)

    def check(self, outputs: int) -> None:
        """Raises DataError, naming the first row whose label a network with so many outputs cannot give."""
        if self.labels is None:
            return
        wide = self.labels.ndim == 2
        bad = (self.labels[:, :0] if wide else ((self.labels < 0) | (self.labels >= outputs))[:, None]).any(1).nonzero().flatten().tolist()
        if (wide and self.labels.shape[1] != outputs) or bad:
            found = f"{self.labels.shape[1]} labels or numbers for a row" if wide else f"label {int(self.labels[bad[0]])} at {self.where[bad[0]]}"
            raise DataError(found, wanted=f"what {outputs} outputs can say", do="Give labels as the model numbers them.")

    def batches(self, batch: int, tabulate: Tabulate, *, seed: int | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """(inputs, labels) of `batch` rows and a shorter rest; in order, or shuffled by `seed`. Raises DataError for a row that cannot be read."""
        for rows in batched(len(self), batch, seed):
            some = self.rows(rows)
            yield tabulate(some.cells, where=some.where), some.labels

    def sizes(self, tabulate: Tabulate) -> None:
        """All have as many columns."""


def read_rows(
    source: str | File,
    *,
    split: Split = "all",
    label: str = "label",
    classes: Sequence[str] | None = None,
    limit: int | None = None,
    on_skip: OnSkip | None = None,
    task: Task = "classification",
    bound: int = HELD_BYTES,
    folder: File | None = None,
) -> RowSet:
    """Read a file, or a folder with train and test (or dev, val, validation) files, or with pieces of one (`shards.pieces`).

    Labels by `task`, as `read_texts` has them; none without the column. Where the data brings no split of its own, every fifth row of each class is `test`.
    Rows with too few or too many cells, with lists in them, and those without a label, are in `skipped`, by file and line (rows of .parquet count from 0), and
    told to `on_skip`. More than `bound` bytes of cells, of places or of labels are written into a file in `folder`, or that for temporary files.
    Raises DataError: nothing there, more than half of the rows bad, labels of two kinds; PlanError for .parquet without pyarrow.
    """
    chosen, every, own = pieces(File(source), split)
    lay = Lay(bound, folder)
    with Sieve[Row](PLAIN, lay, task) as sieve:
        for file in every:
            for row in rows_of(file, label, task):
                sieve.take(*row, chosen=file in chosen)
        found = sieve.sieved(source, "rows", classes, on_skip)
    made = RowSet(found.values, found.labels, found.classes, found.skipped, found.where, lay)
    return cut(made, "all" if own else split, limit, "row")


def rows_of(file: File, label: str, task: Task) -> Iterator[tuple[str, Row, Any, str]]:
    """Where, cells, label and fault of each row of one table; one after another is read."""
    unit, columns = "row" if ending(file) == ".parquet" else "line", None
    try:
        for number, entry in _entries(file, label):
            where, columns = f"{file}, {unit} {number}", columns if entry is None or columns is not None else entry.keys()
            if entry is None or entry.keys() != columns:
                yield where, {}, None, "other columns than in the first row"
                continue
            value, fault = parsed(entry[label], task) if label in entry else (None, "")
            odd = next((name for name, cell in entry.items() if name != label and isinstance(cell, list | dict | bytes)), None)
            fault = fault if odd is None else f"a {type(entry[odd]).__name__} in column {odd!r}, where a number or a word was wanted"
            yield where, {name: cell for name, cell in entry.items() if name != label}, value, fault
    except TORN as error:
        raise unread(file, error) from error


def _entries(file: File, label: str) -> Iterator[tuple[int, Mapping[str, Any] | None]]:
    """Number and cells of each row; None for one that has none, or too few or too many."""
    kind = ending(file)
    if kind == ".parquet":
        yield from parquet.entries(file, columns_of(file), label)
        return
    with opened(file) as lines:
        if kind == ".jsonl":
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, _object(line)
            return
        reader = csv.reader(lines, delimiter="\t" if kind == ".tsv" else ",")
        head = next(reader, [])
        if len(set(head)) != len(head) or "" in head:
            raise csv.Error(f"columns {', '.join(map(repr, head))}: each wants a name of its own, in the first line")
        for row in reader:
            if row:
                yield reader.line_num, dict(zip(head, row, strict=True)) if len(row) == len(head) else None


def _object(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _blocks(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    return (rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK))


def _cell(value: Any) -> Any:
    """What a cell says; None where it is empty."""
    if isinstance(value, str):
        return None if (text := value.strip()).lower() in NOTHING else text
    return None if value is None or (isinstance(value, float) and math.isnan(value)) else value


def _number(cell: Any) -> float | None:
    try:
        found = float(cell)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None
