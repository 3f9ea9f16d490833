"""Pictures and recordings with their labels in a table beside them: every task, every split, and what is wrong with a row by table and line."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path as File
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from apportion import verbs
from apportion.deliver.adapted import load
from apportion.errors import DataError, PlanError
from apportion.intake import AudioSet, ImageSet, Listen, Parts, Preprocess, Tabulate, fresh, reader
from apportion.network import Architecture
from apportion.train import Recipe
from apportion.vocab import Choice, Plan, Task
from tests.rooms.test_intake_audio import save, tone
from tests.test_cli import shell

FEED = Preprocess(16, (0.5,) * 3, (0.25,) * 3)
HEAR = Listen("whisper", 8000, 20, bands=8, window=200, hop=80)
SIDES = ("left", "right")
PLAN = Plan(choices=(Choice("reducer", "tome"), Choice("depth", "skip")), rungs=3, tolerance=90.0, never_slower=False, glance=1, epochs=1, batch=32)


def picture(file: File, number: int) -> File:
    """Dark, with a bright half to the left where the first bit is set and one to the right where the second is."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 60, (16, 16, 3), np.uint8)
    for bit in range(2):
        if number >> bit & 1:
            pixels[:, 8 * bit : 8 * bit + 8] += 150
    Image.fromarray(pixels).save(file)
    return file


def seen(number: int) -> list[str]:
    return [SIDES[bit] for bit in range(2) if number >> bit & 1]


def table(file: File, rows: Sequence[Sequence[Any]], head: Sequence[str] = ("file", "label")) -> File:
    with file.open("w", newline="", encoding="utf-8") as lines:
        csv.writer(lines).writerows([head, *rows])
    return file


def read(folder: File, feed: Any = FEED, *, task: Task = "classification", split: Any = "all", columns: Any = None, classes: Any = None) -> Any:
    told: list[tuple[str, str]] = []
    return reader(feed, classes, columns, task=task)(folder, split=split, on_skip=lambda where, why: told.append((where, why)))


def test_every_task_and_every_kind_of_table(tmp_path: File) -> None:
    for number in range(8):
        picture(tmp_path / "pictures" / f"{number}.png", number)
    names = [f"pictures/{number}.png" for number in range(8)]
    table(tmp_path / "labels.csv", [(name, "|".join(seen(number))) for number, name in enumerate(names)])
    found = read(tmp_path, task="multilabel")
    assert isinstance(found, ImageSet) and found.classes == SIDES and not found.skipped and fresh.kind_of(tmp_path) is Preprocess
    assert found.labels is not None and found.labels.tolist() == [[number & 1, number >> 1 & 1] for number in range(8)]
    (inputs, labels), *_ = found.batches(3, FEED)
    assert inputs.shape == (3, 3, 16, 16) and labels is not None and labels.dtype == torch.float32
    found.check(2)
    with pytest.raises(DataError, match="2 labels or numbers for a picture; wanted 3"):
        found.check(3)
    (tmp_path / "labels.csv").unlink()
    (tmp_path / "labels.jsonl").write_text("\n".join(json.dumps({"file": name, "label": [number / 2, 1 - number]}) for number, name in enumerate(names)))
    numbers = read(tmp_path, task="regression")
    assert numbers.classes == () and numbers.labels.tolist() == [[number / 2, 1 - number] for number in range(8)] and numbers.labels.dtype == torch.float32
    (tmp_path / "labels.jsonl").unlink()
    table(tmp_path / "labels.tsv", []).write_text("image\tx\n" + "\n".join(f"{name}\t{number}.5|{number}" for number, name in enumerate(names)))
    assert read(tmp_path, task="regression", columns={"file": "image", "label": "x"}).labels[3].tolist() == [3.5, 3]
    (tmp_path / "labels.tsv").unlink()
    table(tmp_path / "labels.csv", [(name, "odd" if number % 2 else "even") for number, name in enumerate(names)])
    assert read(tmp_path).labels.tolist() == [0, 1] * 4 and read(tmp_path, classes=("odd", "even")).labels.tolist() == [1, 0] * 4
    assert [len(read(tmp_path, split=split)) for split in ("train", "test")] == [7, 1]  # every fifth of those that are left by class


def test_what_is_wrong_with_a_row_is_named_and_left_out(tmp_path: File) -> None:
    for number in range(12):
        picture(tmp_path / f"{number}.png", number)
    (tmp_path / "torn.png").write_bytes(b"\x89PNG")
    for name in ("spare", "other"):
        picture(tmp_path / "more" / f"{name}.png", 1)
    rows: list[tuple[Any, ...]] = [(f"{number}.png", "a") for number in range(12)]
    rows += [("gone.png", "a"), ("0.png", "b"), ("torn.png", "a"), ("", "a"), ("./1.png", "a"), ("more/spare.png", "")]
    file, told = table(tmp_path / "labels.csv", rows), list[tuple[str, str]]()
    found = reader(FEED, None, task="classification")(tmp_path, split="all", on_skip=lambda where, why: told.append((where, why)))
    assert len(found) == 12 and found.classes == ("a",)
    wanted = {
        14: f"no file {tmp_path / 'gone.png'}",
        15: f"0.png for the second time, first at {file}, line 2",
        16: "torn.png: found a file that does not open",
        17: "no 'file'",
        18: f"./1.png for the second time, first at {file}, line 3",
        19: "no label",
    }
    assert [where for where, _ in told] == [*(f"{file}, line {line}" for line in wanted), str(tmp_path)]
    assert all(text in why for (_, why), text in zip(told, wanted.values(), strict=False)), told
    assert told[-1][1] == "1 files that labels.csv does not name, such as more/other.png"
    table(file, [rows[12], rows[14], rows[15], rows[1]])
    with pytest.raises(DataError, match=r"3 of 4 rows that name no usable image, such as .*labels\.csv, line 2: no file .*gone\.png"):
        read(tmp_path)
    table(file, [("0.png", "0.5"), ("1.png", "high"), ("2.png", "1|inf"), ("3.png", "1"), ("4.png", "2")])
    assert [why for _, why in read(tmp_path, task="regression").skipped[:2]] == ["'high' where a number was wanted", "'1|inf' where a finite number was wanted"]


def test_tables_that_cannot_be_used(tmp_path: File) -> None:
    picture(tmp_path / "a.png", 0)
    for task in ("multilabel", "regression"):
        with pytest.raises(DataError, match=rf"without a table of labels that has a column 'file', for {task}; wanted FOLDER/labels.csv"):
            read(tmp_path, task=task)
    with pytest.raises(DataError, match="has a column 'image'"):
        read(tmp_path, columns={"file": "image"})
    table(tmp_path / "labels.csv", [("a.png", 1)], ("file", "tag"))
    with pytest.raises(DataError, match=r"labels\.csv with columns file, tag; wanted a column 'label'. .*--columns label=NAME"):
        read(tmp_path)
    assert read(tmp_path, columns={"label": "tag"}).labels.tolist() == [1]
    with pytest.raises(DataError, match=r"labels\.csv with columns file, tag; wanted a column 'image' with the names of files\. .*--columns file=NAME"):
        read(tmp_path, columns={"file": "image"})
    (tmp_path / "beside").mkdir()
    for number in range(2):
        picture(tmp_path / "beside" / f"{number}.png", number)
    table(tmp_path / "beside" / "labels.csv", [("0.png", 1)], ("name", "label"))
    assert fresh.kind_of(tmp_path / "beside") is Preprocess
    with pytest.raises(DataError, match=r"labels\.csv with columns name, label; wanted a column 'file'"):
        read(tmp_path / "beside")
    (tmp_path / "labels.jsonl").write_text('{"file": "a.png", "label": 1}')
    with pytest.raises(DataError, match=r"labels\.csv and labels\.jsonl; wanted one table"):
        read(tmp_path)
    with pytest.raises(PlanError, match="columns for a model of images: text; wanted file and label"):
        reader(FEED, None, {"text": "x"})
    (tmp_path / "labels.jsonl").unlink()
    table(tmp_path / "labels.csv", [("a.png", "cat")])
    with pytest.raises(DataError, match="label 'cat'; wanted one of dog, fish"):
        read(tmp_path, classes=("dog", "fish"))
    # A table called so that names no files is a table like any other.
    (tmp_path / "plain").mkdir()
    table(tmp_path / "plain" / "labels.csv", [(1, 2)], ("acid", "label"))
    assert fresh.kind_of(tmp_path / "plain") is Tabulate


def test_splits_and_recordings(tmp_path: File) -> None:
    for split, count in (("train", 20), ("val", 5)):
        for number in range(count):
            save(tmp_path / split / "wav" / f"{number}.wav", tone(number))
        table(tmp_path / split / "labels.csv", [(f"wav/{number}.wav", f"{number / 4}") for number in range(count)])
    found = [read(tmp_path, HEAR, task="regression", split=split) for split in ("train", "test", "all")]
    assert all(isinstance(part, AudioSet) for part in found) and [len(part) for part in found] == [20, 5, 25] and fresh.kind_of(tmp_path) is Listen
    rest, held = found[0].split(0.25)
    assert (len(rest), len(held)) == (15, 5) and rest.labels is not None and rest.labels.shape == (15, 1)
    with pytest.raises(DataError, match="1 labels or numbers for a recording; wanted 2"):
        found[0].check(2)
    # What is in both splits would be asked after it was taught.
    table(tmp_path / "val" / "labels.csv", [(f"wav/{number}.wav", "1") for number in range(4)] + [("../train/wav/3.wav", "1")])
    test = read(tmp_path, HEAR, task="regression", split="test")
    assert len(test) == 4 and "for the second time, first at" in test.skipped[0][1] and test.skipped[1][1].startswith("1 files that labels.csv")
    (tmp_path / "val" / "labels.csv").unlink()
    with pytest.raises(DataError, match="without a table of labels for the test"):
        read(tmp_path, HEAR, task="regression", split="test")


@pytest.mark.slow
def test_pictures_with_several_labels_the_whole_way(tmp_path: File) -> None:
    for number in range(500):
        picture(tmp_path / "data" / f"{number}.png", number)
    table(tmp_path / "data" / "labels.csv", [(f"{number}.png", "|".join(seen(number))) for number in range(500)])
    shape = Architecture(image_size=16, patch=4, dim=16, depth=3, heads=2, hidden=32, classes=1)
    recipe = Recipe(epochs=8, batch=32, learning_rate=3e-3, crop_padding=0, ema=0.9)
    network, feed, parts = verbs.scratch(tmp_path / "data", recipe=recipe, architecture=shape, task="multilabel")
    assert isinstance(parts, Parts) and network.architecture.classes == 2 and network.architecture.task == "multilabel"
    plan = replace(PLAN, tolerance=5.0)
    weighed = verbs.adapt(network, parts, plan=plan, task="multilabel", preprocess=feed, out=tmp_path / "out", backend="eager", buckets=(4,), repeats=2)
    assert weighed.figures["accuracy_dense"] > 0.9
    again = load(tmp_path / "out", backend="eager", buckets=(4,))
    files = [tmp_path / "data" / f"{number}.png" for number in range(8)]
    pictures = [Image.open(file) for file in files]
    ours, theirs = weighed.adapted(pictures), again(pictures)
    assert torch.equal(ours.path, theirs.path)
    torch.testing.assert_close(ours.logits, theirs.logits)
    found = shell("run", tmp_path / "out", *files, "--json")
    answers = [row["label"] for row in json.loads(found.stdout)["answers"]]
    assert found.exit_code == 0 and sum(answer == seen(number) for number, answer in enumerate(answers)) >= 6


@pytest.mark.slow
def test_numbers_are_heard(tmp_path: File) -> None:
    """The pitch of a tone, in Hz: far larger than an untrained network's answers."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(300):
        hz = float(torch.randint(200, 3000, (), generator=generator))
        turns = 2 * torch.pi * hz / 8000 * torch.arange(1600)
        save(tmp_path / f"{number}.wav", (0.5 * turns.sin() + 0.05 * torch.randn(1600, generator=generator))[:, None].double())
        rows.append((f"{number}.wav", hz))
    table(tmp_path / "labels.csv", rows)
    shape = Architecture(0, 0, dim=16, depth=2, heads=2, hidden=32, classes=1, frames=20, bands=8, class_token=False, pool="mean")
    recipe = Recipe(epochs=1, batch=16, learning_rate=3e-3, ema=0.9)
    network, feed, parts = verbs.scratch(tmp_path, recipe=recipe, architecture=shape, feed=HEAR, task="regression", least_steps=250)
    inputs, labels = next(parts.report.batches(1000, feed))
    assert labels is not None
    error = (network.eval()(inputs, network.space.full) - labels).abs().mean()
    assert error < 0.3 * (labels - labels.mean()).abs().mean()
