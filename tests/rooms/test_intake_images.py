"""Pictures come in as they are, or are named: every kind of bad input, and pixels against timm's own transforms."""

from __future__ import annotations

import io
import json
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from apportion.errors import DataError
from apportion.intake.folders import spread
from apportion.intake.images import PIXEL_LIMIT, decode, read_images
from apportion.intake.preprocess import Preprocess

HALF = (0.5, 0.5, 0.5)


def picture(seed, size=(12, 9), mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def folder(root, *, classes=("cat", "dog"), each=4, suffix=".png"):
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(each):
            picture(10 * c + i).save(root / name / f"{i}{suffix}")
    return root


def giant_header(side):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    )


def test_digits_are_the_digits():
    everything = read_images("digits")
    assert len(everything) == 1797 and everything.images.shape == (1797, 16, 16, 3) and everything.classes == tuple("0123456789")
    assert everything.images.max() == 255 and (everything.images[:, ::2, ::2] == everything.images[:, 1::2, 1::2]).all()
    train, test = read_images("digits", split="train"), read_images("digits", split="test")
    assert len(train) + len(test) == 1797 and abs(len(test) - 1797 / 5) < 1
    for digit in range(10):
        here = int((everything.labels == digit).sum())
        assert abs(int((test.labels == digit).sum()) - here / 5) <= 1
    few = read_images("digits", limit=30)
    assert len(few) == 30 and ((few.labels.bincount() - everything.labels.bincount() * (30 / 1797)).abs() <= 1).all()


def test_spread_takes_the_share_and_nothing_else():
    labels = torch.tensor([0] * 3 + [1] * 7 + [2] * 10)
    chosen = spread(labels, torch.randperm(20), 0.1)
    assert chosen.sum() == 2
    assert spread(None, torch.arange(10), 0.5).tolist() == [False, True] * 5


def test_split_is_stratified_and_a_partition():
    images = read_images("digits")
    rest, held = images.split(0.25, seed=3)
    again = images.split(0.25, seed=3)[1]
    assert len(rest) + len(held) == len(images) and (held.images == again.images).all()
    assert not torch.equal(held.labels, images.split(0.25, seed=4)[1].labels) or (held.images != images.split(0.25, seed=4)[1].images).any()
    assert ((held.labels.bincount() - images.labels.bincount() / 4).abs() <= 1).all()
    with pytest.raises(DataError, match="held out"):
        images.rows([0]).split(0.5)


def test_class_folders_and_batches(tmp_path):
    images = read_images(folder(tmp_path))
    assert images.classes == ("cat", "dog") and images.labels.tolist() == [0] * 4 + [1] * 4
    got = list(images.batches(3, Preprocess(8, HALF, HALF)))
    assert [x.shape for x, _ in got] == [(3, 3, 8, 8), (3, 3, 8, 8), (2, 3, 8, 8)]
    assert torch.cat([y for _, y in got]).equal(images.labels)
    shuffled = torch.cat([y for _, y in images.batches(3, Preprocess(8, HALF, HALF), seed=1)])
    assert sorted(shuffled.tolist()) == images.labels.tolist() and not shuffled.equal(images.labels)
    assert images.rows([7, 0]).images == (tmp_path / "dog" / "3.png", tmp_path / "cat" / "0.png")


def test_split_folders_share_their_labels(tmp_path):
    folder(tmp_path / "train", classes=("a", "b", "c"))
    folder(tmp_path / "val", classes=("c",), each=2)
    assert read_images(tmp_path, split="test").labels.tolist() == [2, 2]
    assert len(read_images(tmp_path, split="train")) == 12 and len(read_images(tmp_path)) == 14
    folder(tmp_path / "only" / "train")
    with pytest.raises(DataError, match="val"):
        read_images(tmp_path / "only", split="test")


def test_numbers_sort_as_numbers_and_classes_json_rules(tmp_path):
    folder(tmp_path, classes=("0", "2", "10"), each=1)
    assert read_images(tmp_path).classes == ("0", "2", "10")
    (tmp_path / "classes.json").write_text(json.dumps({"0": 3, "2": 0, "10": 1}))
    images = read_images(tmp_path)
    assert images.labels.tolist() == [3, 1, 0] and images.classes == ("2", "10", "2", "0")
    with pytest.raises(DataError, match=r"label 3 .*0/0\.png"):
        images.check(3)
    images.check(4)
    for text, what in (("{", "classes.json"), ('{"0": -1}', "whole numbers"), ('{"0": 1}', "'10'"), ('{"0": 1, "2": 1, "10": 0}', "different")):
        (tmp_path / "classes.json").write_text(text)
        with pytest.raises(DataError, match=what):
            read_images(tmp_path)


def test_flat_folder_and_single_file(tmp_path):
    picture(0).save(tmp_path / "x.jpg")
    picture(1).save(tmp_path / "y.jpg")
    assert read_images(tmp_path).labels is None and len(read_images(tmp_path)) == 2
    inputs, labels = next(read_images(tmp_path / "x.jpg").batches(4, Preprocess(8, HALF, HALF)))
    assert inputs.shape == (1, 3, 8, 8) and labels is None


def test_bad_files_are_named_and_counted(tmp_path):
    folder(tmp_path, suffix=".jpg", each=6)
    picture(0, size=(64, 64)).save(tmp_path / "cat" / "0.jpg")
    whole = (tmp_path / "cat" / "0.jpg").read_bytes()
    (tmp_path / "cat" / "0.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cat" / "1.jpg").write_text("not an image at all")
    (tmp_path / "dog" / "0.jpg").write_bytes(giant_header(9000))
    (tmp_path / "dog" / "1.jpg").write_bytes(giant_header(30000))
    (tmp_path / "dog" / "2.jpg").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("hello")
    told = []
    images = read_images(tmp_path, on_skip=lambda file, why: told.append((file, why)))
    assert images.labels.tolist() == [0] * 4 + [1] * 3 and tuple(told) == images.skipped and len(told) == 6
    why = {file.removeprefix(f"{tmp_path}/"): reason for file, reason in told}
    assert "decode" in why["cat/0.jpg"] and "does not open" in why["cat/1.jpg"] and "9000 x 9000" in why["dog/0.jpg"] and str(PIXEL_LIMIT) in why["dog/0.jpg"]
    assert "too large" in why["dog/1.jpg"] and "not in one" in why["notes.txt"]
    for i in range(2, 5):
        (tmp_path / "cat" / f"{i}.jpg").write_text("no")
    with pytest.raises(DataError, match=r"8 of 12 files .*0\.jpg"):
        read_images(tmp_path)


def test_a_file_that_changes_is_an_error(tmp_path):
    images = read_images(folder(tmp_path))
    (tmp_path / "dog" / "2.png").write_bytes(b"gone")
    with pytest.raises(DataError, match=r"dog/2\.png"):
        list(images.batches(8, Preprocess(8, HALF, HALF)))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK", "RGB"])
def test_modes(tmp_path, mode):
    image = picture(0, mode=mode)
    file = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    image.save(file)
    assert np.array_equal(np.asarray(decode(file)), np.asarray(image.convert("RGB")))


def test_transparent_palette_16_bit_and_float(tmp_path):
    picture(0, mode="P").save(tmp_path / "p.png", transparency=bytes(range(256)))
    assert decode(tmp_path / "p.png").mode == "RGB"
    deep = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert np.array_equal(np.asarray(decode(tmp_path / "deep.png"))[..., 0].ravel(), np.arange(256))
    Image.fromarray(deep.astype(np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(DataError, match=r"float\.tif: pixels of mode F"):
        decode(tmp_path / "float.tif")


def test_exif_orientation(tmp_path):
    image = picture(0, size=(32, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    (tmp_path / "x.png").write_bytes(buffer.getvalue())
    assert np.array_equal(np.asarray(decode(tmp_path / "x.png")), np.asarray(image.rotate(-90, expand=True)))


def npz(file, **changes):
    r = np.random.default_rng(0)
    data = {f"x_{s}": r.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8) for s, n in (("train", 6), ("test", 3))}
    data |= {"y_train": np.array([0, 1, 2] * 2), "y_test": np.array([2, 1, 0])}
    data |= changes
    np.savez(file, **{name: value for name, value in data.items() if value is not None})
    return file


def test_npz(tmp_path):
    file = npz(tmp_path / "a.npz")
    assert read_images(file, split="test").labels.tolist() == [2, 1, 0] and len(read_images(file)) == 9 and read_images(file).classes == ("0", "1", "2")


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"y_test": None}, "y_test"),
        ({"y_test": np.array([0, 1])}, "y_test"),
        ({"y_test": np.array([0, 1, 3])}, "label 3 in row 2 of y_test"),
        ({"y_train": np.array([0, 1, 2, 0, -1, 1])}, "label -1 in row 4 of y_train"),
        ({"y_train": np.zeros(6)}, "float64"),
        ({"x_train": np.zeros((6, 8, 8, 3), np.float32)}, "float32"),
        ({"x_train": np.zeros((6, 3, 8, 8), np.uint8)}, r"\(6, 3, 8, 8\)"),
        ({"x_train": np.zeros((0, 8, 8, 3), np.uint8), "y_train": np.zeros(0, np.int64)}, "empty"),
        ({"x_train": np.array([{}] * 6, dtype=object)}, "[Oo]bject"),
    ],
)
def test_bad_npz(tmp_path, changes, what):
    with pytest.raises(DataError, match=what):
        read_images(npz(tmp_path / "bad.npz", **changes))


def test_nothing_there(tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        read_images(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no image in"):
        read_images(tmp_path)
    folder(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"class folder .*empty"):
        read_images(tmp_path)
    (tmp_path / "x.npz").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(DataError, match=r"x\.npz"):
        read_images(tmp_path / "x.npz")


@pytest.mark.parametrize(("crop", "mode", "interpolation"), [(0.9, "center", "bicubic"), (1.0, "squash", "bicubic"), (0.875, "squash", "bilinear")])
@pytest.mark.parametrize("size", [(61, 40), (40, 53), (32, 32)])
def test_pixels_agree_with_timm(crop, mode, interpolation, size):
    from apportion.intake import _torchvision

    _torchvision.ready()
    from timm.data.transforms_factory import create_transform

    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    image = picture(0, size=size)
    wanted = create_transform((3, 32, 32), mean=mean, std=std, crop_pct=crop, crop_mode=mode, interpolation=interpolation)(image)
    got = Preprocess(32, mean, std, crop, interpolation, mode == "squash")([image])
    assert got.dtype == torch.float32 and torch.allclose(got[0], wanted, atol=1e-6)


def test_arrays_of_the_right_size_are_not_resampled():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    got = Preprocess(8, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), crop=0.5)(pixels)
    assert torch.equal(got, torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255)
    with pytest.raises(DataError, match="float64"):
        Preprocess(8, HALF, HALF)(pixels / 255.0)
