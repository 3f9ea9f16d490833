"""Pictures with labels, from folders, `.npz` files or the digits that scikit-learn ships; what cannot be used is named, never dropped in silence."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from torch import Tensor

from apportion.errors import DataError
from apportion.intake.folders import Listing, OnSkip, Split, batched, cut, listed, parted, several_fit, usable
from apportion.intake.labels import outside
from apportion.intake.laid import BATCH, BROKEN, HELD, HELD_BYTES, Chosen, Lay, header_of, laid, rows_of
from apportion.intake.preprocess import Preprocess

PIXEL_LIMIT = 64 * 2**20
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


@dataclass(frozen=True, slots=True, eq=False)
class ImageSet:
    """Pictures and their labels. Arrays are kept as they are, or lie in a file; files of pictures are decoded when a batch asks for them."""

    images: np.ndarray | Chosen | tuple[File, ...]  # uint8 (n, rows, columns, 3), or files
    labels: Tensor | None  # (n,) int64; of every pixel (n, size, size) int16; several, or numbers, (n, outputs) float
    classes: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...] = ()  # file, why
    lay: Lay = HELD  # of labels

    def __post_init__(self) -> None:
        if self.labels is not None and len(self.labels) != len(self.images):
            raise DataError(f"{len(self.labels)} labels for {len(self.images)} images", wanted="one label for each image", do="Correct the data.")

    def __len__(self) -> int:
        return len(self.images)

    def rows(self, index: Tensor | Sequence[int]) -> ImageSet:
        """The same set with these rows only, in this order."""
        rows = torch.as_tensor(index, dtype=torch.int64)
        if isinstance(self.images, tuple):
            images = tuple(self.images[i] for i in rows.tolist())
        else:
            images = self.images.rows(rows) if isinstance(self.images, Chosen) else self.images[rows.numpy()]
        return ImageSet(images, None if self.labels is None else self.lay.picked(self.labels, rows), self.classes, self.skipped, self.lay)

    def split(self, holdout: float, *, seed: int = 0) -> tuple[ImageSet, ImageSet]:
        """(rest, held out): `holdout` of the images, spread evenly over the classes, chosen by `seed`. Raises DataError where one side would be empty."""
        rest, held = parted(self.labels, len(self), holdout, seed=seed, what="images")
        return self.rows(rest), self.rows(held)

    def check(self, outputs: int) -> None:
        """Raises DataError, naming the first row whose label a network with so many outputs cannot give."""
        if self.labels is None or not len(self):
            return
        if self.labels.is_floating_point():
            return several_fit(self.labels, outputs, "picture")
        if bad := outside(self.labels, outputs):
            row = bad[0]
            name = str(self.images[row]) if isinstance(self.images, tuple) else f"row {row}"
            wanted = f"0 to {outputs - 1}, as the network has {outputs} outputs"
            raise DataError(
                f"label {int(self.labels[row].max())} at {name} ({len(bad)} such images)",
                wanted=wanted,
                do="Map class folders to outputs in a classes.json beside them.",
            )

    def batches(self, batch: int, preprocess: Preprocess, *, seed: int | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """(inputs, labels) of `batch` images and a shorter rest; in order, or shuffled by `seed`. Raises DataError for a file changed since."""
        for rows in batched(len(self), batch, seed):
            part = [decode(self.images[i]) for i in rows.tolist()] if isinstance(self.images, tuple) else self.images[rows.numpy()]
            labels = None if self.labels is None else self.labels[rows]
            yield preprocess(part), labels.long() if labels is not None and labels.dtype == torch.int16 else labels  # masks are held in short

    def sizes(self, preprocess: Preprocess) -> None:
        """All are of one size."""


def read_images(
    source: str | File,
    *,
    split: Split = "all",
    limit: int | None = None,
    on_skip: OnSkip | None = None,
    bound: int = HELD_BYTES,
    folder: File | None = None,
) -> ImageSet:
    """Read `digits`, an `.npz`, one image, or a folder: FOLDER/CLASS/FILE, FOLDER/train|val|test/CLASS/FILE, or images without labels.

    `digits`: the 1797 handwritten digits of scikit-learn, 8 x 8 pixels in 17 greys, each pixel doubled to 2 x 2 and given three channels: (n, 16, 16, 3).
    `.npz`: x_train, y_train, x_test, y_test; uint8 (n, rows, columns, 3) and integers; more than `bound` bytes are `laid` into a file in `folder`.
    Labels of class folders are their place in the alphabet (in the order of numbers where all are numbers), or what FOLDER/classes.json, an object from
    folder name to label, says.
    Where the data brings no split of its own, every fifth image of each class is `test`. `limit` keeps that many, spread evenly over the classes.
    Every file is decoded once to see that it can be; the cost is one decode at reduced size. What cannot is in `skipped` and told to `on_skip`.
    Raises DataError: nothing there, an empty class, more than half of the files bad, labels or arrays that do not fit.
    """
    if split not in ("train", "test", "all"):
        raise DataError(f"split {split!r}", wanted="train, test or all", do="Give one of these.")
    if limit is not None and limit < 1:
        raise DataError(f"limit {limit}", wanted="at least 1", do="Leave it out to use all images.")
    if str(source) == "digits":
        return cut(_digits(), split, limit, "image")
    path = File(source)
    if not path.exists():
        raise DataError(f"no file or folder {path}", wanted="a folder of images, an image, an .npz file, or `digits`", do="Correct the path.")
    if path.suffix.lower() == ".npz":
        return cut(_arrays(path, split, bound, folder), "all", limit, "image")
    if path.is_file():
        return _made(usable(path, Listing((path,)), fault, "image", on_skip))
    return _made(usable(path, listed(path, split, limit, "image"), fault, "image", on_skip))


def _made(found: Listing) -> ImageSet:
    return ImageSet(found.files, found.labels, found.classes, found.skipped)


def _digits() -> ImageSet:
    data: Any = load_digits()
    grey = np.rint(data.images * (255 / 16)).astype(np.uint8).repeat(2, 1).repeat(2, 2)
    return ImageSet(np.repeat(grey[..., None], 3, -1), torch.from_numpy(data.target).long(), tuple(map(str, data.target_names)))


def _arrays(file: File, split: Split, bound: int, folder: File | None) -> ImageSet:
    wanted = "x_train, y_train, x_test and y_test: uint8 (n, rows, columns, 3) and integers (n,)"
    try:
        with zipfile.ZipFile(file) as data:
            kinds = {name: header_of(data, f"x_{name}.npy") for name in ("train", "test")}
        with file.open("rb") as handle, np.load(handle, allow_pickle=False) as data:
            given = {name: data[f"y_{name}"] for name in kinds}
    except BROKEN as error:
        raise DataError(f"{file}: {error}", wanted=wanted, do="Write it with numpy.savez; arrays of objects are not read.") from error
    for name, (shape, dtype) in kinds.items():
        y = given[name]
        if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3:
            raise DataError(f"{file}: x_{name} of shape {shape} and type {dtype}", wanted=wanted, do="Convert the images to RGB in 8 bits, channels last.")
        if y.dtype.kind not in "iu" or y.ndim != 1 or len(y) != shape[0]:
            raise DataError(
                f"{file}: y_{name} of shape {y.shape} and type {y.dtype} for {shape[0]} images", wanted=wanted, do="Give one class number for each image."
            )
        if not shape[0]:
            raise DataError(f"{file}: x_{name} is empty", wanted="at least one image", do="Put images into both parts.")
    outputs = int(given["train"].max()) + 1
    labels = {name: torch.from_numpy(y.astype(np.int64)) for name, y in given.items()}
    for name, each in labels.items():
        bad = ((each < 0) | (each >= outputs)).nonzero().flatten()
        if len(bad):
            found = f"{file}: label {int(each[bad[0]])} in row {int(bad[0])} of y_{name}"
            raise DataError(found, wanted=f"0 to {outputs - 1}, the classes of y_train", do="Correct the labels.")
    chosen = ("train", "test") if split == "all" else (split,)
    shapes = {kinds[name][0][1:] for name in chosen}
    if len(shapes) > 1:
        found = f"{file}: images of {kinds['train'][0][1:]} in x_train and {kinds['test'][0][1:]} in x_test"
        raise DataError(found, wanted="one size for both", do="Resize one of them, or read one split at a time.")
    count = sum(kinds[name][0][0] for name in chosen)
    try:
        pixels = laid((slab for name in chosen for slab in rows_of(file, f"x_{name}.npy", BATCH)), count, bound=bound, folder=folder)
    except BROKEN as error:
        raise DataError(f"{file}: {error}", wanted=wanted, do="Write it again with numpy.savez.") from error
    images = pixels.numpy() if pixels.nbytes <= bound else Chosen(pixels, torch.arange(count))
    return ImageSet(images, torch.cat([labels[name] for name in chosen]), tuple(map(str, range(outputs))))


def fault(file: File) -> str:
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
