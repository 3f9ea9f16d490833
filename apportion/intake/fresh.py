"""What data alone say of a network that is to be trained on them: their kind, how they are fed, and a shape of moderate size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path as File

from apportion.errors import DataError, PlanError
from apportion.intake import audio, labels
from apportion.intake.folders import allowed
from apportion.intake.labelled import tables as told
from apportion.intake.listen import Listen
from apportion.intake.parts import KINDS, Feed, Samples
from apportion.intake.preprocess import Preprocess
from apportion.intake.rows import RowSet, Tabulate
from apportion.intake.series import Align, SeriesSet, holds_series
from apportion.intake.shards import SUFFIXES, columns_of, ending
from apportion.intake.texts import TextSet, Tokenise
from apportion.intake.vocabulary import entries, learned
from apportion.network import Architecture
from apportion.vocab import Task

SHAPES: dict[type, Architecture] = {
    Preprocess: Architecture(image_size=32, patch=4, dim=96, depth=6, heads=3, hidden=384, classes=1, stem="conv"),
    Tokenise: Architecture(0, 0, dim=128, depth=6, heads=4, hidden=512, classes=1, words=1, length=128, positions=128, class_token=False, pool="mean"),
    Listen: Architecture(0, 0, dim=96, depth=6, heads=3, hidden=384, classes=1, frames=100, bands=40, class_token=False, pool="mean"),
    Tabulate: Architecture(0, 0, dim=64, depth=4, heads=4, hidden=128, classes=1, numbers=1),
    Align: Architecture(0, 0, dim=64, depth=6, heads=4, hidden=128, classes=1, class_token=False, pool="mean"),
}
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
COLUMNS = "Name the columns, --columns label=NAME,text=NAME; they stand in the first line of a table."
FOLDERS = "Put the files of each class into a folder of their own, or a labels.csv beside them."
LABELLED: dict[type, str] = {
    Preprocess: FOLDERS,
    Tokenise: COLUMNS,
    Listen: FOLDERS,
    Tabulate: COLUMNS,
    Align: "Add them: y in an .npz, the first cell of each line in a .tsv or .csv, @classLabel in a .ts.",
}
PATCHES = 64  # that a series is cut into at most, where the shape does not say how long they are
HZ = 16000  # of sound of which nothing is said


def kind_of(data: str | File, columns: Mapping[str, str] | None = None) -> type[Feed]:
    """How data are to be fed.

    Tables, and folders without folders in them that hold some, are texts if they have a column "text" (or what `columns` calls so), and else rows of numbers
    and categories. Files of series, and folders with such for train or test, are series (`archive.is_series`). Other folders, and those with a table of
    labels (`labelled.tables`), are recordings or images by the endings of their files; `digits` and other .npz files are images. Raises DataError where
    nothing is there, and where `columns` names a column of texts that is not.
    """
    with allowed():
        return _kind_of(data, File(data), dict(columns or {}))


def _kind_of(data: str | File, source: File, named: dict[str, str]) -> type[Feed]:
    if source.is_dir() and not any(file.is_file() for file in source.rglob("*")):
        raise DataError(f"{source} without any file", wanted="tables, pictures, recordings or series in it", do="Correct the path, or fill the folder.")
    if told(source, named.get("file", "file")):
        return _of_files(source, told=True)
    if not named and holds_series(source):
        return Align
    if str(data) == "digits" or source.suffix == ".npz":
        return Preprocess
    if not source.exists():
        raise DataError(f"no file or folder {source}", wanted="a table, an .npz file, a folder, or `digits`", do="Correct the path.")
    inside = [source] if source.is_file() else sorted(source.iterdir())
    tables = [file for file in inside if file.is_file() and ending(file)]
    media = [file for file in inside if file.suffix.lower() in (*audio.FORMATS, *PICTURES)]
    if not tables or len(media) > len(tables) or any(child.is_dir() for child in inside):
        return _of_files(source)
    if named.get("text", "text") in (columns_here := columns_of(tables[0])):
        return Tokenise
    if "text" in named:
        found = f"{tables[0]} without a column {named['text']!r}, its columns being {', '.join(columns_here) or 'none'}"
        raise DataError(found, wanted="a column of texts", do="Say what the texts' column is called, --columns text=NAME.")
    return Tabulate


def kind_called(name: str) -> type[Feed]:
    """The feed of "images", "texts" and so on. Raises PlanError."""
    for kind, (_, called) in KINDS.items():
        if called == name:
            return kind
    raise PlanError(f"kind {name!r}", wanted=f"one of {', '.join(called for _, called in KINDS.values())}", do="Name one of these.")


def blank(kind: type[Feed], shape: Architecture | None, length: int | None) -> Feed | type[Feed]:
    """The feed of this kind for a network of this shape; the kind itself, where only samples can tell."""
    a = shape or SHAPES[kind]
    if length is not None and kind not in (Tokenise, Listen, Align):
        raise PlanError(f"a length of {length} for {KINDS[kind][1]}", wanted="none", do="Leave it out.")
    if kind is Preprocess:
        return Preprocess(a.image_size, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    if kind is Listen:
        if not a.frames or a.patch:
            raise PlanError("sound of which nothing is said", wanted="a feed, for this architecture", do="Pass feed=Listen(...).")
        return Listen("whisper", HZ, length or a.frames, bands=a.bands, window=HZ // 40, hop=HZ // 100)
    return kind


def fitted(
    feed: Feed | type[Feed], samples: Samples, shape: Architecture | None, *, task: Task, length: int | None, vocabulary: int
) -> tuple[Feed, Architecture]:
    """The feed, learned from these samples where it is a kind, and the shape with all that the data say: outputs, and entries and length of texts.

    `samples`: those that teach, and no others. Raises DataError where they have no labels.
    """
    kind = feed if isinstance(feed, type) else type(feed)
    a, what = shape or SHAPES[kind], KINDS[kind][1]
    if samples.labels is None or task == "embedding":
        columns = f" (columns {', '.join(samples.cells[0])})" if isinstance(samples, RowSet) else ""
        found = f"{what} without labels{columns}{', which an embedding leaves alone' if task == 'embedding' else ''}"
        raise DataError(found, wanted="a class for each, or what else is to be learned", do=LABELLED[kind])
    a = replace(
        a,
        classes=samples.labels.shape[1] if task == "regression" else len(samples.classes),
        task=task,
        span=labels.span([samples.labels]) if task == "regression" else 0.0,
        pool="every_token" if task in ("token_classification", "segmentation") else a.pool,
    )
    if isinstance(feed, type):
        assert isinstance(samples, TextSet | RowSet | SeriesSet)  # other kinds need no samples
        if isinstance(samples, TextSet):
            feed = learned(samples.texts, length=length or a.length, size=vocabulary)
        else:
            feed = Tabulate.learned(samples.cells) if isinstance(samples, RowSet) else Align.learned(samples.values, length=length or a.points or None)
    if isinstance(feed, Tokenise):
        kinds = max(a.token_types, 2) if feed.pairs else a.token_types
        n = feed.length
        return feed, replace(a, words=entries(feed), padding=feed.padding, length=n, positions=n if a.positions else 0, token_types=kinds)
    if isinstance(feed, Tabulate):
        if len(names := [*feed.numbers, *feed.categories]) < 2:
            do = f"Add a column; if this one holds texts, say so: --columns text={names[0]}."
            raise DataError(f"rows of one column, {names[0]!r}", wanted="two or more: what is decided by is how their tokens differ", do=do)
        return feed, replace(a, numbers=len(feed.numbers), categories=feed.entries)
    if isinstance(feed, Align):
        stride = a.stride or math.ceil(feed.length / PATCHES)
        return feed, replace(a, points=feed.length, channels=feed.channels, stride=stride, patch=a.patch or min(2 * stride, feed.length))
    return feed, replace(a, frames=feed.length) if isinstance(feed, Listen) and a.frames else a


def _of_files(source: File, *, told: bool = False) -> type[Feed]:
    """Sound where half of the files are called so; else pictures, whose reader names what is none. Raises DataError where no file is called like either, and
    no table of labels has `told` of them."""
    found = [source] if source.is_file() else [file for file in source.rglob("*") if file.is_file() and not file.name.startswith(".")]
    endings = [file.suffix.lower() for file in found]
    if not told and not any(suffix in (*audio.FORMATS, *PICTURES) for suffix in endings):
        wanted = f"a table ({', '.join(SUFFIXES)}), series (.ts, .npz), pictures ({', '.join(PICTURES)}) or recordings ({', '.join(audio.FORMATS)})"
        do = "Convert the data; of other endings say what they are, such as --kind images."
        raise DataError(f"{source}, of which nothing tells what it is ({found[0].name})", wanted=wanted, do=do)
    heard = sum(suffix in audio.FORMATS for suffix in endings)
    return Listen if heard and 2 * heard >= len(found) else Preprocess
