"""Pictures with a class for each pixel: FOLDER/images/NAME and FOLDER/masks/NAME.png, or the same in train, val and test below FOLDER."""

from __future__ import annotations

import json
from pathlib import Path as File
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from apportion.errors import DataError
from apportion.intake.folders import FOLDERS, PURPOSE, Listing, OnSkip, Split, cut, usable
from apportion.intake.images import ImageSet, fault
from apportion.intake.laid import HELD_BYTES, Lay, laid
from apportion.intake.preprocess import Preprocess
from apportion.methods.task import UNKNOWN

VOID = 255  # of a mask, as PASCAL VOC has it: not to be judged
LAYOUT = "FOLDER/images and FOLDER/masks, or these in FOLDER/train and FOLDER/test (or val)"


def read_masked(
    source: str | File,
    *,
    feed: Preprocess,
    split: Split = "all",
    limit: int | None = None,
    on_skip: OnSkip | None = None,
    bound: int = HELD_BYTES,
    folder: File | None = None,
) -> ImageSet:
    """Pictures with labels int16 (n, size, size): each mask resized and cut as `feed` does its picture, by the nearest pixel, so that no class is made up.

    Masks are 8-bit greys or palettes whose values are classes, 255 for what is not to be judged. FOLDER/classes.json, an object from name to value, names them:
    then other values are not judged either. Where the data brings no split of its own, every fifth picture is `test`. Masks are decoded one
    after another; more than `bound` bytes of them, or of some chosen from them, are `laid` into a file in `folder`.
    Raises DataError: no such layout, a picture without a mask or of another size, more than half of the files bad.
    """
    root = File(source)
    files, own = _files(root, split)
    pairs = {image: _mask(image) for image in files}

    def wrong(image: File) -> str:
        return fault(image) or _fault(image, pairs[image])

    good = usable(root, Listing(tuple(files)), wrong, "image", on_skip)
    named = _named(root / "classes.json")
    known = None if named is None else set(named.values())
    made = laid((_label(pairs[image], feed, known)[None] for image in good.files), len(good.files), bound=bound, folder=folder)
    top = int(made.max()) if named is None else max(named.values())
    number = {} if named is None else {value: name for name, value in named.items()}
    found = ImageSet(good.files, made, tuple(number.get(value, str(value)) for value in range(top + 1)), good.skipped, Lay(bound, folder))
    return cut(found, "all" if own else split, limit, "image")


def _files(root: File, split: Split) -> tuple[list[File], bool]:
    below = {name for names in FOLDERS.values() for name in names if (root / name / "images").is_dir()}
    wanted = [name for kind in (FOLDERS if split == "all" else (split,)) for name in FOLDERS[kind] if name in below]
    wanted = wanted if split == "all" else wanted[:1]
    roots = [root / name for name in wanted] if below else [root]
    files = [file for place in roots if (place / "images").is_dir() for file in sorted((place / "images").iterdir()) if not file.name.startswith(".")]
    if not files:
        raise DataError(f"no pictures {PURPOSE[split]} in {root}", wanted=LAYOUT, do="Correct the path.")
    return files, bool(below)


def _mask(image: File) -> File:
    return image.parent.parent / "masks" / f"{image.stem}.png"


def _fault(image: File, mask: File) -> str:
    """Why a mask cannot be used; empty where it can."""
    if not mask.is_file():
        return f"no mask {mask}"
    try:
        with Image.open(mask, formats=("PNG",)) as found, Image.open(image) as picture:
            found.load()
            if found.mode not in ("L", "P", "1"):
                return f"a mask of mode {found.mode}; wanted 8-bit greys or a palette"
            return "" if found.size == picture.size else f"a mask of {found.size} for a picture of {picture.size}"
    except Exception as error:  # whatever an image library trips over in bytes that may be anything
        return f"a mask that does not decode ({type(error).__name__})"


def _named(file: File) -> dict[str, int] | None:
    if not file.is_file():
        return None
    try:
        data: Any = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise DataError(f"{file}: {error}", wanted="a JSON object from name to value", do="Correct the file.") from error
    if not isinstance(data, dict) or not data or not all(type(value) is int and 0 <= value < VOID for value in data.values()):
        raise DataError(f"{file} that is no map to values from 0 to {VOID - 1}", wanted='such as {"sky": 0, "road": 1}', do="Correct the file.")
    return data


def _label(mask: File, feed: Preprocess, known: set[int] | None) -> Tensor:
    """One mask as a label, (size, size) int16."""
    with Image.open(mask, formats=("PNG",)) as found:
        grey = Image.fromarray(np.asarray(found).astype(np.uint8))
    values = torch.from_numpy(np.asarray(feed.fit(grey, Image.Resampling.NEAREST)).astype(np.int16))
    judged = values != VOID if known is None else torch.isin(values, torch.tensor(sorted(known), dtype=torch.int16))
    return torch.where(judged, values, UNKNOWN)
