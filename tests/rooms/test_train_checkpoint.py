"""Checkpoints: whole or not there, two kept, an altered one refused."""

from __future__ import annotations

from pathlib import Path as File

import pytest
import torch

from apportion.errors import TrainError
from apportion.train import checkpoint


def write(folder: File, step: int) -> File:
    return checkpoint.save(folder, step, {"a": torch.full((2, 3), float(step)).t(), "count": torch.tensor(step)}, {"note": [step, 0.1]}, digest="d")


def test_round_trip(tmp_path: File):
    assert checkpoint.load(tmp_path) is None
    write(tmp_path, 4)
    found = checkpoint.load(tmp_path)
    assert found is not None and (found.step, found.digest, found.meta) == (4, "d", {"note": [4, 0.1]})
    assert torch.equal(found.tensors["a"], torch.full((3, 2), 4.0)) and int(found.tensors["count"]) == 4


def test_two_are_kept_and_half_written_ones_are_cleared_away(tmp_path: File):
    (tmp_path / ".step-00000009.safetensors.x1y2").write_bytes(b"half")
    (tmp_path / "step-00000009.safetensors").write_bytes(b"half")
    for step in (1, 2, 3, 3):
        write(tmp_path, step)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["manifest.json", "previous.json", "step-00000002.safetensors", "step-00000003.safetensors"]


def test_a_file_that_no_manifest_names_is_ignored(tmp_path: File):
    write(tmp_path, 1)
    (tmp_path / "step-00000002.safetensors").write_bytes(b"half")
    found = checkpoint.load(tmp_path)
    assert found is not None and found.step == 1


@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "manifest", "escape"])
def test_an_altered_checkpoint_is_refused_and_the_one_before_can_be_taken(tmp_path: File, harm: str):
    write(tmp_path, 1)
    file, manifest = write(tmp_path, 2), tmp_path / "manifest.json"
    data = bytearray(file.read_bytes())
    if harm == "flip":
        data[-1] ^= 1
        file.write_bytes(data)
    elif harm == "cut":
        file.write_bytes(data[:-4])
    elif harm == "remove":
        file.unlink()
    elif harm == "manifest":
        manifest.write_text("{")
    else:
        manifest.write_text(manifest.read_text().replace("step-00000002", "../step-00000002"))
    with pytest.raises(TrainError, match=r"previous\.json"):
        checkpoint.load(tmp_path)
    (tmp_path / "previous.json").rename(manifest)
    found = checkpoint.load(tmp_path)
    assert found is not None and found.step == 1
