"""Texts, rows, series and masks that are larger than a bound lie in a file: every answer and every error is as it is in memory, and little of them is held."""

from __future__ import annotations

import errno
import gzip
import io
import json
import tempfile
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

from apportion.errors import DataError
from apportion.intake import Align, Preprocess, Tabulate, read_rows, read_series, read_texts
from apportion.intake.laid import Lay, gathered
from apportion.intake.masks import read_masked
from apportion.intake.moments import Moments
from apportion.intake.written import PLAIN, SERIES, TEXT, Keeper, Written, picked
from tests.rooms.test_deliver_texts import tokenise

COUNT = 60


def jsonl(file, rows):
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    return file


def texts(folder):
    rows = [{"text": "good " * (1 + i % 7) + "film", "label": "ab"[i % 2], "pair": "bad ü" if i % 3 else None} for i in range(COUNT)]
    return jsonl(folder / "texts.jsonl", [*rows, {"text": "late"}, {"text": " ", "label": "a"}])


def words(folder):
    rows = [{"text": " ".join(["good", "film"] * (1 + i % 4)), "label": ["O", "X"] * (1 + i % 4)} for i in range(COUNT)]
    return jsonl(folder / "words.jsonl", [*rows, {"text": "good", "label": ["O", "O"]}])


def table(folder):
    rows = [{"acid": None if i % 9 == 0 else i / 7, "kind": ["red", "white", None, "late" if i == 5 else "red"][i % 4], "same": 0.1} for i in range(COUNT)]
    rows = [{**row, "count": i, "label": f"{'ab'[i % 2]}|{'cd'[i % 3 % 2]}"} for i, row in enumerate(rows)]
    return jsonl(folder / "rows.jsonl", [*rows[:9], "broken", *rows[9:], {"acid": 1}])


def series(folder):
    random = np.random.default_rng(0)
    x = random.standard_normal((COUNT, 2, 9))
    x[::3, :, 6:] = np.nan
    x[7] = np.nan
    np.savez(folder / "series.npz", x=x, y=np.arange(COUNT) % 3)
    return folder / "series.npz"


def masks(folder):
    random = np.random.default_rng(0)
    for name, shape, mode in (("images", (9, 12, 3), "RGB"), ("masks", (9, 12), "L")):
        (folder / name).mkdir()
        for i in range(COUNT):
            Image.fromarray(random.integers(0, 4, shape, dtype=np.uint8), mode).save(folder / name / f"{i:03}.png")
    return folder


FEED = Preprocess(8, (0.5,) * 3, (0.25,) * 3)
KINDS = {
    "texts": (texts, read_texts, lambda found: tokenise(), "texts"),
    "words": (words, lambda source, **where: read_texts(source, task="token_classification", **where), lambda found: tokenise(), "texts"),
    "rows": (table, lambda source, **where: read_rows(source, task="multilabel", **where), lambda found: Tabulate.learned(found.cells), "cells"),
    "series": (series, read_series, lambda found: Align.learned(found.values), "values"),
    "masks": (masks, lambda source, **where: read_masked(source, feed=FEED, **where), lambda found: FEED, "images"),
}


def same(a, b):
    return (a is None and b is None) or (a.dtype == b.dtype and torch.equal(torch.nan_to_num(a, 9e9), torch.nan_to_num(b, 9e9)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", ["train", "all"])
def test_a_set_in_a_file_is_as_it_is_in_memory(kind, split, tmp_path):
    make, read, learn, values = KINDS[kind]
    source, folder = make(tmp_path), tmp_path / "laid"
    held, filed = (read(source, split=split, bound=bound, folder=folder) for bound in (2**62, 0))
    assert kind == "masks" or (isinstance(getattr(held, values), tuple) and isinstance(getattr(filed, values), Written))
    feed = learn(held)
    assert learn(filed) == feed and held.classes == filed.classes and held.skipped == filed.skipped and len(held) == len(filed)
    for a, b in ((held, filed), *zip(held.split(0.2, seed=1), filed.split(0.2, seed=1), strict=True), (held.rows([3, 0]), filed.rows([3, 0]))):
        assert same(a.labels, b.labels) and (kind == "masks" or list(a.where) == list(b.where))
        assert all(
            torch.equal(torch.as_tensor(x).nan_to_num(9), y.nan_to_num(9)) if kind == "series" else x == y
            for x, y in zip(getattr(a, values), getattr(b, values), strict=True)
        )
        for (x, y), (u, v) in zip(a.batches(7, feed, seed=2), b.batches(7, feed, seed=2), strict=True):
            assert same(x, u) and same(y, v)
        if values == "texts":
            (x, y), (u, v), (p, q) = a.gathered(feed), b.gathered(feed, bound=0, folder=folder), next(a.batches(len(a), feed))
            assert same(x, u) and same(x, p) and same(y, v) and same(y, q)
        else:
            assert same(gathered(a, feed), gathered(b, feed, bound=0, folder=folder))
    assert same(read(source, split=split, limit=10, bound=0, folder=folder).labels, read(source, split=split, limit=10).labels)
    if kind != "rows":
        faults = []
        for found in (held, filed):
            with pytest.raises(DataError) as error:
                found.check(1)
            faults.append(str(error.value))
        assert faults[0] == faults[1]
    assert not list(folder.iterdir())


def test_pairs_and_what_parquet_holds_come_back(tmp_path):
    rows = [{"text": "a film", "pair": f"b {i} \ud800", "label": i % 2} for i in range(9)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    held, filed = (read_texts(tmp_path / "a.jsonl", pair="pair", bound=bound) for bound in (2**62, 0))
    assert list(filed.texts) == list(held.texts) and filed.pairs and filed.texts[-1] == ("a film", "b 8 \ud800")
    assert list(filed.texts[2:4]) == list(held.texts[2:4])
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    from datetime import date
    from decimal import Decimal

    columns = {"day": [date(2020, 1, 1 + i % 3) for i in range(30)], "price": [Decimal(i) / 10 for i in range(30)], "in": [i % 2 == 0 for i in range(30)]}
    parquet.write_table(pa.table({**columns, "label": ["a", "b"] * 15}), tmp_path / "a.parquet")
    held, filed = (read_rows(tmp_path / "a.parquet", bound=bound) for bound in (2**62, 0))
    feed = Tabulate.learned(held.cells)
    assert Tabulate.learned(filed.cells) == feed and feed.categories == ("day",) and torch.equal(feed(held.cells), feed(filed.cells))


@pytest.mark.parametrize(
    ("name", "content", "read"),
    [
        ("a.jsonl", b'{"text": "a"}\n' * 3 + b"x\n" * 4, read_texts),
        ("a.jsonl", b"", read_texts),
        ("a.csv", b"acid,label\n1,a\n2,b,c\n3\n,\n4,a,b\n", read_rows),
        ("a.csv", b"acid,label\n1,a\n\xff,b\n", read_rows),
        ("a.jsonl", b'{"acid": 1}\n{"acid": 1, "label": 2}\n{"acid": 1, "label": 3}\n', read_rows),
        ("a.csv.gz", gzip.compress(b"text,label\n" + b"a,b\n" * 99)[:25], read_texts),
        ("a.ts", b"@classLabel true a b\n@data\n1,2:a\n1,2:3,4:b\n1:2:a\n", read_series),
        ("a.csv", b"1,2,3,4\nx,y\n2,3,4,a\n", read_series),
    ],
)
def test_errors_are_the_same(name, content, read, tmp_path):
    (tmp_path / name).write_bytes(content)
    said = []
    for bound in (2**62, 0):
        with pytest.raises(DataError) as error:
            read(tmp_path / name, bound=bound, folder=tmp_path / "laid")
        said.append(str(error.value))
    assert said[0] == said[1] and name in said[0]
    assert not (tmp_path / "laid").is_dir() or not list((tmp_path / "laid").iterdir())


def peak(call):
    tracemalloc.start()
    try:
        kept = call()
        return kept, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ["texts", "rows", "series"])
def test_little_is_held(kind, tmp_path):
    count, wide = 300, 8000  # 2.4 MB as they stand
    if kind == "texts":
        file, read, learn = tmp_path / "a.csv", read_texts, lambda found: found.gathered(tokenise(), bound=0)
        file.write_text("text,label\n" + "".join(f"{'good ' * 9 + 'film' * (wide // 4)}{i},{i % 2}\n" for i in range(count)))
    elif kind == "rows":
        file, read, learn = tmp_path / "a.jsonl", read_rows, lambda found: [None for _ in found.batches(16, Tabulate.learned(found.cells[:40]))]
        jsonl(file, [{**{f"c{n}": str(i % 5 + n) * (wide // 4) for n in range(4)}, "label": i % 2} for i in range(count)])
    else:
        file, read, learn = tmp_path / "a.npz", read_series, lambda found: gathered(found, Align.learned(found.values), bound=0)
        np.savez(file, x=np.arange(count * wide // 8.0).reshape(count, -1), y=np.arange(count) % 2)
    held = read(file)  # whatever is imported on the way
    found, reading = peak(lambda: read(file, bound=2**16, folder=tmp_path / "laid"))
    _, passing = peak(lambda: learn(found) is None)
    assert len(found) == len(held) and reading < 8e5 and passing < 9e5, (reading, passing)


def test_a_file_is_begun_once_the_bound_is_passed_and_has_no_name(tmp_path):
    keeper = Keeper(TEXT, Lay(400, tmp_path / "some"))
    for i in range(3):
        keeper.add(f"text {i}")
    assert not (tmp_path / "some").exists() and len(keeper) == 3
    for i in range(3, 50):
        keeper.add(f"text {i}")
    assert len(keeper) == 50 and not list((tmp_path / "some").iterdir())
    kept = keeper.done()
    assert isinstance(kept, Written) and list(kept) == [f"text {i}" for i in range(50)] and kept[-1] == "text 49" and kept.index("text 7") == 7
    some = picked(picked(kept, torch.tensor([9, 3, 3])), torch.tensor([1, 0]))
    assert list(some) == ["text 3", "text 9"]
    with pytest.raises(IndexError):
        some[2]
    one = Keeper(SERIES, Lay(0))
    one.add(torch.tensor([[1.0, torch.nan], [3, 4]]))
    assert torch.equal(one.done()[0].nan_to_num(7), torch.tensor([[1.0, 7], [3, 4]]).double())
    assert Keeper(PLAIN, Lay(0)).done() == ()


def test_masks_chosen_from_a_file_lie_in_one_too(tmp_path, monkeypatch):
    plain, begun = tempfile.TemporaryFile, list[str]()

    def opened(*, dir):
        begun.append(dir)
        return plain(dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", opened)
    masked = read_masked(masks(tmp_path), feed=FEED, bound=20 * 128, folder=tmp_path / "laid")
    assert len(begun) == 1
    masked.split(0.2)  # 48 and 12: these fit
    assert len(begun) == 2


class Full(io.BytesIO):
    def write(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: Full())
    with pytest.raises(DataError, match=r"No space left on device.*room for more than 0\.0 GB of samples.*another disk"):
        read_texts(texts(tmp_path), bound=0, folder=tmp_path / "laid")


def test_moments_of_parts_are_those_of_all():
    x = torch.randn(100, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 5 + 1e6
    x[x < 1e6 - 5] = torch.nan
    x[:, 2] = 0.1
    x[:40, 0] = torch.nan  # nothing in the first parts
    moments = Moments(3)
    for part in x.split(7):
        moments.add(part)
    columns = [column[~column.isnan()] for column in x.T]
    torch.testing.assert_close(moments.mean, torch.stack([column.mean() for column in columns]), rtol=1e-14, atol=0)
    torch.testing.assert_close(moments.std[:2], torch.stack([column.std(correction=0) for column in columns[:2]]), rtol=1e-9, atol=0)
    assert moments.std[2] == 0 and moments.mean[2] == 0.1 and moments.count.tolist() == [len(column) for column in columns]
