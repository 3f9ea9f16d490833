"""Files of time series, series after series: .ts of the UEA and UCR archives, .tsv and .csv of the latter (also .gz), and .npz."""

from __future__ import annotations

import gzip
import math
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any, NamedTuple, TextIO

import numpy as np
import torch
from torch import Tensor

from apportion.errors import DataError
from apportion.intake.laid import BROKEN, header_of, rows_of
from apportion.intake.shards import TORN, unread

SUFFIXES = (".ts", ".npz", ".tsv", ".csv")
CHANNEL_LIMIT, POINT_LIMIT = 1000, 200_000  # of one series
SLAB_BYTES = 2**17  # of an array in an .npz, read at a time
LINE_LIMIT = 2**26  # letters
GAP = frozenset({"?", "", "nan", "na", "null"})  # in lower case: nothing was measured


class Entry(NamedTuple):
    """One series of a file."""

    where: str  # file and line or row
    values: Tensor | None  # (channels, points) float64, NaN where nothing was measured; None where there is a fault
    label: Any  # as it stands there; None without
    fault: str


@dataclass(frozen=True, slots=True)
class Header:
    """What a .ts file says of itself before its first series."""

    classes: tuple[str, ...] = ()
    labelled: bool = False
    numbers: bool = False  # the label is a number to be foretold
    channels: int = 0  # 0: not said


def is_series(file: File) -> bool:
    """Whether a file holds series: a .ts; an .npz with an "x"; a .tsv or .csv whose first line holds numbers, at least three behind the first, and no header.

    0, 1, 2 and so on are a header: of columns that nobody named. Raises DataError for a table that cannot be read.
    """
    plain = file.name.removesuffix(".gz")
    if plain.endswith(".ts"):
        return file.is_file()
    if plain.endswith(".npz") and file.is_file():
        return zipfile.is_zipfile(file) and "x.npy" in zipfile.ZipFile(file).namelist()
    if not plain.endswith((".tsv", ".csv")) or not file.is_file():
        return False
    try:
        with _opened(file) as lines:
            cells = lines.readline(LINE_LIMIT).rstrip("\r\n").split("\t" if plain.endswith(".tsv") else ",")
    except TORN as error:
        raise unread(file, error) from error
    numbers = [_number(cell) for cell in cells[1:]]
    if len(numbers) < 3 or None in numbers:
        return False
    return cells not in ([str(n) for n in range(len(cells))], ["", *(str(n) for n in range(len(numbers)))])


def entries(file: File) -> tuple[Header, Iterator[Entry]]:
    """What the file says of itself, and its series, read as they are asked for. Raises DataError for a file that cannot be read."""
    plain = file.name.removesuffix(".gz")
    if not file.is_file() or not plain.endswith(SUFFIXES):
        wanted = f"one that ends in {', '.join(SUFFIXES)} (all but .npz also .gz)"
        raise DataError(f"no file of series {file}", wanted=wanted, do="Correct the path, or convert the file.")
    if plain.endswith(".npz"):
        return Header(), _arrays(file)
    if plain.endswith(".ts"):
        header = _header(file)
        return header, _archived(file, header)
    return Header(labelled=True), _table(file, "\t" if plain.endswith(".tsv") else ",")


def _opened(file: File) -> TextIO:
    return gzip.open(file, "rt", encoding="utf-8-sig") if file.name.endswith(".gz") else file.open(encoding="utf-8-sig")


def _lines(file: File) -> Iterator[tuple[int, str]]:
    """Lines with something in them, and their numbers from 1; no more than one is held."""
    try:
        with _opened(file) as lines:
            number = 0
            while line := lines.readline(LINE_LIMIT):
                number += 1
                if len(line) == LINE_LIMIT:
                    raise DataError(f"{file}, line {number}: more than {LINE_LIMIT} letters", wanted="a series in each line", do="Write it as an .npz file.")
                if line.strip():
                    yield number, line.strip("\r\n ")
    except TORN as error:
        raise unread(file, error) from error


def _header(file: File) -> Header:
    """Raises DataError for time stamps, and where no data follow."""
    found = Header()
    for number, line in _lines(file):
        word, *rest = line.split() if line.startswith("@") else [""]
        word, said = word.lower(), [part.lower() for part in rest]
        if word == "@data":
            return found
        if word == "@timestamps" and said[:1] == ["true"]:
            raise DataError(f"{file}, line {number}: series with time stamps", wanted="values at equal distances", do="Resample them, and write values alone.")
        if word == "@dimensions" and said and said[0].isdecimal():
            found = Header(found.classes, found.labelled, found.numbers, int(said[0]))
        elif word == "@univariate" and said[:1] == ["true"]:
            found = Header(found.classes, found.labelled, found.numbers, 1)
        elif word == "@classlabel" and said[:1] == ["true"]:
            found = Header(tuple(rest[1:]), True, False, found.channels)
        elif word == "@targetlabel" and said[:1] == ["true"]:
            found = Header((), True, True, found.channels)
        elif not word and not line.startswith("#"):
            raise DataError(f"{file}, line {number}: {line[:40]!r} before @data", wanted="lines that begin with @ or #, then @data", do="Add the header.")
    raise DataError(f"{file} without @data", wanted="a header, @data, and a series in each line", do="Fetch the file again.")


def _archived(file: File, header: Header) -> Iterator[Entry]:
    """channel:channel:...:label, values with commas between them."""
    lines = _lines(file)
    for _, line in lines:
        if line.lower().startswith("@data"):
            break
    for number, line in lines:
        if line.startswith("#"):
            continue
        parts = line.split(":")
        label = parts.pop().strip() if header.labelled else None
        entry = _entry(f"{file}, line {number}", [part.split(",") for part in parts], label)
        if not entry.fault and header.channels not in (0, len(parts)):
            entry = Entry(entry.where, None, None, f"{len(parts)} channels where the header says {header.channels}")
        elif not entry.fault and header.classes and label not in header.classes:
            entry = Entry(entry.where, None, None, f"label {label!r}, which the header does not name")
        yield entry


def _table(file: File, apart: str) -> Iterator[Entry]:
    """The label, then the values of one channel."""
    for number, line in _lines(file):
        label, *values = (cell.strip() for cell in line.split(apart))
        yield _entry(f"{file}, line {number}", [values], label or None)


def _entry(where: str, channels: Sequence[Sequence[str]], label: str | None) -> Entry:
    if not 0 < len(channels) <= CHANNEL_LIMIT or not all(0 < len(cells) <= POINT_LIMIT for cells in channels):
        sizes = sorted(map(len, channels)) or [0]
        fault = f"{len(channels)} channels of {sizes[0]} to {sizes[-1]} points; wanted 1 to {CHANNEL_LIMIT} of 1 to {POINT_LIMIT}"
        return Entry(where, None, None, fault)
    if len({len(cells) for cells in channels}) > 1:
        odd = next(place for place, cells in enumerate(channels) if len(cells) != len(channels[0]))
        return Entry(where, None, None, f"channel {odd} of {len(channels[odd])} points, channel 0 of {len(channels[0])}")
    rows = [[_number(cell) for cell in cells] for cells in channels]
    for channel, row in enumerate(rows):
        if None in row:
            cell = channels[channel][row.index(None)]
            return Entry(where, None, None, f"{cell.strip()!r:.40} in channel {channel} where a number was wanted")
    return _checked(where, torch.tensor(rows, dtype=torch.float64), label)


def _checked(where: str, values: Tensor, label: Any) -> Entry:
    """Without the points behind the last one that any channel has: so unequal length is told in tables of equal rows."""
    if values.isinf().any():
        return Entry(where, None, None, f"an infinite value in channel {int(values.isinf().any(1).nonzero()[0])}")
    there = (~values.isnan()).any(0).nonzero()
    return Entry(where, values[:, : int(there[-1]) + 1], label, "") if len(there) else Entry(where, None, None, "no value at all")


def _number(cell: str) -> float | None:
    text = cell.strip()
    if text.lower() in GAP:
        return math.nan
    try:
        return float(text)
    except ValueError:
        return None


def _arrays(file: File) -> Iterator[Entry]:
    """x (n, channels, points), or (n, points) of one channel; y, where there is one, (n,) or numbers (n, outputs)."""
    wanted = "x: floats (n, channels, points), NaN where nothing was measured; y: a label for each, or numbers"
    do = "Write it with numpy.savez(file, x=..., y=...); arrays of objects are not read."
    try:
        with zipfile.ZipFile(file) as data:
            shape, dtype = header_of(data, "x.npy")
        with file.open("rb") as handle, np.load(handle, allow_pickle=False) as data:
            y = data["y"] if "y" in data.files else None
    except BROKEN as error:
        raise DataError(f"{file}: {error}", wanted=wanted, do=do) from error
    each = shape[1:] if len(shape) == 3 else (1, *shape[1:])
    if dtype.kind not in "fiu" or len(shape) not in (2, 3) or not 0 < each[0] <= CHANNEL_LIMIT or not 0 < each[1] <= POINT_LIMIT:
        found = f"{file}: x of shape {shape} and type {dtype}"
        raise DataError(found, wanted=f"{wanted}; at most {CHANNEL_LIMIT} channels of {POINT_LIMIT} points", do=do)
    if y is not None and (y.dtype.kind not in "fiuU" or y.ndim not in (1, 2) or len(y) != shape[0]):
        raise DataError(f"{file}: y of shape {y.shape} and type {y.dtype} for {shape[0]} series", wanted=wanted, do=do)
    row = 0
    try:
        for part in rows_of(file, "x.npy", max(1, SLAB_BYTES // (math.prod(each) * dtype.itemsize))):
            for values in part.double().view(-1, *each):
                yield _checked(f"{file}, row {row}", values, None if y is None else y[row].tolist())
                row += 1
    except BROKEN as error:
        raise DataError(f"{file}: {error}", wanted=wanted, do=do) from error
