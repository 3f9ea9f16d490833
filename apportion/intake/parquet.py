"""Tables in .parquet files, row after row: of what is in the file no more than a row group is held at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path as File
from typing import Any

from apportion.errors import DataError, PlanError

ROWS = 1024  # that are made into values of Python at a time


def entries(file: File, columns: Sequence[str], label: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 0, values by column) of each row; only `columns` and, where there is one, `label` are read. Categories are their values, nulls None.

    Raises DataError for a file that is torn or no parquet, and for a column that is missing; PlanError without the package pyarrow.
    """
    with _table(file) as table:
        known = table.schema_arrow.names
        if missing := [name for name in columns if name not in known]:
            raise DataError(f"{file} with columns {', '.join(known)}", wanted=f"a column {missing[0]!r}", do="Name the columns.")
        wanted, row = [name for name in dict.fromkeys((*columns, label)) if name in known], 0
        for batch in table.iter_batches(ROWS, columns=wanted, use_threads=False):
            for values in batch.to_pylist():
                yield row, values
                row += 1


def names(file: File) -> list[str]:
    """Of the columns. Raises as `entries` does."""
    with _table(file) as table:
        return list(table.schema_arrow.names)


@contextmanager
def _table(file: File) -> Iterator[Any]:
    """The open file; whatever goes wrong with its content is told as an error of ours."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise PlanError(f"{file}, but no pyarrow here ({error})", wanted="the package", do="Install the extra: pip install 'apportion[text]'.") from error
    try:
        with parquet.ParquetFile(file) as table:
            yield table
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: {' '.join(str(error).split())[:200]}", wanted="a whole .parquet file, its texts in UTF-8", do="Write it again.") from error
