"""Time series: files of the archives as they are, what is wrong with them by name, and the whole way from a folder of them to a bundle that answers."""

from __future__ import annotations

import gzip
import json
import math
from dataclasses import replace
from pathlib import Path as File
from typing import Any

import numpy as np
import pytest
import torch

from apportion import verbs
from apportion.deliver.adapted import load
from apportion.errors import DataError, PlanError
from apportion.intake import Align, Parts, SeriesSet, Tabulate, archive, fresh, reader
from apportion.intake.preprocess import Preprocess
from apportion.intake.series import read_series
from apportion.network import Architecture
from apportion.train import Recipe
from apportion.vocab import Choice, Plan
from tests.test_cli import shell

NAN = math.nan
PLAN = Plan(choices=(Choice("reducer", "tome"), Choice("depth", "skip")), rungs=3, tolerance=90.0, never_slower=False, glance=1, epochs=1, batch=32)
RECIPE = Recipe(epochs=12, batch=32, learning_rate=5e-3, ema=0.9)
SHAPE = Architecture(0, 0, dim=16, depth=3, heads=2, hidden=32, classes=1, class_token=False, pool="mean")
HEADER = "#two channels\n@problemName Steps\n@timeStamps false\n@univariate false\n@dimensions 2\n@classLabel true up down\n@DATA\n"


def waves(count: int, seed: int = 0) -> tuple[torch.Tensor, list[str]]:
    """Two channels of noise; a bump stands in the second behind or before one in the first. Levels and scales differ and say nothing."""
    generator = torch.Generator().manual_seed(seed)
    x = 0.3 * torch.randn(count, 2, 40, generator=generator, dtype=torch.float64)
    for row in range(count):
        start = int(torch.randint(8, 20, (), generator=generator))
        x[row, 0, start : start + 5] += 2
        x[row, 1, start + (6 if row % 2 else -6) :][:5] += 2
    return x * 10 + 100 * torch.rand(count, 2, 1, generator=generator), [("before", "behind")[row % 2] for row in range(count)]


def archived(file: File, x: Any, labels: list[Any], head: str = "@classLabel true before behind") -> File:
    """As a .ts file; what is NaN at the end of all channels is left out."""
    lines = []
    for values, label in zip(x.tolist(), labels, strict=True):
        last = max(place for place in range(len(values[0])) if any(channel[place] == channel[place] for channel in values)) + 1
        cells = [",".join("?" if value != value else f"{value:.6g}" for value in channel[:last]) for channel in values]
        lines.append(":".join([*cells, str(label)]))
    file.write_text("\n".join(["@timeStamps false", f"@dimensions {x.shape[1]}", head, "@data", *lines]))
    return file


def test_each_format_says_the_same(tmp_path: File) -> None:
    x = torch.tensor([[[1.0, NAN, 3, 4]], [[5, 6, NAN, NAN]], [[0, -1e-3, 2e5, 7]]], dtype=torch.float64)
    (tmp_path / "a.ts").write_text("@timestamps false\n@univariate true\n@classLabel true 1 3\n@data\n\n1,?,3,4:1\n5,6:3\n0,-1e-3,2e5,7:1\n")
    (tmp_path / "a.tsv").write_text("1\t1\tNaN\t3\t4\n3\t5\t6\tNaN\tNaN\n1\t0\t-1e-3\t2e5\t7\n")
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"1.0,1,,3,4\n3.0000e+00,5,6,,\n1.0,0,-1e-3,2e5,7\n"))
    np.savez(tmp_path / "a.npz", x=x.numpy(), y=np.array([1, 3, 1]))
    np.savez(tmp_path / "flat.npz", x=x[:, 0].float().numpy(), y=np.array(["1", "3", "1"]))
    for name in ("a.ts", "a.tsv", "a.csv.gz", "a.npz", "flat.npz"):
        found = read_series(tmp_path / name)
        assert found.classes == ("1", "3") and found.labels is not None and found.labels.tolist() == [0, 1, 0], name
        assert fresh.kind_of(tmp_path / name) is Align and [value.shape for value in found.values] == [(1, 4), (1, 2), (1, 4)], name
        for ours, theirs in zip(found.values, x, strict=True):
            torch.testing.assert_close(ours, theirs[:, : ours.shape[1]], equal_nan=True, rtol=1e-6, atol=0)
    assert [where.removeprefix(str(tmp_path)) for where in read_series(tmp_path / "a.ts").where] == [f"/a.ts, line {n}" for n in (6, 7, 8)]
    assert read_series(tmp_path / "flat.npz").where[2].endswith("flat.npz, row 2")


def test_what_data_are_is_seen_and_tables_stay_tables(tmp_path: File) -> None:
    (tmp_path / "named.csv").write_text("acid,soil,label\n1,2,3\n")
    (tmp_path / "numbered.csv").write_text(",0,1,2,3\n0,7,8,9,1\n")
    (tmp_path / "few.csv").write_text("1,2,3\n1,2,3\n")
    assert {fresh.kind_of(tmp_path / f"{name}.csv") for name in ("named", "numbered", "few")} == {Tabulate}
    np.savez(tmp_path / "pictures.npz", x_train=np.zeros((1, 2, 2, 3), np.uint8))
    assert fresh.kind_of(tmp_path / "pictures.npz") is Preprocess and fresh.kind_called("series") is Align
    folder = tmp_path / "Steps"
    folder.mkdir()
    (folder / "README.md").write_text("1,2,3,4")
    for split in ("TRAIN", "TEST"):
        (folder / f"Steps_{split}.ts").write_text(HEADER + "1,2:3,4:up\n1,2:3,5:down\n")
        (folder / f"Steps_{split}.tsv").write_text("nothing")
    assert fresh.kind_of(folder) is Align and [len(read_series(folder, split=split)) for split in ("train", "test", "all")] == [2, 2, 4]  # pyright: ignore
    (folder / "Other_TRAIN.ts").touch()
    with pytest.raises(DataError, match=r"Other_TRAIN.ts and Steps_TRAIN.ts; wanted one file for train"):
        read_series(folder)
    for kind in ("multilabel", "token_classification"):
        with pytest.raises(PlanError, match=f"{kind} of series"):
            reader(Align, None, task=kind)  # pyright: ignore
    with pytest.raises(PlanError, match="columns for a model of series"):
        reader(Align, None, {"label": "x"})


def test_series_with_a_fault_are_named_and_left_out(tmp_path: File) -> None:
    faults = {
        "1,2:3,4,5:up": "channel 1 of 3 points, channel 0 of 2",
        "1,2:up": "1 channels where the header says 2",
        "1,2:3,x:up": "'x' in channel 1",
        "1,inf:3,4:up": "an infinite value in channel 0",
        "?,?:?,NaN:up": "no value at all",
        "1,2:3,4:sideways": "label 'sideways', which the header does not name",
        "1,2::up": "channel 1 of 1 points",
        "": "",
    }
    file, told = tmp_path / "a.ts", list[tuple[str, str]]()
    file.write_text(HEADER + "\n".join(faults) + "\n" + "5,6:7,8:down\n" * 8)
    found = read_series(file, on_skip=lambda where, why: told.append((where, why)))
    assert len(found) == 8 and found.classes == ("up", "down") and [where for where, _ in told] == [f"{file}, line {8 + n}" for n in range(7)]
    assert all(wanted in why for (_, why), wanted in zip(told, faults.values(), strict=False)), told
    file.write_text(HEADER + "1,2:3,x:up\n" * 3 + "1,2:3,4:up\n")
    with pytest.raises(DataError, match=r"3 of 4 series that cannot be used, such as .*line 8"):
        read_series(file)
    (tmp_path / "a.csv").write_text("1,2,3\n,5,6\n1,8,9\n1,8,9")
    assert read_series(tmp_path / "a.csv").skipped == ((f"{tmp_path / 'a.csv'}, line 2", "no label"),)
    np.savez(tmp_path / "half.npz", x=np.zeros((3, 1, 2)), y=np.array([1.0, 2.5, 1.0]))
    assert read_series(tmp_path / "half.npz").skipped[0][1] == "float where a label was wanted"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("@timeStamps true\n@data\n", "line 1: series with time stamps"),
        ("@classLabel true a b\n1,2:a\n", "line 2: '1,2:a' before @data"),
        ("@classLabel true a b\n", "without @data"),
        ("@targetLabel true\n@data\n1,2:0.5\n", "--task regression"),
    ],
)
def test_headers_that_cannot_be_followed(tmp_path: File, text: str, match: str) -> None:
    (tmp_path / "a.ts").write_text(text)
    with pytest.raises(DataError, match=match):
        read_series(tmp_path / "a.ts")


def test_files_that_cannot_be_read(tmp_path: File, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "odd.npz", x=np.array([["a", "b"]]))
    np.savez(tmp_path / "long.npz", x=np.zeros((3, 1, 5)), y=np.zeros(2))
    np.savez(tmp_path / "objects.npz", x=np.array([[1, 2], [3]], dtype=object))
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04 torn")
    (tmp_path / "torn.ts.gz").write_bytes(gzip.compress(HEADER.encode() * 9)[:40])
    wanted = {
        "odd.npz": "type <U1",
        "long.npz": "for 3 series",
        "objects.npz": "type object",
        "torn.npz": "torn.npz",
        "torn.ts.gz": "torn.ts.gz",
        "no.ts": "no file",
    }
    for name, match in wanted.items():
        with pytest.raises(DataError, match=match):
            read_series(tmp_path / name)
    file = archived(tmp_path / "a.ts", *waves(4))
    assert read_series(file, classes=("behind", "before", "none")).labels.tolist() == [1, 0, 1, 0]  # pyright: ignore
    with pytest.raises(DataError, match=r"line 5: label 'before'; wanted one of behind"):
        read_series(file, classes=("behind",))
    monkeypatch.setattr(archive, "LINE_LIMIT", 64)
    with pytest.raises(DataError, match="line 5: more than 64 letters"):
        read_series(file)


def test_channels_are_brought_to_one_scale_and_length() -> None:
    values = [torch.tensor([[1.0, 3, NAN], [5, 5, 5]]), torch.tensor([[1.0, 3], [5, NAN]])]
    feed = Align.learned([value.double() for value in values])
    assert feed == Align(3, (2.0, 5.0), (1.0, 1.0)) and feed.channels == 2  # a channel that never moves: nothing to divide by
    torch.testing.assert_close(feed(values)[1], torch.tensor([[-1.0, 1, NAN], [0, NAN, NAN]]), equal_nan=True)
    assert torch.equal(feed(np.full((2, 2, 9), 5.0)), torch.tensor([[3.0] * 3, [0.0] * 3]).expand(2, 2, 3))  # what is behind the length is not read
    assert Align(2, (0.0,), (2.0,))([[4, 6]]).tolist() == [[[2.0, 3.0]]]
    for wrong, match in (
        ([[1.0, 2, 3]], r"row 0: a series of shape \(3,\); wanted 2 channels"),
        ([*values[:1], [[1, 2], [3, math.inf]]], "row 1: an infinite value"),
        ([[[1e300, 2], [3, 4]]], "row 0: an infinite value"),
        ([[[NAN] * 3 + [1.0], [NAN] * 4]], "no value in the first 3 points"),
        ([["a", "b"]], "a list that is no series"),
        ([], "no series"),
    ):
        with pytest.raises(DataError, match=match):
            feed(wrong)
    with pytest.raises(DataError, match=r"walk.ts, line 7"):
        feed([[1.0]], where=["walk.ts, line 7"])
    with pytest.raises(DataError, match="channel 1 with nothing in it"):
        Align.learned([torch.tensor([[1.0, 2], [NAN, NAN]])])
    for length, mean, std in ((0, (0.0,), (1.0,)), (3, (), ()), (3, (0.0,), (0.0,)), (3, (NAN,), (1.0,))):
        with pytest.raises(PlanError):
            Align(length, mean, std)


def test_shapes_follow_the_series(tmp_path: File) -> None:
    for points, patch, stride in ((24, 2, 1), (150, 6, 3), (1460, 46, 23), (1, 1, 1)):
        samples = SeriesSet((torch.arange(2.0 * points).view(2, points).double(),), torch.tensor([0]), ("a", "b"))
        feed, a = fresh.fitted(Align, samples, None, task="classification", length=None, vocabulary=0)
        assert isinstance(feed, Align) and (feed.length, a.points, a.channels, a.patch, a.stride) == (points, points, 2, patch, stride) and a.tokens <= 66
        assert fresh.fitted(Align, samples, None, task="classification", length=9, vocabulary=0)[1].points == 9
    few = archived(tmp_path / "few.ts", *waves(60))
    with pytest.raises(DataError, match="series to learn decisions from"):
        verbs.scratch(few, recipe=RECIPE)
    parts = Parts.read(archived(tmp_path / "more.ts", *waves(250)), seed=0, read=reader(Align, None))
    assert parts.teach is not None and [len(part) for part in (parts.teach, parts.decide, parts.place, parts.report)] == [118, 41, 41, 50]


@pytest.mark.slow
def test_series_the_whole_way(tmp_path: File) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    for split, count, seed in (("TRAIN", 400, 0), ("TEST", 100, 1)):
        x, labels = waves(count, seed)
        x[::5, :, 32:] = NAN  # shorter ones
        x[1::7, 0, 3:5] = NAN  # and gaps
        archived(data / f"Waves_{split}.ts", x, labels)
    told: list[str] = []
    network, feed, parts = verbs.scratch(data, recipe=RECIPE, architecture=SHAPE, least_steps=250, tell=told.append)
    assert isinstance(parts.teach, SeriesSet) and feed == Align.learned(parts.teach.values) and network.architecture.input_shape == (2, 40)
    assert told[1].endswith("250 steps: there are few series") and isinstance(parts.report, SeriesSet)
    inputs, labels = next(parts.report.batches(1000, feed))
    assert (network.eval()(inputs, network.space.full).argmax(-1) == labels).double().mean() > 0.85
    weighed = verbs.adapt(network, parts, plan=PLAN, out=out, preprocess=feed, backend="eager", buckets=(4,), repeats=2)
    assert 0 < weighed.figures["gmacs_adaptive"] < weighed.figures["gmacs_dense"] and "model(series)" in (out / "README.md").read_text()
    again, some = load(out, backend="eager", buckets=(4,)), list(parts.report.values[:9])
    ours, theirs, arrays = weighed.adapted(some), again(some), again([value.tolist() for value in some])
    assert again.bundle.preprocess == feed and torch.equal(ours.path, theirs.path) and "[align]" in (out / "plan.toml").read_text()
    torch.testing.assert_close(ours.logits, theirs.logits)
    torch.testing.assert_close(arrays.logits, theirs.logits)
    torch.testing.assert_close(again(some[:1]).logits, theirs.logits[:1], rtol=1e-4, atol=1e-5)  # alone as in company
    odd = tmp_path / "odd.ts"
    odd.write_text("@dimensions 2\n@data\n1,2,3:4,5,6\n1,2,3:4,5,x\n7,8:9,9\n")
    found = shell("run", out, data / "Waves_TEST.ts", odd, "--json")
    shown = json.loads(found.stdout)
    assert found.exit_code == 5 and len(shown["answers"]) == 102 and [row["file"] for row in shown["skipped"]] == [f"{odd}, line 4"]
    right = [row["label"] == parts.report.classes[label] for row, label in zip(shown["answers"], labels.tolist(), strict=False)]  # pyright: ignore
    assert abs(sum(right) / 100 - weighed.figures["accuracy_adaptive"]) < 0.01


@pytest.mark.slow
def test_numbers_are_foretold_where_the_level_says_them(tmp_path: File) -> None:
    x, _ = waves(500)
    levels = [round(float(values[0].mean()), 4) for values in x]
    archived(tmp_path / "levels.ts", x, levels, "@targetLabel true")
    network, feed, parts = verbs.scratch(tmp_path / "levels.ts", recipe=RECIPE, architecture=SHAPE, least_steps=150, task="regression")
    inputs, labels = next(parts.report.batches(1000, feed))
    assert labels is not None and labels.shape == (100, 1) and network.architecture.classes == 1
    error = (network.eval()(inputs, network.space.full) - labels).abs().mean() / network.architecture.span
    assert error < 0.1  # normalised series alone leave about a quarter
    plan = replace(PLAN, choices=PLAN.choices[1:], rungs=2, epochs=0.5)
    weighed = verbs.adapt(network, parts, plan=plan, task="regression", out=tmp_path / "out", preprocess=feed, backend="eager", buckets=(4,), repeats=2)
    assert 0.85 < weighed.figures["accuracy_dense"] <= 1
    rows, _ = verbs.run(tmp_path / "out", [tmp_path / "levels.ts"])
    assert len(rows) == 500 and isinstance(rows[0]["value"], float)
