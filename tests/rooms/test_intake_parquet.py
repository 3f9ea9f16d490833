"""A table is the same table as .parquet, .csv and .jsonl; what is wrong with one is named by file and row."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path as File
from typing import Any

import pytest
import torch

from apportion.errors import DataError, PlanError
from apportion.intake import opened, parquet
from apportion.intake.texts import TextSet, read_texts
from tests.rooms.test_deliver_texts import tokenise

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("tokenizers")
ROWS = [{"text": f"a good film {i}", "other": f"was it {i}?", "label": ("bad", "good", "so so")[i % 3]} for i in range(30)]


def written(file: File, table: Any, groups: int = 3) -> File:
    table = pa.table(table) if isinstance(table, dict) else pa.Table.from_pylist(table) if isinstance(table, list) else table
    pq.write_table(table, file, row_group_size=max(1, -(-len(table) // groups)))
    return file


def same(one: TextSet, other: TextSet) -> bool:
    both = one.labels is not None and other.labels is not None
    return (one.texts, one.classes) == (other.texts, other.classes) and (torch.equal(one.labels, other.labels) if both else one.labels is other.labels)


@pytest.mark.parametrize("pair", [None, "other"])
@pytest.mark.parametrize("numbers", [False, True])
def test_every_format_gives_the_same(tmp_path: File, pair: str | None, numbers: bool) -> None:
    rows = [{**row, "label": i % 3} if numbers else row for i, row in enumerate(ROWS)]
    files = written(tmp_path / "data.parquet", rows), tmp_path / "data.csv", tmp_path / "data.jsonl"
    with files[1].open("w", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    files[2].write_text("\n".join(map(json.dumps, rows)))
    assert pq.ParquetFile(files[0]).num_row_groups == 3
    for split in ("train", "test", "all"):
        first, *others = (read_texts(file, split=split, pair=pair) for file in files)
        assert all(same(first, other) for other in others) and first.pairs == (pair is not None)
    found = read_texts(files[0], text="other", label="none")
    assert found.labels is None and found.texts[29] == "was it 29?" and found.where == tuple(f"{files[0]}, row {row}" for row in range(30))
    assert same(read_texts(files[0], limit=6, pair=pair), read_texts(files[1], limit=6, pair=pair))


def test_labels_and_texts_of_other_types(tmp_path: File) -> None:
    names, numbers = [row["label"] for row in ROWS], [i % 3 for i in range(30)]
    texts = pa.array([row["text"] for row in ROWS])
    wanted = read_texts(written(tmp_path / "names.parquet", {"text": texts, "label": names}))
    for kind in (pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())):
        assert same(read_texts(written(tmp_path / "data.parquet", {"text": texts.cast(kind), "label": pa.array(names).cast(kind)})), wanted)
    wanted = read_texts(written(tmp_path / "numbers.parquet", {"text": texts, "label": numbers}))
    for label in (pa.array(numbers, pa.uint8()), pa.array(numbers).dictionary_encode(), pa.array(numbers, pa.float64()), pa.array(map(str, numbers))):
        assert same(read_texts(written(tmp_path / "data.parquet", {"text": texts, "label": label})), wanted)
    assert wanted.classes == ("0", "1", "2") and wanted.labels is not None and wanted.labels.tolist() == numbers


def test_bad_rows_are_named(tmp_path: File) -> None:
    told: list[tuple[str, str]] = []
    texts, labels = [row["text"] for row in ROWS], pa.array([0.0, 1.0, None, float("nan"), 0.5, *[1.0] * 25])
    texts[7], texts[11] = None, "  "
    file = written(tmp_path / "data.parquet", {"text": texts, "label": labels})
    found = read_texts(file, on_skip=lambda where, why: told.append((where, why)))
    assert found.labels is not None and found.labels.tolist() == [0, *[1] * 24] and tuple(told) == found.skipped
    whys = ["no label", "no label", "float where a label was wanted", "no text", "an empty text"]
    assert told == [(f"{file}, row {row}", why) for row, why in zip((2, 3, 4, 7, 11), whys, strict=True)]
    lines = "\n".join(json.dumps({"text": text, "label": label}) for text, label in zip(texts, labels.to_pylist(), strict=True))
    (tmp_path / "data.jsonl").write_text(lines)
    assert same(read_texts(tmp_path / "data.jsonl"), found)


def test_what_cannot_be_used_is_refused(tmp_path: File) -> None:
    file, texts = tmp_path / "data.parquet", [row["text"] for row in ROWS]
    for table, what in (
        ({"body": texts, "label": texts}, r"data\.parquet with columns body, label; wanted a column 'text'"),
        ({"text": list(range(30))}, r"30 of 30 rows.*data\.parquet, row 0: int where a text"),
        ({"text": [text.encode() for text in texts]}, "row 0: bytes where a text"),
        ({"text": texts, "label": [[1]] * 30}, "row 0: list where a label"),
        ({"text": pa.array([], pa.string())}, r"data\.parquet without any rows"),
        ({"text": texts, "label": pa.nulls(30, pa.int64())}, "row 0: no label"),
        ({"text": pa.array([b"\xff"] * 30).view(pa.string())}, r"data\.parquet: .*wanted a whole \.parquet file, its texts in UTF-8"),
    ):
        with pytest.raises(DataError, match=what):
            read_texts(written(file, table))
    whole = written(file, ROWS).read_bytes()
    for torn in (b"", b"PAR1", whole[:-10], whole[:200], bytes(200) + whole[200:], whole[:4] + bytes(len(whole) // 2) + whole[4 + len(whole) // 2 :]):
        file.write_bytes(torn)
        with pytest.raises(DataError, match=r"data\.parquet: .*whole \.parquet file"):
            read_texts(file)


def test_a_folder_and_what_is_asked(tmp_path: File) -> None:
    written(tmp_path / "train.parquet", ROWS[:20])
    test = written(tmp_path / "validation.parquet", [{"text": "a film", "label": "new"}])
    assert read_texts(tmp_path, split="test").labels.tolist() == [2] and read_texts(tmp_path, split="train").classes == ("bad", "good", "new", "so so")
    assert list(opened([test, "a film"], tokenise())) == [(f"{test}, row 0", "a film", ""), ("text 2", "a film", "")]
    with pytest.raises(DataError, match="no table"):
        list(opened(["gone.parquet"], tokenise()))


def test_without_the_package_the_extra_is_named(tmp_path: File, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(tmp_path / "data.parquet", ROWS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(PlanError, match=r"data\.parquet, but no pyarrow.*apportion\[text\]"):
        read_texts(file)


def test_a_group_of_rows_is_held_at_a_time(tmp_path: File) -> None:
    count, groups = 6000, 30
    table = {"text": [f"{i} " * 200 for i in range(count)], "beside": [f"{-i} " * 500 for i in range(count)], "label": [i % 2 for i in range(count)]}
    file = written(tmp_path / "data.parquet", table, groups)
    before, most = pa.total_allocated_bytes(), 0
    for row, values in parquet.entries(file, ["text"], "label"):
        assert values.keys() == {"text", "label"} and values["text"] == table["text"][row]
        most = max(most, pa.total_allocated_bytes() - before)
    assert row == count - 1 and 0 < most < sum(map(len, table["text"])) / 3
