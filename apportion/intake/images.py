"""Pictures with labels, from folders, `.npz` files or the digits that scikit-learn ships; what cannot be used is named, never dropped in silence."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from torch import Tensor

from apportion.errors import DataError
from apportion.intake.preprocess import Preprocess

Split = Literal["train", "test", "all"]
OnSkip = Callable[[str, str], None]

PIXEL_LIMIT = 64 * 2**20
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
HELD_OUT = 0.2
FOLDERS = {"train": ("train",), "test": ("test", "val", "validation")}


@dataclass(frozen=True, slots=True, eq=False)
class ImageSet:
    """Pictures and their labels. Arrays are kept as they are, files are decoded when a batch asks for them."""

    images: np.ndarray | tuple[File, ...]  # uint8 (n, rows, columns, 3), or files
    labels: Tensor | None  # (n,) int64
    classes: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...] = ()  # file, why

    def __post_init__(self) -> None:
        if self.labels is not None and len(self.labels) != len(self.images):
            raise DataError(f"{len(self.labels)} labels for {len(self.images)} images", wanted="one label for each image", do="Correct the data.")

    def __len__(self) -> int:
        return len(self.images)

    def rows(self, index: Tensor | Sequence[int]) -> ImageSet:
        """The same set with these rows only, in this order."""
        rows = torch.as_tensor(index, dtype=torch.int64)
        images = self.images[rows.numpy()] if isinstance(self.images, np.ndarray) else tuple(self.images[i] for i in rows.tolist())
        return ImageSet(images, None if self.labels is None else self.labels[rows], self.classes, self.skipped)

    def split(self, holdout: float, *, seed: int = 0) -> tuple[ImageSet, ImageSet]:
        """(rest, held out): `holdout` of the images, spread evenly over the classes, chosen by `seed`. Raises DataError where one side would be empty."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        held = spread(self.labels, order, holdout)
        if held.all() or not held.any():
            raise DataError(
                f"{len(self)} images, of which {holdout:g} shall be held out", wanted="at least one image on either side", do="Give more data or another share."
            )
        return self.rows((~held).nonzero().flatten()), self.rows(held.nonzero().flatten())

    def check(self, outputs: int) -> None:
        """Raises DataError, naming the first row whose label a network with so many outputs cannot give."""
        if self.labels is None or not len(self):
            return
        bad = ((self.labels < 0) | (self.labels >= outputs)).nonzero().flatten()
        if len(bad):
            row = int(bad[0])
            name = f"row {row}" if isinstance(self.images, np.ndarray) else str(self.images[row])
            wanted = f"0 to {outputs - 1}, as the network has {outputs} outputs"
            raise DataError(
                f"label {int(self.labels[row])} at {name} ({len(bad)} such labels)",
                wanted=wanted,
                do="Map class folders to outputs in a classes.json beside them.",
            )

    def batches(self, batch: int, preprocess: Preprocess, *, seed: int | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """(inputs, labels) of `batch` images and a shorter rest; in order, or shuffled by `seed`. Raises DataError for a file changed since."""
        order = torch.arange(len(self)) if seed is None else torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        for rows in order.split(batch):
            part = self.images[rows.numpy()] if isinstance(self.images, np.ndarray) else [decode(self.images[i]) for i in rows.tolist()]
            yield preprocess(part), None if self.labels is None else self.labels[rows]

    def sizes(self, preprocess: Preprocess) -> None:
        """All are of one size."""


def spread(labels: Tensor | None, order: Tensor, share: float) -> Tensor:
    """Bool (n,): `share` of the samples, every k-th in `order` within each class, so that no class is off by more than one."""
    if labels is not None:
        order = order[labels[order].argsort(stable=True)]
    steps = torch.arange(len(order) + 1, dtype=torch.float64).mul(share).add(1e-9).floor()
    chosen = torch.zeros(len(order), dtype=torch.bool)
    chosen[order[steps[1:] > steps[:-1]]] = True
    return chosen


def read_images(source: str | File, *, split: Split = "all", limit: int | None = None, on_skip: OnSkip | None = None) -> ImageSet:
    """Read `digits`, an `.npz`, one image, or a folder: FOLDER/CLASS/FILE, FOLDER/train|val|test/CLASS/FILE, or images without labels.

    `digits`: the 1797 handwritten digits of scikit-learn, 8 x 8 pixels in 17 greys, each pixel doubled to 2 x 2 and given three channels: (n, 16, 16, 3).
    `.npz`: x_train, y_train, x_test, y_test; uint8 (n, rows, columns, 3) and integers. Labels of class folders are their place in the alphabet (in the
    order of numbers where all are numbers), or what FOLDER/classes.json, an object from folder name to label, says.
    Where the data brings no split of its own, every fifth image of each class is `test`. `limit` keeps that many, spread evenly over the classes.
    Every file is decoded once to see that it can be; the cost is one decode at reduced size. What cannot is in `skipped` and told to `on_skip`.
    Raises DataError: nothing there, an empty class, more than half of the files bad, labels or arrays that do not fit.
    """
    if split not in ("train", "test", "all"):
        raise DataError(f"split {split!r}", wanted="train, test or all", do="Give one of these.")
    if limit is not None and limit < 1:
        raise DataError(f"limit {limit}", wanted="at least 1", do="Leave it out to use all images.")
    if str(source) == "digits":
        return _cut(_digits(), split, limit)
    path = File(source)
    if not path.exists():
        raise DataError(f"no file or folder {path}", wanted="a folder of images, an image, an .npz file, or `digits`", do="Correct the path.")
    if path.suffix.lower() == ".npz":
        return _cut(_arrays(path, split), "all", limit)
    if path.is_file():
        return _decodable(path, ImageSet((path,), None, ()), on_skip)
    found, own_split = _folder(path, split)
    return _decodable(path, _cut(found, "all" if own_split else split, limit), on_skip)


def _cut(images: ImageSet, split: Split, limit: int | None) -> ImageSet:
    if split != "all":
        test = spread(images.labels, torch.arange(len(images)), HELD_OUT)
        images = images.rows((test if split == "test" else ~test).nonzero().flatten())
    if limit is not None and limit < len(images):
        images = images.rows(spread(images.labels, torch.arange(len(images)), limit / len(images)).nonzero().flatten())
    if not len(images):
        raise DataError(f"no image in split {split!r}", wanted="at least one", do="Give more data, or use split='all'.")
    return images


def _digits() -> ImageSet:
    data: Any = load_digits()
    grey = np.rint(data.images * (255 / 16)).astype(np.uint8).repeat(2, 1).repeat(2, 2)
    return ImageSet(np.repeat(grey[..., None], 3, -1), torch.from_numpy(data.target).long(), tuple(map(str, data.target_names)))


def _arrays(file: File, split: Split) -> ImageSet:
    wanted = "x_train, y_train, x_test and y_test: uint8 (n, rows, columns, 3) and integers (n,)"
    try:
        with file.open("rb") as handle, np.load(handle, allow_pickle=False) as data:
            parts = {name: data[name] for name in ("x_train", "y_train", "x_test", "y_test")}
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{file}: {error}", wanted=wanted, do="Write it with numpy.savez; arrays of objects are not read.") from error
    for name in ("train", "test"):
        x, y = parts[f"x_{name}"], parts[f"y_{name}"]
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[-1] != 3:
            raise DataError(f"{file}: x_{name} of shape {x.shape} and type {x.dtype}", wanted=wanted, do="Convert the images to RGB in 8 bits, channels last.")
        if y.dtype.kind not in "iu" or y.ndim != 1 or len(y) != len(x):
            raise DataError(
                f"{file}: y_{name} of shape {y.shape} and type {y.dtype} for {len(x)} images", wanted=wanted, do="Give one class number for each image."
            )
        if not len(x):
            raise DataError(f"{file}: x_{name} is empty", wanted="at least one image", do="Put images into both parts.")
    outputs = int(parts["y_train"].max()) + 1
    classes = tuple(map(str, range(outputs)))
    sets = {name: ImageSet(parts[f"x_{name}"], torch.from_numpy(parts[f"y_{name}"].astype(np.int64)), classes) for name in ("train", "test")}
    for name, images in sets.items():
        assert images.labels is not None
        bad = ((images.labels < 0) | (images.labels >= outputs)).nonzero().flatten()
        if len(bad):
            found = f"{file}: label {int(images.labels[bad[0]])} in row {int(bad[0])} of y_{name}"
            raise DataError(found, wanted=f"0 to {outputs - 1}, the classes of y_train", do="Correct the labels.")
    if split != "all":
        return sets[split]
    if parts["x_train"].shape[1:] != parts["x_test"].shape[1:]:
        found = f"{file}: images of {parts['x_train'].shape[1:]} in x_train and {parts['x_test'].shape[1:]} in x_test"
        raise DataError(found, wanted="one size for both", do="Resize one of them, or read one split at a time.")
    return ImageSet(np.concatenate([parts["x_train"], parts["x_test"]]), torch.cat([s.labels for s in sets.values() if s.labels is not None]), classes)


def _folder(root: File, split: Split) -> tuple[ImageSet, bool]:
    """The files below a folder, and whether it brings a split of its own."""
    known = {name for names in FOLDERS.values() for name in names}
    splits = {folder.name: folder for folder in _children(root) if folder.is_dir() and folder.name in known}
    if not splits:
        return _classes(root, [root], [root]), False
    if split == "all":
        return _classes(root, list(splits.values()), list(splits.values())), True
    here = next((splits[name] for name in FOLDERS[split] if name in splits), None)
    if here is None:
        wanted = f"one of {', '.join(FOLDERS[split])}"
        raise DataError(f"{root} with folders {', '.join(splits)}", wanted=wanted, do=f"Add the folder, or use split='all' (asked for: {split!r}).")
    return _classes(root, [here], list(splits.values())), True


def _classes(root: File, roots: list[File], every: list[File]) -> ImageSet:
    """The files below `roots`; labels are the same in `every` split, also where a class is missing in one of them."""
    names = {folder.name for place in every for folder in _children(place) if folder.is_dir()}
    loose = tuple(file for place in roots for file in _children(place) if file.is_file() and file.name != "classes.json")
    if not names:
        if not loose:
            raise DataError(f"no image in {root}", wanted="FOLDER/CLASS/IMAGE, or images", do="Correct the path.")
        return ImageSet(loose, None, ())
    label = _labels(root / "classes.json", names)
    files, labels = [], []
    for place in roots:
        for folder in filter(File.is_dir, _children(place)):
            inside = [file for file in sorted(folder.rglob("*")) if file.is_file() and not file.name.startswith(".")]
            if not inside:
                raise DataError(f"no file in class folder {folder}", wanted="at least one image", do="Fill the folder or remove it.")
            files += inside
            labels += [label[folder.name]] * len(inside)
    number = {index: name for name, index in label.items()}
    classes = tuple(number.get(index, str(index)) for index in range(max(number) + 1))
    return ImageSet(tuple(files), torch.tensor(labels), classes, tuple((str(file), "lies beside the class folders, not in one") for file in loose))


def _labels(mapping: File, names: set[str]) -> dict[str, int]:
    if not mapping.exists():
        return {name: index for index, name in enumerate(sorted(names, key=int if all(n.isdecimal() for n in names) else None))}
    try:
        data: Any = json.loads(mapping.read_text("utf-8"))
    except ValueError as error:
        raise DataError(f"{mapping}: {error}", wanted="a JSON object from folder name to label", do="Correct the file.") from error
    if not isinstance(data, dict) or not all(type(value) is int and value >= 0 for value in data.values()) or len(set(data.values())) != len(data):
        raise DataError(f"{mapping} that is not a map to different whole numbers from 0", wanted='such as {"cat": 0, "dog": 1}', do="Correct the file.")
    if missing := sorted(names - data.keys()):
        raise DataError(f"class folder {missing[0]!r}, which {mapping} does not name", wanted="a label for every folder", do="Add it to the file.")
    return {name: data[name] for name in data}


def _children(folder: File) -> list[File]:
    return sorted(child for child in folder.iterdir() if not child.name.startswith("."))


def _decodable(source: File, images: ImageSet, on_skip: OnSkip | None) -> ImageSet:
    """Only the files that decode; the others are told."""
    assert isinstance(images.images, tuple)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        reasons = list(pool.map(_fault, images.images))
    bad = tuple((str(file), why) for file, why in zip(images.images, reasons, strict=True) if why)
    if 2 * len(bad) > len(images):
        found = f"{len(bad)} of {len(images)} files that are no usable images in {source}, such as {bad[0][0]}: {bad[0][1]}"
        raise DataError(found, wanted="at most half of them bad", do="Correct or remove them.")
    skipped = (*images.skipped, *bad)
    for file, why in skipped if on_skip else ():
        assert on_skip is not None
        on_skip(file, why)
    kept = images.rows([index for index, why in enumerate(reasons) if not why])
    return ImageSet(kept.images, kept.labels, kept.classes, skipped)


def _fault(file: File) -> str:
    """Why a file cannot be used; empty where it can. JPEG decodes at an eighth of its size, which still reads every byte."""
    try:
        with _open(file) as image:
            image.draft("RGB", (1, 1))
            _rgb(image)
    except DataError as error:
        return f"found {error.found}; wanted {error.wanted}"
    return ""


def decode(file: str | File) -> Image.Image:
    """One picture as 8-bit RGB, upright (EXIF); alpha is dropped as timm does, 16-bit greys are scaled. Raises DataError naming the file."""
    try:
        with _open(File(file)) as image:
            return _rgb(image)
    except DataError as error:
        raise DataError(f"{file}: {error.found}", wanted=error.wanted, do=error.do) from error


def _open(file: File) -> Image.Image:
    """The header only: the size is checked before a single pixel is decoded."""
    do, wanted = "Repair, convert or remove the file.", f"an image of at most {PIXEL_LIMIT} pixels, in one of {', '.join(FORMATS)}"
    try:
        image = Image.open(file, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"far too large a picture ({error})", wanted=wanted, do=do) from error
    except Exception as error:  # whatever an image library trips over in bytes that may be anything is a fault of the file
        raise DataError(f"a file that does not open ({type(error).__name__})", wanted=wanted, do=do) from error
    if image.width * image.height > PIXEL_LIMIT:
        image.close()
        raise DataError(f"{image.width} x {image.height} pixels", wanted=wanted, do=do)
    return image


def _rgb(image: Image.Image) -> Image.Image:
    try:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I;16"):
            return Image.fromarray((np.asarray(upright).astype(np.uint32) // 257).astype(np.uint8)).convert("RGB")
        if upright.mode in ("I", "F"):
            raise DataError(f"pixels of mode {upright.mode}", wanted="8 or 16 bits, whose range is known", do="Convert the file to 8 bits.")
        return upright.convert("RGBA").convert("RGB") if "transparency" in upright.info else upright.convert("RGB")
    except DataError:
        raise
    except Exception as error:  # as above
        raise DataError(
            f"a file that does not decode ({type(error).__name__}: {error})", wanted="a whole image", do="Repair, convert or remove the file."
        ) from error
