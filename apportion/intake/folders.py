"""Folders of files with labels, whatever is in the files; what cannot be used is named, never dropped in silence."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path as File
from typing import Any, Literal, Protocol, Self, TypeVar

import torch
from torch import Tensor

from apportion.errors import DataError

Split = Literal["train", "test", "all"]
OnSkip = Callable[[str, str], None]

HELD_OUT = 0.2
FOLDERS = {"train": ("train",), "test": ("test", "val", "validation")}
PURPOSE = {"train": "to learn from", "test": "for the test", "all": "at all"}  # of each split, for those who never named one


@dataclass(frozen=True, slots=True, eq=False)
class Listing:
    """Files, the label of each, the names of the labels, and what was left out."""

    files: tuple[File, ...]
    labels: Tensor | None = None  # (n,) int64; several, or numbers, (n, outputs) float
    classes: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()  # file, why

    def __len__(self) -> int:
        return len(self.files)

    def rows(self, index: Tensor | Sequence[int]) -> Listing:
        """The same with these rows only, in this order."""
        rows = torch.as_tensor(index, dtype=torch.int64)
        return replace(self, files=tuple(self.files[i] for i in rows.tolist()), labels=None if self.labels is None else self.labels[rows])


class Rows(Protocol):
    @property
    def labels(self) -> Tensor | None: ...
    def __len__(self) -> int: ...
    def rows(self, index: Tensor | Sequence[int], /) -> Self: ...


R = TypeVar("R", bound=Rows)


@contextmanager
def allowed() -> Iterator[None]:
    """What the system forbids to read, as an error of ours."""
    try:
        yield
    except PermissionError as error:
        raise DataError(f"{error.filename}: {error.strerror}", wanted="what may be read", do="Change its permissions.") from error


def counted(count: int, what: str) -> str:
    """So many of them, `what` in the plural."""
    return f"{count} {what.removesuffix('s') if count == 1 and what != 'series' else what}"


def spread(labels: Tensor | None, order: Tensor, share: float) -> Tensor:
    """Bool (n,): `share` of the samples, every k-th in `order` within each class, so that no class is off by more than one."""
    if labels is not None:
        order = order[labels[order].argsort(stable=True)]
    steps = torch.arange(len(order) + 1, dtype=torch.float64).mul(share).add(1e-9).floor()
    chosen = torch.zeros(len(order), dtype=torch.bool)
    chosen[order[steps[1:] > steps[:-1]]] = True
    return chosen


def parted(labels: Tensor | None, count: int, holdout: float, *, seed: int, what: str) -> tuple[Tensor, Tensor]:
    """Rows of the rest and of the held out: `holdout` of `count` samples, spread evenly over the classes, by `seed`. Raises DataError where one is empty."""
    held = spread(one_class(labels), torch.randperm(count, generator=torch.Generator().manual_seed(seed)), holdout)
    if held.all() or not held.any():
        found = f"{counted(count, what)}, of which a part of {holdout:g} is to be held out"
        raise DataError(found, wanted="at least one on either side", do="Give more data, or hold out another part.")
    return (~held).nonzero().flatten(), held.nonzero().flatten()


def batched(count: int, batch: int, seed: int | None) -> tuple[Tensor, ...]:
    """Rows of each batch of so many samples: in order, or shuffled by `seed`."""
    order = torch.arange(count) if seed is None else torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order.split(batch)


def one_class(labels: Tensor | None) -> Tensor | None:
    """Labels by which samples can be spread evenly: one for each."""
    return labels if labels is not None and labels.ndim == 1 else None


def several_fit(labels: Tensor, outputs: int, what: str) -> None:
    """Raises DataError for several labels or numbers (n, outputs) that a network with so many outputs cannot give."""
    if labels.shape[1] != outputs:
        found = f"{labels.shape[1]} labels or numbers for a {what}"
        raise DataError(found, wanted=f"{outputs}, the network's outputs", do="Give the labels that the model was taught with.")


def listed(root: File, split: Split, limit: int | None, what: str) -> Listing:
    """FOLDER/CLASS/FILE, FOLDER/train|val|test/CLASS/FILE, or files without labels; `what` they should be is for the errors. Raises DataError."""
    found, own_split = _split(root, split, what)
    return cut(found, "all" if own_split else split, limit, what)


def _split(root: File, split: Split, what: str) -> tuple[Listing, bool]:
    """The files below a folder, and whether it brings a split of its own."""
    known = {name for names in FOLDERS.values() for name in names}
    splits = {folder.name: folder for folder in _children(root) if folder.is_dir() and folder.name in known}
    if not splits:
        return _classes(root, [root], [root], what), False
    if split == "all":
        return _classes(root, list(splits.values()), list(splits.values()), what), True
    here = next((splits[name] for name in FOLDERS[split] if name in splits), None)
    if here is None:
        found = f"{root} with {', '.join(splits)} in it, and no folder {PURPOSE[split]}"
        do = "Add it, or put all classes into one folder: every fifth of each is then for the test."
        raise DataError(found, wanted=f"one called {' or '.join(FOLDERS[split])}", do=do)
    return _classes(root, [here], list(splits.values()), what), True


def _classes(root: File, roots: list[File], every: list[File], what: str) -> Listing:
    """The files below `roots`; labels are the same in `every` split, also where a class is missing in one of them."""
    names = {folder.name for place in every for folder in _children(place) if folder.is_dir()}
    loose = tuple(file for place in roots for file in _children(place) if file.is_file() and file.name != "classes.json")
    if not names:
        if not loose:
            raise DataError(f"no {what} in {root}", wanted=f"FOLDER/CLASS/{what.upper()}, or {what}s", do="Correct the path.")
        return Listing(loose)
    label = _labels(root / "classes.json", names)
    files, labels = [], []
    for place in roots:
        for folder in filter(File.is_dir, _children(place)):
            inside = [file for file in sorted(folder.rglob("*")) if file.is_file() and not file.name.startswith(".")]
            if not inside:
                raise DataError(f"no file in class folder {folder}", wanted=f"at least one {what}", do="Fill the folder or remove it.")
            files += inside
            labels += [label[folder.name]] * len(inside)
    number = {index: name for name, index in label.items()}
    classes = tuple(number.get(index, str(index)) for index in range(max(number) + 1))
    return Listing(tuple(files), torch.tensor(labels), classes, tuple((str(file), "lies beside the class folders, not in one") for file in loose))


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


def cut(samples: R, split: Split, limit: int | None, what: str) -> R:
    """One part of what brings no split of its own, at most `limit` of it, both spread evenly over the classes. Raises DataError where nothing is left."""
    if split != "all":
        test = spread(one_class(samples.labels), torch.arange(len(samples)), HELD_OUT)
        samples = samples.rows((test if split == "test" else ~test).nonzero().flatten())
    if limit is not None and limit < len(samples):
        samples = samples.rows(spread(one_class(samples.labels), torch.arange(len(samples)), limit / len(samples)).nonzero().flatten())
    if not len(samples):
        raise DataError(f"no {what} {PURPOSE[split]}", wanted="at least one", do="Give more data: every fifth of each class is for the test.")
    return samples


def usable(source: File, found: Listing, fault: Callable[[File], str], what: str, on_skip: OnSkip | None) -> Listing:
    """Only the files in which there is no `fault`; the others are told. Raises DataError where more than half have one."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        reasons = list(pool.map(fault, found.files))
    bad = tuple((str(file), why) for file, why in zip(found.files, reasons, strict=True) if why)
    if bad and found.files == (source,):
        raise DataError(f"{source}: {bad[0][1].removeprefix('found ')}", wanted=f"a usable {what}", do="Correct the path, or repair the file.")
    if 2 * len(bad) > len(found):
        text = f"{len(bad)} of {len(found)} files that are no usable {what}s in {source}, such as {bad[0][0]}: {bad[0][1]}"
        raise DataError(text, wanted="at most half of them bad", do="Correct or remove them.")
    skipped = (*found.skipped, *bad)
    for file, why in skipped if on_skip else ():
        assert on_skip is not None
        on_skip(file, why)
    return replace(found.rows([index for index, why in enumerate(reasons) if not why]), skipped=skipped)
