"""A table in several files: which of a folder's files belong together, for which split, and whether they are pieces of one table."""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Collection, Sequence
from pathlib import Path as File
from typing import TextIO

from apportion.errors import DataError
from apportion.intake import parquet
from apportion.intake.folders import PURPOSE

SPLITS = {"train": ("train",), "test": ("test", "dev", "val", "validation")}
SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
SHOWN = 8  # columns that an error lists
TORN = (OSError, EOFError, UnicodeDecodeError, zlib.error, csv.Error)  # what reading a table of text trips over
PIECE = re.compile(r"(.+?)([-_.]\d.*)?")  # train, train-00000-of-00003, train_1


def pieces(source: File, split: str, columns: Collection[str] = ()) -> tuple[list[File], list[File], bool]:
    """(files of this split, files of all of them, whether the data brings a split of its own) of a table or a folder of tables.

    In a folder those called train and test (or dev, val, validation), in one piece or as train-00000-of-00003 and train_1; where none is called so all are one
    table without a split. Columns must be the same in all, or where `columns` are named, these. Raises DataError, naming the file that is none of them.
    """
    wanted = f"a file with one of the endings {', '.join(SUFFIXES)} (all but the last also .gz), or a folder with train and test files, or with pieces of one"
    if source.is_file() and ending(source):
        return [source], [source], False
    if not source.is_dir():
        raise DataError(f"no table {source}", wanted=wanted, do="Correct the path.")
    inside = [file for file in sorted(source.iterdir()) if file.is_file() and ending(file) and not file.name.startswith(".")]
    named = {kind: _first(inside, names) for kind, names in SPLITS.items()}
    every = [file for files in named.values() for file in files] or inside
    own = every != inside or any(named.values())
    chosen = every if split == "all" or not own else named[split]
    if not chosen:
        raise DataError(f"{source} without a table {PURPOSE[split] if inside else PURPOSE['all']}", wanted=wanted, do="Correct the path or the names.")
    if odd := next((file for file in every if ending(file) != ending(every[0])), None):
        found = f"{odd.name} beside {every[0].name} in {source}"
        raise DataError(found, wanted="pieces of one table, all with the same ending", do="Remove one, or convert it.")
    _same(every, columns)
    return chosen, every, own


def ending(file: File) -> str:
    """Of a table, without .gz; empty for another file."""
    name = file.name.removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


def opened(table: File) -> TextIO:
    """The text of a .csv, .tsv or .jsonl, its ends of lines as they are: a row of .jsonl ends with no other sign than its own."""
    return (gzip.open if table.name.endswith(".gz") else open)(table, "rt", encoding="utf-8-sig", newline="\n" if ending(table) == ".jsonl" else "")  # pyright: ignore[reportReturnType]


def unread(file: File, error: Exception) -> DataError:
    """The error of a table that cannot be read."""
    if isinstance(error, PermissionError):
        return DataError(f"{file}: {error.strerror}", wanted="a file that may be read", do="Change its permissions.")
    why = f"bytes that are no UTF-8 ({error.reason})" if isinstance(error, UnicodeDecodeError) else str(error)
    return DataError(f"{file}: {why}", wanted="a whole table in UTF-8", do="Convert it, or write it again.")


def columns_of(table: File) -> list[str]:
    """Names of the columns; of .jsonl the keys of the first row. Raises DataError where they cannot be read."""
    kind = ending(table)
    if kind == ".parquet":
        return parquet.names(table)
    try:
        with opened(table) as lines:
            if kind != ".jsonl":
                return next(csv.reader(lines, delimiter="\t" if kind == ".tsv" else ","), [])
            first = json.loads(next((line for line in lines if line.strip()), "{}"))
            return list(first) if isinstance(first, dict) else []
    except (*TORN, ValueError) as error:
        raise unread(table, error) from error


def _first(files: Sequence[File], names: Sequence[str]) -> list[File]:
    """Files of the first of these names that any is called by."""
    called = {file: PIECE.fullmatch(file.name.removesuffix(".gz").removesuffix(ending(file))) for file in files}
    return next((found for name in names if (found := [file for file, piece in called.items() if piece is not None and piece[1] == name])), [])


def _same(files: Sequence[File], columns: Collection[str]) -> None:
    if len(files) < 2 or (columns and ending(files[0]) == ".jsonl"):
        return  # rows of texts in .jsonl may do without a key
    first = columns_of(files[0])
    for file in files[1:]:
        here = columns_of(file)
        odd = [name for name in (*here, *first) if (name in here) != (name in first) and (not columns or name in columns)]
        if odd:
            found = f"{file} {'with' if odd[0] in here else 'without'} a column {odd[0]!r}, its columns being {_listed(here)}"
            raise DataError(found, wanted=f"those of {files[0].name}: {_listed(first)}", do="Bring the files into line, or remove it.")


def _listed(names: Sequence[str]) -> str:
    """Names of columns, of many the first."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (", ".join(names[:SHOWN]) or "none") + more
