"""What is decoded, laid one sample after another: in memory, or where that would take more than a bound, in a file that a tensor looks into.

The file has no name, so nothing of it is found again: it is gone with the tensor, and with a process that is stopped half-way. Its pages are the system's: they
come when rows are asked for, and go when memory is wanted elsewhere. A folder that is itself kept in memory (tmpfs) gains nothing: name one on a disk.
"""

from __future__ import annotations

import math
import mmap
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path as File
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from apportion.errors import DataError

HELD_BYTES = 2**30  # what one set of samples may take in memory
BROKEN = (KeyError, ValueError, OSError, EOFError, MemoryError, zlib.error, zipfile.BadZipFile)  # what reading an .npz trips over
BATCH = 16  # samples decoded at a time: while they are, what they are made of takes several times as much


@dataclass(frozen=True, slots=True)
class Lay:
    """Where samples go that take more than `bound` bytes: into a file in `folder`, or in that for temporary files."""

    bound: int = HELD_BYTES
    folder: File | None = None

    @property
    def place(self) -> File:
        return File(tempfile.gettempdir()) if self.folder is None else self.folder

    def refused(self, error: OSError, wanted: str) -> DataError:
        """The error of a disk that is full or cannot be written to."""
        free = f", {shutil.disk_usage(self.place).free / 1e9:.1f} GB free" if self.place.is_dir() else ""
        return DataError(f"{self.place}: {error.strerror or error}{free}", wanted=wanted, do="Make room there, or name a folder on another disk.")

    def picked(self, every: Tensor, rows: Tensor) -> Tensor:
        """Some rows of what was laid, copied: laid again where they take more than the bound."""
        if every[:1].nbytes * len(rows) <= self.bound:
            return every[rows]
        return laid((every[some] for some in rows.split(BATCH)), len(rows), bound=self.bound, folder=self.folder)


@dataclass(frozen=True, slots=True, eq=False)
class Chosen:
    """Some rows of what was laid, by their numbers: nothing is copied before a batch is asked for."""

    every: Tensor  # (n, ...)
    index: Tensor  # int64

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        return self.every[self.index[torch.from_numpy(rows)]].numpy()

    def rows(self, index: Tensor) -> Chosen:
        return Chosen(self.every, self.index[index])


HELD = Lay()


def laid(
    parts: Iterable[Tensor], count: int, *, bound: int = HELD_BYTES, folder: File | None = None, tell: Callable[[str], None] = lambda text: None
) -> Tensor:
    """`parts`, each (some, ...) of one shape and type, as one tensor (count, ...) of `count` samples in all.

    More than `bound` bytes lie in a file in `folder`, or in that for temporary files; then one part at a time is in memory. `tell` hears so.
    Raises DataError where the disk is full or cannot be written to, and for parts that do not fit each other or make another number of samples.
    """
    source = iter(parts)
    first = next(source, None)
    if first is None:
        raise DataError("no samples", wanted="at least one", do="Give more data.")
    shape, size = (count, *first.shape[1:]), first[:1].nbytes * count
    every = _checked(first, source, count)
    if size <= bound:
        made, place = torch.empty(shape, dtype=first.dtype), 0
        for part in every:
            made[place : place + len(part)] = part
            place += len(part)
        return made
    lay = Lay(bound, folder)
    where = lay.place
    tell(f"{size / 1e9:.1f} GB of samples are laid into a file in {where}")
    try:
        where.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=where) as file:
            for part in every:
                file.write(part.contiguous().numpy().data)
            file.flush()
            # Shared, as a private one counts as memory that may be wanted, and is refused where it is larger than all there is.
            return torch.frombuffer(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_WRITE), dtype=first.dtype).view(shape)
    except OSError as error:
        raise lay.refused(error, f"room for {size / 1e9:.1f} GB of samples") from error


def gathered(samples: Any, feed: Any, *, bound: int = HELD_BYTES, folder: File | None = None, tell: Callable[[str], None] = lambda text: None) -> Tensor:
    """The inputs of all samples of a set of any kind, as `feed` makes them: `laid`."""
    return laid((inputs for inputs, _ in samples.batches(BATCH, feed)), len(samples), bound=bound, folder=folder, tell=tell)


def _checked(first: Tensor, rest: Iterable[Tensor], count: int) -> Iterable[Tensor]:
    """The parts, as long as they fit. Raises DataError."""
    seen, like = 0, (first.shape[1:], first.dtype)
    for part in _chained(first, rest):
        seen += len(part)
        if (part.shape[1:], part.dtype) != like or seen > count:
            found = f"{tuple(part.shape)} of {part.dtype} up to sample {seen}"
            raise DataError(found, wanted=f"{count} samples of shape {tuple(like[0])} and {like[1]}", do="Correct the data, or how it is made into inputs.")
        yield part
    if seen < count:
        raise DataError(f"{seen} samples", wanted=str(count), do="Read the data again: some went while it was read.")


def _chained(first: Tensor, rest: Iterable[Tensor]) -> Iterable[Tensor]:
    yield first
    yield from rest


def header_of(data: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of an array in an .npz. Raises what is in BROKEN."""
    with data.open(name) as member:
        shape, _, dtype = _told(member)
    return shape, dtype


def rows_of(file: File, name: str, rows: int) -> Iterator[Tensor]:
    """Rows of one array of an .npz, so many at a time. Raises what is in BROKEN, also where the data end too soon."""
    with zipfile.ZipFile(file) as data, data.open(name) as member:
        shape, by_columns, dtype = _told(member)
        if not by_columns:
            yield from _slabs(member.read, shape, dtype, rows)
            return
    with np.load(file, allow_pickle=False) as data:  # column by column: no row before the last byte
        yield _tensor(np.ascontiguousarray(data[name.removesuffix(".npy")]))


def _told(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order and type of the array that follows."""
    version = np.lib.format.read_magic(member)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"an array of version {version}")
    return (np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0)(member)


def _slabs(read: Callable[[int], bytes], shape: Sequence[int], dtype: np.dtype, rows: int) -> Iterator[Tensor]:
    each = math.prod(shape[1:]) * dtype.itemsize
    for start in range(0, shape[0], rows):
        wanted = min(rows, shape[0] - start)
        data = bytearray(read(wanted * each))
        if len(data) < wanted * each:
            raise ValueError(f"the data end in row {start + len(data) // each} of {shape[0]}")
        yield _tensor(np.frombuffer(data, dtype)).view(wanted, *shape[1:])


def _tensor(array: np.ndarray) -> Tensor:
    """Types that torch computes little with, or does not know, and other orders of bytes, as double precision."""
    kind, size = array.dtype.kind, array.dtype.itemsize
    return torch.from_numpy(array if array.dtype.isnative and size <= 8 and (kind != "u" or size == 1) else array.astype(np.float64))
