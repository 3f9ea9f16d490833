"""Values of any length, kept in the order in which they come: in memory, or where that would take more than a bound, in a file that each is read back from.

The file has no name and goes as that of `laid` does. What stays in memory are 8 bytes of each value, and 8 more of each that was chosen.
"""

from __future__ import annotations

import json
import mmap
import sys
import tempfile
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, Any, Generic, TypeVar, final, overload

import torch
from torch import Tensor

from apportion.intake.laid import Lay

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Form(Generic[T]):
    """How values are bytes in a file: `read` gives again what `write` was given."""

    write: Callable[[T], bytes]
    read: Callable[[bytes], T]


def _plain(value: Any) -> bytes:
    return json.dumps(value, default=str).encode("ascii")  # dates and decimals of .parquet are read by their words anyway


def _told(data: bytes) -> Any:
    found = json.loads(data)
    return tuple(found) if isinstance(found, list) else found


PLAIN: Form[Any] = Form(_plain, json.loads)  # what JSON knows
TEXT: Form[Any] = Form(_plain, _told)  # a text, or a pair of them


def _channels(values: Tensor) -> bytes:
    return len(values).to_bytes(4, "little") + values.double().contiguous().numpy().tobytes()


SERIES: Form[Tensor] = Form(_channels, lambda data: torch.frombuffer(bytearray(data[4:]), dtype=torch.float64).view(int.from_bytes(data[:4], "little"), -1))


@final
class Written(Sequence[T]):
    """Values in a file, some of them by their numbers: each is read when it is asked for."""

    def __init__(self, data: mmap.mmap, ends: array[int], form: Form[T], index: Sequence[int]) -> None:
        self._data, self._ends, self._form, self._index = data, ends, form, index

    def __len__(self) -> int:
        return len(self._index)

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> Written[T]: ...
    def __getitem__(self, place: int | slice) -> T | Written[T]:
        if isinstance(place, slice):
            return Written(self._data, self._ends, self._form, self._index[place])
        row = self._index[place]
        return self._form.read(self._data[self._ends[row] : self._ends[row + 1]])

    def rows(self, index: Tensor) -> Written[T]:
        return Written(self._data, self._ends, self._form, array("q", [self._index[row] for row in index.tolist()]))


def picked(values: Sequence[T], index: Tensor) -> Sequence[T]:
    """These values only, in this order; none where there are none."""
    return values.rows(index) if isinstance(values, Written) else tuple(values[row] for row in index.tolist()) if values else ()


@final
class Keeper(Generic[T]):
    """Takes values as they come. Raises DataError where the disk is full or cannot be written to."""

    def __init__(self, form: Form[T], lay: Lay) -> None:
        self._form, self._lay = form, lay
        self._held: list[T] = []
        self._bytes = 0
        self._file: IO[bytes] | None = None
        self._ends = array("q", [0])

    def __len__(self) -> int:
        return len(self._held) + len(self._ends) - 1

    def add(self, value: T) -> None:
        if self._file is not None:
            return self._write([value])
        self._held.append(value)
        self._bytes += taken(value)
        if self._bytes > self._lay.bound:
            self._write(self._held)
            self._held = []

    def done(self) -> Sequence[T]:
        """All that it was given: from now on it takes no more."""
        if self._file is None:
            return tuple(self._held)
        try:
            with self._file as file:
                file.flush()
                return Written(mmap.mmap(file.fileno(), self._ends[-1], access=mmap.ACCESS_READ), self._ends, self._form, range(len(self)))
        except OSError as error:
            raise self._refused(error) from error

    def close(self) -> None:
        """Gives up what it was given and is not yet done with."""
        if self._file is not None:
            self._file.close()

    def _write(self, values: Sequence[T]) -> None:
        try:
            if self._file is None:
                self._lay.place.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=self._lay.place)
            for value in values:
                self._ends.append(self._ends[-1] + self._file.write(self._form.write(value)))
        except OSError as error:
            raise self._refused(error) from error

    def _refused(self, error: OSError) -> Exception:
        return self._lay.refused(error, f"room for more than {self._ends[-1] / 1e9:.1f} GB of samples")


def taken(value: Any) -> int:
    """Bytes in memory, with those of what is inside."""
    if isinstance(value, Tensor):
        return value.nbytes + sys.getsizeof(value)
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sys.getsizeof(value) + sum(map(taken, inside))
