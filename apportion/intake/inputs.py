"""What a user hands over to be answered: pictures or recordings among files and folders, texts, in tables or as they stand, rows of tables, or series."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path as File
from typing import Any

from apportion.errors import DataError
from apportion.intake import audio
from apportion.intake.images import decode
from apportion.intake.listen import Listen
from apportion.intake.parts import Feed
from apportion.intake.rows import Tabulate, read_rows
from apportion.intake.series import Align, read_series
from apportion.intake.shards import SUFFIXES
from apportion.intake.texts import Text, Tokenise, read_texts

NO_COLUMN = "\0"  # what is asked is not what is known: labels in the table are left alone


def opened(inputs: Sequence[str | File], feed: Feed, columns: Mapping[str, str] | None = None) -> Iterator[tuple[str, Any, str]]:
    """(name, what it holds, "") for each input, and (name, None, why) for one that cannot be used. Raises DataError where nothing is there.

    For a model that reads texts, an input that is a file (or is called like a table) is read as one, any other is a text itself.
    """
    if isinstance(feed, Tokenise):
        return _texts(inputs, feed, columns or {})
    if isinstance(feed, Tabulate):
        return _table(inputs, feed)
    if isinstance(feed, Align):
        return _series(inputs, feed)
    if isinstance(feed, Listen):
        return _decoded(inputs, "recordings", lambda file: audio.decode(file, seconds=feed.seconds))
    return _decoded(inputs, "pictures", decode)


def _decoded(inputs: Sequence[str | File], what: str, decode: Callable[[File], Any]) -> Iterator[tuple[str, Any, str]]:
    for file in [file for entry in inputs for file in _files(File(entry), what)]:
        try:
            yield str(file), decode(file), ""
        except DataError as error:
            yield str(file), None, error.found.removeprefix(f"{file}: ")


def _files(entry: File, what: str) -> list[File]:
    if not entry.exists():
        raise DataError(f"no file or folder {entry}", wanted=what, do="Check the path.")
    files = sorted(file for file in entry.rglob("*") if file.is_file()) if entry.is_dir() else [entry]
    if not files:
        raise DataError(f"no file in {entry}", wanted=what, do="Check the path.")
    return files


def _texts(inputs: Sequence[str | File], tokenise: Tokenise, columns: Mapping[str, str]) -> Iterator[tuple[str, Any, str]]:
    every = [_rows(entry, f"text {number}", columns) for number, entry in enumerate(inputs, 1)]  # what is not there is told before the first answer
    for name, text, why in chain.from_iterable(every):
        try:
            if text is not None:
                tokenise([text], where=[name])
            yield name, text, why
        except DataError as error:
            yield name, None, error.found.removeprefix(f"{name}: ")


def _rows(entry: str | File, name: str, columns: Mapping[str, str]) -> Iterator[tuple[str, Text | None, str]]:
    if not str(entry).removesuffix(".gz").endswith(SUFFIXES) and not _is_there(str(entry)):
        return iter([(name, str(entry), "")])
    found = read_texts(entry, text=columns.get("text", "text"), pair=columns.get("pair"), label=NO_COLUMN)
    good = ((where, text, "") for where, text in zip(found.where, found.texts, strict=True))
    return chain(good, ((where, None, why) for where, why in found.skipped))


def _table(inputs: Sequence[str | File], tabulate: Tabulate) -> Iterator[tuple[str, Any, str]]:
    """Rows of tables, each by file and line."""
    for found in (read_rows(entry, label=NO_COLUMN) for entry in inputs):
        yield from _tried(found.where, found.cells, tabulate, found.skipped)


def _series(inputs: Sequence[str | File], align: Align) -> Iterator[tuple[str, Any, str]]:
    """Series of files, each by file and row; labels in them are left alone."""
    for found in (read_series(entry, labelled=False) for entry in inputs):
        yield from _tried(found.where, found.values, align, found.skipped)


def _tried(places: Sequence[str], values: Sequence[Any], feed: Tabulate | Align, skipped: Sequence[tuple[str, str]]) -> Iterator[tuple[str, Any, str]]:
    """Each by its place, with the reason where it cannot be fed; then those that could not even be read."""
    for where, value in zip(places, values, strict=True):
        try:
            feed([value], where=[where])
            yield where, value, ""
        except DataError as error:
            yield where, None, error.found.removeprefix(f"{where}: ")
    yield from ((where, None, why) for where, why in skipped)


def _is_there(entry: str) -> bool:
    """A long text is no path: the system refuses to look for one of more than 255 letters."""
    try:
        return entry != "" and File(entry).exists()
    except (OSError, ValueError):
        return False
