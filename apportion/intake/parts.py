"""Data for each purpose, pictures, texts and sound alike: who may see what is settled here, once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path as File
from typing import Any, Literal, Protocol, Self

from torch import Tensor

from apportion.errors import DataError, PlanError
from apportion.intake import audio, images
from apportion.intake.audio import AudioSet, read_audio_set
from apportion.intake.folders import allowed, counted
from apportion.intake.images import ImageSet, read_images
from apportion.intake.labelled import LAYOUT, NAME, check_column, read_labelled, tables
from apportion.intake.listen import Listen
from apportion.intake.masks import read_masked
from apportion.intake.preprocess import Preprocess
from apportion.intake.read import Source
from apportion.intake.rows import RowSet, Tabulate, read_rows
from apportion.intake.series import Align, SeriesSet, read_series
from apportion.intake.texts import TextSet, Tokenise, read_texts
from apportion.vocab import Task

CONTROL_ROWS = 4000  # samples that control learns from and is placed on, where all are free for it
FEWEST = 40  # samples from which anything is learned to decide
SHARES = {2: "half", 4: "a quarter", 8: "an eighth"}
Feed = Preprocess | Tokenise | Listen | Tabulate | Align
KINDS: dict[type, tuple[type, str]] = {
    Preprocess: (ImageSet, "images"),
    Tokenise: (TextSet, "texts"),
    Listen: (AudioSet, "recordings"),
    Tabulate: (RowSet, "rows"),
    Align: (SeriesSet, "series"),
}
MEDIA = (Preprocess, Listen)  # a file for each sample


class Samples(Protocol):
    """What the way from a model to a bundle asks of data: an ImageSet, a TextSet, an AudioSet, a RowSet or a SeriesSet. `feed` makes inputs of its samples."""

    @property
    def labels(self) -> Tensor | None: ...
    @property
    def classes(self) -> tuple[str, ...]: ...
    def __len__(self) -> int: ...
    def rows(self, index: Tensor | Sequence[int]) -> Self: ...
    def split(self, holdout: float, *, seed: int = 0) -> tuple[Self, Self]: ...
    def check(self, outputs: int) -> None: ...
    def batches(self, batch: int, feed: Any, /) -> Iterator[tuple[Tensor, Tensor | None]]: ...
    def sizes(self, feed: Any, /) -> Tensor | None: ...  # tokens of each sample, where they differ


class Reader(Protocol):
    def __call__(
        self, source: str | File, *, split: Literal["train", "test", "all"], limit: int | None = None, on_skip: Callable[[str, str], None] | None = None
    ) -> Samples: ...


def reader(feed: Feed | type[Feed], classes: Sequence[str] | None, columns: Mapping[str, str] | None = None, *, task: Task = "classification") -> Reader:
    """What reads data for a model that is fed so, or by this kind of feed, and has this task. Raises PlanError.

    `columns`: what "text", "pair" and "label" are called in tables, and "file" in those of labels of pictures and recordings.
    """
    kind, named = feed if isinstance(feed, type) else type(feed), dict(columns or {})
    if kind is Tabulate:
        if named.keys() - {"label"} or task not in ("classification", "multilabel", "regression"):
            found, wanted = f"{task} of rows, with columns for {', '.join(named) or 'nothing'}", "a class, several, or numbers; label, or nothing"
            raise PlanError(found, wanted=wanted, do="Correct them.")
        return partial(read_rows, classes=classes, label=named.get("label", "label"), task=task)
    if kind is not Tokenise:
        if named.keys() - ({"file", "label"} if kind in MEDIA else set()):
            wanted = f"file and label, of {NAME}.csv beside the files" if kind in MEDIA else "none"
            raise PlanError(f"columns for a model of {KINDS[kind][1]}: {', '.join(named)}", wanted=wanted, do="Leave them out.")
        if kind is Align and task in ("classification", "regression"):
            return partial(read_series, classes=classes, task=task)
        if task == "segmentation" and isinstance(feed, Preprocess):
            return partial(read_masked, feed=feed)
        if kind not in MEDIA or task not in ("classification", "embedding", "multilabel", "regression"):
            wanted = "a class or a number for each" if kind is Align else "a class for each, several, numbers, or an embedding"
            raise PlanError(f"{task} of {KINDS[kind][1]}", wanted=wanted, do="Name another task.")
        return partial(read_media, kind=kind, classes=classes, columns=named, task=task)
    if unknown := named.keys() - {"text", "pair", "label"}:
        raise PlanError(f"a column for {min(unknown)!r}", wanted="text, pair or label", do="Correct it.")
    return partial(read_texts, classes=classes, text=named.get("text", "text"), pair=named.get("pair"), label=named.get("label", "label"), task=task)


def read_media(
    source: str | File,
    *,
    kind: type,
    split: Literal["train", "test", "all"],
    classes: Sequence[str] | None,
    columns: Mapping[str, str],
    task: Task,
    limit: int | None = None,
    on_skip: Callable[[str, str], None] | None = None,
) -> ImageSet | AudioSet:
    """Pictures or recordings: by the table of labels beside them (`labelled`) where there is one, else by folders, which tell one class for each.

    Raises DataError where several labels or numbers are wanted, or a column is named, and no such table is there.
    """
    pictures, file = kind is Preprocess, columns.get("file", "file")
    if not tables(File(source), file):
        if columns or task not in ("classification", "embedding") or not _has_folders(File(source)):
            check_column(File(source), file)
        if columns or task not in ("classification", "embedding"):
            raise DataError(f"{source} without a table of labels that has a column {file!r}, for {task}", wanted=LAYOUT, do="Write one, or correct its name.")
        return (read_images if pictures else read_audio_set)(source, split=split, limit=limit, on_skip=on_skip)
    found, names = read_labelled(
        source,
        fault=images.fault if pictures else audio.fault,
        what=KINDS[kind][1].removesuffix("s"),
        split=split,
        file=file,
        label=columns.get("label", "label"),
        classes=classes,
        limit=limit,
        on_skip=on_skip,
        task=task,
    )
    return (ImageSet if pictures else AudioSet)(found.files, found.labels, names, found.skipped)


def _has_folders(source: File) -> bool:
    return source.is_dir() and any(child.is_dir() for child in source.iterdir())


@dataclass(frozen=True, slots=True)
class Parts:
    """Disjoint samples for each purpose: to teach the network, to teach the controller, to place it, to report on, once, and to certify the tolerance on."""

    teach: Samples | None
    decide: Samples
    place: Samples
    report: Samples
    certify: Samples | None = None  # for a plan that asks for confidence

    @classmethod
    def read(
        cls,
        data: str | File,
        *,
        seed: int,
        teach: bool = True,
        certify: bool = False,
        tell: Callable[[str], None] = lambda text: None,
        read: Reader = read_images,
    ) -> Parts:
        """The test samples are for the report; of the others a fifth is held out for control, or where nothing is taught all, as far as CONTROL_ROWS goes.

        Of what is held out half certifies where that is asked for. Where a fifth is less than FEWEST for each purpose, more is held out, up to a half.
        """

        def skip(where: str, why: str) -> None:
            tell(f"left out {where}: {why}")

        with allowed():
            if teach:
                every = read(data, split="train", on_skip=skip)
                taught, held = every.split(min(0.5, max(0.2, (4 if certify else 2) * (FEWEST + 1) / len(every))), seed=seed)
            else:
                taught, held = None, read(data, split="train", limit=CONTROL_ROWS, on_skip=skip)
            held, kept = held.split(0.5, seed=seed + 1) if certify else (held, None)
            decide, place = held.split(0.5, seed=seed)
            return cls(taught, decide, place, read(data, split="test", on_skip=skip), kept)

    def suffice(self, what: str) -> None:
        """Raises DataError, with what is needed, where the samples are too few to learn decisions from: before anything is trained or tried."""
        if len(self.decide) >= FEWEST:
            return
        parts = ((self.decide, "to learn decisions from"), (self.place, "to set the tolerance by"), (self.teach, "to teach"), (self.certify, "to certify on"))
        found = f"{', '.join(f'{counted(len(part), what)} {why}' for part, why in parts if part is not None)}, and {len(self.report)} for the test"
        share = 2 * (1 if self.certify is None else 2) * (1 if self.teach is None else 2)
        wanted = f"at least {FEWEST} to learn decisions from: {share * FEWEST} beside those for the test, of which {SHARES[share]} goes there"
        raise DataError(found, wanted=wanted, do="Give more data; without a test of its own every fifth is taken for that.")

    def unlabelled(self) -> Self:
        """The same without labels: what has none of its own is measured by the model that was read."""
        every = ((entry.name, getattr(self, entry.name)) for entry in fields(self))
        return replace(self, **{name: bare(samples) for name, samples in every if samples is not None})

    def check(self, outputs: int) -> None:
        """Raises DataError for the first label that a network with so many outputs cannot give; what teaches is checked by its teacher."""
        for samples in (self.decide, self.place, self.report, self.certify):
            if samples is not None:
                samples.check(outputs)


def bare(samples: Samples) -> Samples:
    """The same samples without labels."""
    kind: Any = samples  # each kind is a dataclass, which a protocol cannot say
    return replace(kind, labels=None)


def matched(source: Source, parts: Parts) -> Source:
    """The source fed as these samples want it: pairs of texts come with token types, and then all do. Raises DataError where the two are of different kinds."""
    feed, every = source.feed, [samples for samples in (parts.teach, parts.decide, parts.place, parts.report, parts.certify) if samples is not None]
    kind, wanted = KINDS[type(feed)]
    for samples in every:
        if not isinstance(samples, kind):
            found = next(name for other, name in KINDS.values() if isinstance(samples, other))
            raise DataError(f"{found} for a model of {wanted}", wanted=wanted, do="Give other data, or another model.")
    if not isinstance(feed, Tokenise):
        return source
    a = source.network.architecture
    pairs = any(isinstance(samples, TextSet) and samples.pairs for samples in every)
    if pairs and a.token_types < 2:
        raise DataError("pairs of texts", wanted="single texts: this model tells no pairs apart", do="Join them, or take another model.")
    return replace(source, feed=replace(feed, pairs=pairs or feed.pairs))
