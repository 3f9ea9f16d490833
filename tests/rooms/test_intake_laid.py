"""What is larger than a bound lies in a file: every answer is as it is in memory, nothing of it is left behind, and a full disk is named."""

from __future__ import annotations

import errno
import io
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest
import torch

from apportion.errors import DataError
from apportion.intake import Preprocess, read_images
from apportion.intake.laid import Chosen, gathered, laid

FEED = Preprocess(8, (0.5,) * 3, (0.25,) * 3)


@pytest.fixture
def npz(tmp_path):
    random = np.random.default_rng(0)
    arrays = {f"x_{name}": random.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8) for name, count in (("train", 250), ("test", 30))}
    arrays |= {f"y_{name}": np.arange(count) % 5 for name, count in (("train", 250), ("test", 30))}
    for name, save in (("plain", np.savez), ("packed", np.savez_compressed)):
        save(tmp_path / f"{name}.npz", **arrays)
    np.savez(tmp_path / "columns.npz", **{name: np.asfortranarray(array) for name, array in arrays.items()})
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float32, torch.int64])
def test_laid_is_what_joining_gives(dtype, tmp_path):
    parts = [torch.randint(0, 100, (size, 3, 2), generator=torch.Generator().manual_seed(size)).to(dtype) for size in (4, 1, 7)]
    wanted, told = torch.cat(parts), []
    held, filed = (laid(iter(parts), 12, bound=bound, folder=tmp_path / "some", tell=told.append) for bound in (wanted.nbytes, wanted.nbytes - 1))
    assert held.dtype == filed.dtype == dtype and torch.equal(held, wanted) and torch.equal(filed, wanted)
    assert len(told) == 1 and str(tmp_path) in told[0] and not list((tmp_path / "some").iterdir())
    filed += 1  # a tensor like any other
    assert torch.equal(filed, wanted + 1)


@pytest.mark.parametrize("name", ["plain", "packed", "columns"])
@pytest.mark.parametrize("split", ["train", "test", "all"])
def test_arrays_in_a_file_are_those_in_memory(npz, name, split):
    file, folder = npz / f"{name}.npz", npz / "laid"
    held, filed = (read_images(file, split=split, bound=bound, folder=folder) for bound in (10**9, 1000))
    assert isinstance(held.images, np.ndarray) and isinstance(filed.images, Chosen) and held.classes == filed.classes
    for a, b in ((held, filed), *zip(held.split(0.2, seed=1), filed.split(0.2, seed=1), strict=True), (held.rows([3, 0]), filed.rows([3, 0]))):
        assert len(a) == len(b) and torch.equal(a.labels, b.labels)
        for (x, y), (u, v) in zip(a.batches(7, FEED, seed=2), b.batches(7, FEED, seed=2), strict=True):
            assert torch.equal(x, u) and torch.equal(y, v)
        assert torch.equal(gathered(a, FEED), gathered(b, FEED, bound=0, folder=folder))
    assert torch.equal(read_images(file, split=split, limit=10, bound=0, folder=folder).labels, read_images(file, split=split, limit=10).labels)
    with pytest.raises(DataError, match="label 4 at row 4"):
        filed.check(4)
    assert not list(folder.iterdir())


def test_chosen_rows_share_what_was_laid(npz):
    filed = read_images(npz / "plain.npz", split="train", bound=0)
    rest, held = filed.split(0.2)
    assert rest.images.every is held.images.every is filed.images.every


class Full(io.BytesIO):
    def write(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_named(npz, monkeypatch):
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: Full())
    with pytest.raises(DataError, match=r"No space left on device.*room for 0\.0 GB.*another disk"):
        read_images(npz / "plain.npz", bound=0, folder=npz / "laid")
    monkeypatch.undo()
    with pytest.raises(DataError, match="wanted room"):
        laid([torch.zeros(3, 2)], 3, bound=0, folder=npz / "plain.npz")


def test_what_does_not_fit_is_refused(npz):
    ones = torch.ones(2, 3)
    for parts, count in (([], 1), ([ones], 3), ([ones, ones], 3), ([ones, ones[:, :2]], 4), ([ones, ones.double()], 4)):
        for bound in (0, 10**6):
            with pytest.raises(DataError):
                laid(parts, count, bound=bound, folder=npz / "laid")
    data = (npz / "plain.npz").read_bytes()
    torn = bytearray(data)
    torn[2000] ^= 1  # in x_train: its checksum tells
    (npz / "torn.npz").write_bytes(torn)
    for bound in (0, 10**9):
        with pytest.raises(DataError, match="torn"):
            read_images(npz / "torn.npz", bound=bound, folder=npz / "laid")
    assert not list((npz / "laid").iterdir())


@pytest.mark.slow
def test_nothing_is_left_of_a_run_that_was_killed(tmp_path):
    program = f"""
import pathlib, time, torch
from apportion.intake.laid import laid
def parts():
    yield torch.ones(2**18)
    print("begun", flush=True)
    time.sleep(60)
laid(parts(), 2**19, bound=0, folder=pathlib.Path({str(tmp_path)!r}))
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None and run.stdout.readline() == "begun\n"
        run.kill()
    time.sleep(0.1)
    assert not list(tmp_path.iterdir())
