"""Recordings with labels, from folders; what cannot be used is named, never dropped in silence."""

from __future__ import annotations

import math
import wave
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path as File
from typing import IO

import torch
from torch import Tensor

from apportion.errors import DataError
from apportion.intake.folders import Listing, OnSkip, Split, batched, listed, parted, several_fit, usable

FORMATS = (".wav", ".flac", ".ogg")
SHORTEST_S, LONGEST_S = 0.025, 300.0  # one frame of a spectrogram; no more than the latter is ever read of one file
RATE_LIMIT, CHANNEL_LIMIT = 384_000, 32
LOOK_AHEAD = 16  # frames that a resampling filter wants beyond the last one that is kept
BLOCK = 2**16  # frames read at a time where a file is only checked
DO = "Repair, convert or remove the file."


@dataclass(frozen=True, slots=True, eq=False)
class AudioSet:
    """Recordings and their labels. A file is decoded when a batch asks for it."""

    files: tuple[File, ...]
    labels: Tensor | None  # (n,) int64; several, or numbers, (n, outputs) float
    classes: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...] = ()  # file, why

    def __post_init__(self) -> None:
        if self.labels is not None and len(self.labels) != len(self.files):
            raise DataError(f"{len(self.labels)} labels for {len(self.files)} recordings", wanted="one label for each recording", do="Correct the data.")

    def __len__(self) -> int:
        return len(self.files)

    def rows(self, index: Tensor | Sequence[int]) -> AudioSet:
        """The same set with these rows only, in this order."""
        rows = torch.as_tensor(index, dtype=torch.int64)
        return AudioSet(tuple(self.files[i] for i in rows.tolist()), None if self.labels is None else self.labels[rows], self.classes, self.skipped)

    def split(self, holdout: float, *, seed: int = 0) -> tuple[AudioSet, AudioSet]:
        """(rest, held out): `holdout` of the recordings, spread evenly over the classes, chosen by `seed`. Raises DataError where one side would be empty."""
        rest, held = parted(self.labels, len(self), holdout, seed=seed, what="recordings")
        return self.rows(rest), self.rows(held)

    def check(self, outputs: int) -> None:
        """Raises DataError, naming the first file whose label a network with so many outputs cannot give."""
        if self.labels is not None and self.labels.is_floating_point():
            return several_fit(self.labels, outputs, "recording")
        bad = [] if self.labels is None else ((self.labels < 0) | (self.labels >= outputs)).nonzero().flatten().tolist()
        if bad:
            assert self.labels is not None
            found = f"label {int(self.labels[bad[0]])} at {self.files[bad[0]]} ({len(bad)} such labels)"
            wanted = f"0 to {outputs - 1}, as the network has {outputs} outputs"
            raise DataError(found, wanted=wanted, do="Map class folders to outputs in a classes.json beside them.")

    def batches(self, batch: int, listen: Callable[[Sequence[File]], Tensor], *, seed: int | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """(inputs, labels) of `batch` recordings and a shorter rest; in order, or shuffled by `seed`. Raises DataError for a file changed since.

        Nothing but the batch asked for is in memory.
        """
        for rows in batched(len(self), batch, seed):
            some = self.rows(rows)
            yield listen(some.files), some.labels

    def sizes(self, listen: Callable[[Sequence[File]], Tensor]) -> None:
        """All are of one size."""


def read_audio_set(source: str | File, *, split: Split = "all", limit: int | None = None, on_skip: OnSkip | None = None) -> AudioSet:
    """Read one recording, or a folder: FOLDER/CLASS/FILE, FOLDER/train|val|test/CLASS/FILE, or recordings without labels.

    PCM in .wav needs nothing; floats in .wav, .flac and .ogg need the package soundfile. Labels of class folders are their place in the alphabet (in the
    order of numbers where all are numbers), or what FOLDER/classes.json, an object from folder name to label, says.
    Where the data brings no split of its own, every fifth recording of each class is `test`. `limit` keeps that many, spread evenly over the classes.
    Every file is opened once to see that it can be used; of PCM this costs its header and its last sample, of others one decode in pieces. What cannot is
    in `skipped` and told to `on_skip`: also what is shorter than SHORTEST_S or longer than LONGEST_S seconds.
    Raises DataError: nothing there, an empty class, more than half of the files bad.
    """
    if split not in ("train", "test", "all") or (limit is not None and limit < 1):
        raise DataError(f"split {split!r}, limit {limit}", wanted="train, test or all; at least 1", do="Correct them.")
    path = File(source)
    if not path.exists():
        raise DataError(f"no recording at {path}", wanted="a folder of recordings, or one", do="Correct the path.")
    if path.is_file():
        return _made(usable(path, Listing((path,)), fault, "recording", on_skip))
    return _made(usable(path, listed(path, split, limit, "recording"), fault, "recording", on_skip))


def _made(found: Listing) -> AudioSet:
    return AudioSet(found.files, found.labels, found.classes, found.skipped)


@dataclass(frozen=True, slots=True)
class _Sound:
    """An open recording, nothing of it decoded yet."""

    rate: int
    channels: int
    frames: int
    read: Callable[[int], Tensor]  # the next (frames, channels) of float32, fewer at the end
    seek: Callable[[int], object]
    plain: bool  # integers, one after the other: all are good if the last one is there


def decode(file: str | File, *, seconds: float = LONGEST_S) -> tuple[Tensor, int]:
    """(samples (n,) in -1..1, rate in Hz) of the first `seconds` of a file, and LOOK_AHEAD samples more: the mean of its channels. Raises DataError."""
    try:
        with File(file).open("rb") as handle:
            sound = _opened(File(file).suffix.lower(), handle)
            return _mono(sound, min(sound.frames, heard(seconds, sound.rate))), sound.rate
    except OSError as error:
        raise DataError(f"{file}: {error}", wanted="a file that can be read", do="Correct the path.") from error
    except DataError as error:
        raise DataError(f"{file}: {error.found}", wanted=error.wanted, do=error.do) from error


def heard(seconds: float, rate: int) -> int:
    """Samples at this rate that are needed for the first `seconds`."""
    return math.ceil(seconds * rate) + LOOK_AHEAD


def fault(file: File) -> str:
    """Why a file cannot be used; empty where it can."""
    try:
        with file.open("rb") as handle:
            sound = _opened(file.suffix.lower(), handle)
            if sound.plain:
                _mono(sound, 1, skip=sound.frames - 1)
            else:
                for start in range(0, sound.frames, BLOCK):
                    _mono(sound, min(BLOCK, sound.frames - start))
    except OSError as error:
        return str(error)
    except DataError as error:
        return f"found {error.found}; wanted {error.wanted}"
    return ""


def _opened(suffix: str, handle: IO[bytes]) -> _Sound:
    """The header only: sizes are checked before a single sample is decoded."""
    if suffix not in FORMATS:
        raise DataError(f"a file that ends in {suffix!r}", wanted=f"a recording: {', '.join(FORMATS)}", do=DO)
    if not handle.read(1):
        raise DataError("an empty file", wanted="a recording", do=DO)
    handle.seek(0)
    try:
        sound = _pcm(handle) if suffix == ".wav" else _other(handle)
    except DataError:
        raise
    except Exception as error:  # whatever a library trips over in bytes that may be anything is a fault of the file
        raise DataError(f"a file that does not open ({type(error).__name__}: {error})", wanted="a recording", do=DO) from error
    if not 0 < sound.rate <= RATE_LIMIT or not 0 < sound.channels <= CHANNEL_LIMIT:
        wanted = f"at most {CHANNEL_LIMIT} channels and {RATE_LIMIT} Hz"
        raise DataError(f"{sound.channels} channels at {sound.rate} Hz", wanted=wanted, do=DO)
    if not SHORTEST_S <= sound.frames / sound.rate <= LONGEST_S:
        raise DataError(f"{sound.frames / sound.rate:.4g} s of sound", wanted=f"{SHORTEST_S:g} to {LONGEST_S:g} s", do="Cut it into pieces, or remove it.")
    return sound


def _mono(sound: _Sound, frames: int, *, skip: int = 0) -> Tensor:
    """The mean over channels of the next frames, (n,)."""
    try:
        if skip:
            sound.seek(skip)
        samples = sound.read(frames)
    except Exception as error:  # as above
        raise DataError(f"a file that does not decode ({type(error).__name__}: {error})", wanted="a whole recording", do=DO) from error
    if len(samples) < frames:
        raise DataError(f"a file cut short: {len(samples)} of {frames} samples", wanted="a whole recording", do=DO)
    mono = samples.mean(1)
    if not mono.isfinite().all():
        raise DataError("samples that are no numbers", wanted="finite ones", do=DO)
    return mono


def _pcm(handle: IO[bytes]) -> _Sound:
    try:
        source = wave.open(handle)
    except wave.Error as error:
        if not str(error).startswith("unknown"):
            raise
        handle.seek(0)  # floats, or a longer header than this release of Python reads
        return _other(handle)
    width, channels = source.getsampwidth(), source.getnchannels()
    if width > 4:
        raise DataError(f"{8 * width} bits", wanted="8, 16, 24 or 32", do=DO)

    def read(frames: int) -> Tensor:
        data = source.readframes(frames)
        return _integers(data[: len(data) // (width * channels) * width * channels], width).view(-1, channels)

    return _Sound(source.getframerate(), channels, source.getnframes(), read, source.setpos, plain=True)


def _integers(data: bytes, width: int) -> Tensor:
    """Little-endian samples of so many bytes, in -1..1: each in the high bytes of 32 bits. Those of one byte count from 128."""
    if not data:
        return torch.empty(0)
    wide = torch.zeros(len(data) // width, 4, dtype=torch.uint8)
    wide[:, 4 - width :] = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(-1, width)
    if width == 1:
        wide[:, 3] ^= 0x80
    return wide.view(torch.int32).flatten().float().div_(2**31)


def _other(handle: IO[bytes]) -> _Sound:
    try:
        import soundfile  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        wanted = "PCM in .wav, or the package soundfile, which is in apportion[audio]"
        raise DataError("a format that needs soundfile", wanted=wanted, do="Install the extra: pip install 'apportion[audio]'.") from error
    source = soundfile.SoundFile(handle)

    def read(frames: int) -> Tensor:
        return torch.from_numpy(source.read(frames, dtype="float32", always_2d=True))

    return _Sound(source.samplerate, source.channels, source.frames, read, source.seek, plain=False)
