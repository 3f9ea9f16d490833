"""Pictures or recordings whose labels stand in a table: FOLDER/labels.csv (.tsv, .jsonl, .parquet), or one in FOLDER/train and one in FOLDER/test."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any

from apportion.errors import DataError
from apportion.intake.folders import FOLDERS, PURPOSE, Listing, OnSkip, Split, cut
from apportion.intake.labels import numbered
from apportion.intake.rows import rows_of
from apportion.intake.shards import SUFFIXES, columns_of, ending
from apportion.vocab import Task

NAME = "labels"
LAYOUT = f"FOLDER/{NAME}.csv (or {', '.join(SUFFIXES[1:])}), or one in FOLDER/train and one in FOLDER/test, with a column for files and one for labels"


@dataclass(frozen=True, slots=True)
class Told:
    """One row of a table of labels."""

    where: str  # table and line
    file: File
    label: Any
    fault: str


def tables(root: File, column: str) -> dict[str, File]:
    """The table for each split, or for "all", that has this column; none where the folder holds no such table. Raises DataError for several in one place."""
    whole = _table(root, column)
    if whole is not None:
        return {"all": whole}
    found = {kind: next((table for name in names if (table := _table(root / name, column)) is not None), None) for kind, names in FOLDERS.items()}
    return {kind: table for kind, table in found.items() if table is not None}


def check_column(root: File, column: str) -> None:
    """Raises DataError for a table that is called like one of labels and does not name files by this column."""
    for folder in (root, *(root / name for names in FOLDERS.values() for name in names)):
        inside = sorted(folder.iterdir()) if folder.is_dir() else []
        for table in inside:
            if table.is_file() and ending(table) and table.name.split(".")[0] == NAME and column not in columns_of(table):
                do = "Name the columns: --columns file=NAME,label=NAME, or columns={'file': NAME}."
                raise DataError(f"{table} with columns {', '.join(columns_of(table))}", wanted=f"a column {column!r} with the names of files", do=do)


def read_labelled(
    source: str | File,
    *,
    fault: Callable[[File], str],
    what: str,
    split: Split = "all",
    file: str = "file",
    label: str = "label",
    classes: Sequence[str] | None = None,
    limit: int | None = None,
    on_skip: OnSkip | None = None,
    task: Task = "classification",
) -> tuple[Listing, tuple[str, ...]]:
    """Files with labels by `task` as tables of texts have them (`labels.parsed`), and the names of the classes; `fault` says why a file is no usable `what`.

    The column `file` names each, from the folder of the table on. Where the data brings no split of its own, every fifth of each class is `test`.
    Left out and told by table and line: a file that is not there or cannot be used, one named before (also for the other split), a row without a label.
    Files that no row names are told as one. Raises DataError: no such table, no column for labels, more than half of the rows bad, labels of two kinds.
    """
    root = File(source)
    known = tables(root, file)
    own = "all" not in known
    if not known or (own and split != "all" and split not in known):
        raise DataError(f"{root} without a table of labels {PURPOSE[split]}", wanted=LAYOUT, do="Write one, or correct its name.")
    rows: dict[str, list[Told]] = {}
    first: dict[File, str] = {}
    for kind, table in known.items():
        if label not in columns_of(table) and task != "embedding":
            found = f"{table} with columns {', '.join(columns_of(table))}"
            raise DataError(found, wanted=f"a column {label!r}", do="Name the column: --columns label=NAME, or columns={'label': NAME}.")
        rows[kind] = [_told(table, row, file, first) for row in rows_of(table, label, task)]
    chosen = [row for kind, part in rows.items() for row in part if split == "all" or kind in ("all", split)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        faults = list(pool.map(lambda row: row.fault or fault(row.file), chosen))
    bad = [(row.where, why if row.fault else f"{row.file}: {why}") for row, why in zip(chosen, faults, strict=True) if why]
    good = [row for row, why in zip(chosen, faults, strict=True) if not why]
    if not chosen:
        raise DataError(f"{root} with a table of labels without any rows", wanted="at least one", do="Name the files in it.")
    if 2 * len(bad) > len(chosen) or not good:
        example = f", such as {bad[0][0]}: {bad[0][1]}" if bad else ""
        raise DataError(f"{root}: {len(bad)} of {len(chosen)} rows that name no usable {what}{example}", wanted="at most half of them bad", do="Correct them.")
    names, numbers = numbered([row.label for part in rows.values() for row in part if not row.fault], [row.label for row in good], classes, task)
    skipped = (*bad, *_unnamed(known, first))
    for where, why in skipped if on_skip else ():
        assert on_skip is not None
        on_skip(where, why)
    return cut(Listing(tuple(row.file for row in good), numbers, names, skipped), "all" if own else split, limit, what), names


def _table(folder: File, column: str) -> File | None:
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    found = [file for file in inside if file.is_file() and ending(file) and file.name.split(".")[0] == NAME and column in columns_of(file)]
    if len(found) > 1:
        raise DataError(f"{found[0]} and {found[1].name}", wanted="one table of labels", do="Remove one.")
    return found[0] if found else None


def _told(table: File, row: tuple[str, Any, Any, str], column: str, first: dict[File, str]) -> Told:
    """`first`: where each file was named first, which is written down here."""
    where, cells, label, fault = row
    name = cells.get(column)
    name = name.strip() if isinstance(name, str) else name
    if not isinstance(name, str) or not name:
        return Told(where, table, None, fault or f"no {column!r}")
    file = table.parent / name
    place = File(os.path.normpath(file))
    before = first.setdefault(place, where)
    if before != where:
        return Told(where, file, None, f"{name} for the second time, first at {before}")
    return Told(where, file, label, fault or ("" if file.is_file() else f"no file {file}"))


def _unnamed(known: dict[str, File], named: dict[File, str]) -> list[tuple[str, str]]:
    """Files in the tables' folders that no row names, as one entry for each folder."""
    found = []
    for table in known.values():
        every = [file for file in sorted(table.parent.rglob("*")) if file.is_file() and file != table and not file.name.startswith(".")]
        rest = [file for file in every if File(os.path.normpath(file)) not in named]
        if rest:
            found.append((str(table.parent), f"{len(rest)} files that {table.name} does not name, such as {rest[0].relative_to(table.parent)}"))
    return found
