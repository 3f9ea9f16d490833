"""A run on disk: tensors first, then the manifest that makes them count; a crash at any point leaves the state before or the state after.

    step-00000420.safetensors   weights, averages, optimiser
    manifest.json               names the newest file, its SHA-256, the step, what the run was, what it had recorded
    previous.json               the manifest before, whose file is kept too

Cost: the weights four times over (weights, averages, two moments), written and hashed; about 1 s for 350 MB.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path as File
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors import torch as tensors_on_disk
from torch import Tensor

from apportion.errors import TrainError
from apportion.files import write_atomic, write_json


class Checkpoint(NamedTuple):
    step: int
    digest: str  # of the run: it goes on only as what it was
    tensors: dict[str, Tensor]
    meta: dict[str, Any]


def save(folder: File, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], *, digest: str) -> File:
    """Write a checkpoint and forget all but the last two. Returns the file with the tensors."""
    data = tensors_on_disk.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    file = folder / f"step-{step:08d}.safetensors"
    manifest, previous = folder / "manifest.json", folder / "previous.json"
    write_atomic(file, data)
    if manifest.exists() and _read(manifest)["file"] != file.name:
        write_atomic(previous, manifest.read_bytes())
    write_json(manifest, {"file": file.name, "sha256": hashlib.sha256(data).hexdigest(), "step": step, "digest": digest, "meta": dict(meta)})
    named = {_read(known)["file"] for known in (manifest, previous) if known.exists()}
    for other in folder.glob("*step-*.safetensors*"):  # older ones, and what a crash left half-written
        if other.name not in named:
            other.unlink()
    return file


def load(folder: File) -> Checkpoint | None:
    """The newest whole checkpoint, or None where there is none. Raises TrainError where the manifest or the file that it names was altered or is missing."""
    manifest = folder / "manifest.json"
    if not manifest.exists():
        return None
    about = _read(manifest)
    file = folder / about["file"]
    if not file.exists():
        raise TrainError(f"no {file}", wanted="the file that manifest.json names", do=_way_out(folder))
    data = file.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != about["sha256"]:
        raise TrainError(f"{file} with SHA-256 {digest}", wanted=f"{about['sha256']}, as manifest.json says", do=_way_out(folder))
    try:
        return Checkpoint(about["step"], about["digest"], tensors_on_disk.load(data), about["meta"])
    except SafetensorError as error:
        raise TrainError(f"{file}, which cannot be read ({error})", wanted="safetensors", do=_way_out(folder)) from error


def _read(manifest: File) -> dict[str, Any]:
    try:
        about = json.loads(manifest.read_bytes())
        if about.keys() >= {"file", "sha256", "step", "digest", "meta"} and File(about["file"]).name == about["file"]:
            return about
    except (ValueError, AttributeError, TypeError):
        pass
    raise TrainError(f"{manifest}, which is no manifest", wanted="file, sha256, step, digest and meta", do=_way_out(manifest.parent))


def _way_out(folder: File) -> str:
    return f"Rename previous.json in {folder} to manifest.json to go on from the checkpoint before, or empty the folder to start again."
