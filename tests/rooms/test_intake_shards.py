"""Tables in several files are one table, rows are read from .parquet as from .csv, and the file or row that is unlike the others is named."""

from __future__ import annotations

import csv
import datetime
import json
import sys
from decimal import Decimal
from pathlib import Path as File
from typing import Any

import pytest

from apportion.errors import DataError, PlanError
from apportion.intake import Tabulate, Tokenise, fresh, opened, read_rows, read_texts
from apportion.intake.shards import columns_of, pieces

ROWS = [{"acid": i / 4, "soil": ("clay", "sand")[i % 2], "label": ("red", "white")[i // 2 % 2]} for i in range(24)]


def table(file: File, rows: list[dict[str, Any]] = ROWS) -> File:
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]), delimiter="\t" if file.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return file


def written(file: File, rows: Any = ROWS) -> File:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.Table.from_pylist(rows) if isinstance(rows, list) else pa.table(rows), file, row_group_size=7)
    return file


def cut(folder: File, names: list[str], rows: list[dict[str, Any]] = ROWS, write: Any = table) -> File:
    folder.mkdir()
    step = -(-len(rows) // len(names))
    for place, name in enumerate(names):
        write(folder / name, rows[place * step : (place + 1) * step])
    return folder


def test_rows_of_parquet_are_those_of_csv(tmp_path: File) -> None:
    rows = [*ROWS[:-1], {**ROWS[-1], "acid": None}]
    one, other = read_rows(written(tmp_path / "a.parquet", rows)), read_rows(table(tmp_path / "a.csv", rows))
    assert one.labels is not None and one.labels.tolist() == other.labels.tolist() and one.classes == other.classes == ("red", "white")  # pyright: ignore
    assert Tabulate.learned(one.cells) == Tabulate.learned(other.cells) and one.where[5] == f"{tmp_path / 'a.parquet'}, row 5"
    assert Tabulate.learned(one.cells)(one.cells).isnan().sum() == 1 and fresh.kind_of(tmp_path / "a.parquet") is Tabulate
    for split in ("train", "test"):
        assert [dict(row) for row in read_rows(tmp_path / "a.parquet", split=split).cells] == [
            {"acid": float(row["acid"]) if row["acid"] else None, "soil": row["soil"]} for row in read_rows(tmp_path / "a.csv", split=split).cells
        ]
    assert list(opened([tmp_path / "a.parquet"], Tabulate.learned(one.cells)))[3][0].endswith("row 3")
    kinds = {"flag": True, "price": Decimal("1.50"), "day": datetime.date(2026, 1, 2), "label": 2.0}
    found = read_rows(written(tmp_path / "kinds.parquet", [kinds, {**kinds, "price": None, "flag": False, "label": 0.0}] * 3), task="regression")
    feed = Tabulate.learned(found.cells)
    assert (feed.numbers, feed.categories, feed.values) == (("flag", "price"), ("day",), (("2026-01-02",),)) and found.labels is not None


def test_what_is_wrong_with_a_row_of_parquet_is_named(tmp_path: File, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, str]] = []
    rows = [{**row, "tags": None} for row in ROWS]
    rows[4]["label"], rows[9]["tags"] = None, ["a"]
    file = written(tmp_path / "a.parquet", rows)
    assert len(read_rows(file, on_skip=lambda where, why: told.append((where, why)))) == 22
    assert told == [(f"{file}, row 4", "no label"), (f"{file}, row 9", "a list in column 'tags', where a number or a word was wanted")]
    feed = Tabulate.learned([{"acid": 1.0}])
    _, (where, row, why) = opened([written(tmp_path / "b.parquet", [{"acid": "1"}, {"acid": "sour"}])], feed)
    assert row is None and where.endswith("b.parquet, row 1") and "'sour' in column 'acid'" in why
    (tmp_path / "torn.parquet").write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"torn\.parquet: .*whole \.parquet file"):
        read_rows(tmp_path / "torn.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(PlanError, match=r"a\.parquet, but no pyarrow"):
        read_rows(file)


@pytest.mark.parametrize(
    ("names", "write"),
    [
        (["a.csv", "b.csv", "c.csv"], table),
        (["x.tsv"] * 1 + ["y.tsv"], table),
        ([f"part-0000{n}-of-00003.parquet" for n in range(3)], written),
    ],
)
def test_pieces_are_one_table(tmp_path: File, names: list[str], write: Any) -> None:
    folder = cut(tmp_path / "pieces", names, write=write)
    (folder / "README.md").write_text("a note")
    whole, found = read_rows(table(tmp_path / "whole.csv")), read_rows(folder)
    assert [{name: str(cell) for name, cell in row.items()} for row in found.cells] == [dict(row) for row in whole.cells]
    assert found.labels.tolist() == whole.labels.tolist() and found.where[-1].startswith(str(folder / names[-1]))  # pyright: ignore
    train, test = read_rows(folder, split="train"), read_rows(folder, split="test")
    assert (len(train), len(test)) == (20, 4) and not set(train.where) & set(test.where) and fresh.kind_of(folder) is Tabulate


def test_pieces_of_train_and_test(tmp_path: File) -> None:
    names = ["train-00000-of-00002.csv", "train-00001-of-00002.csv", "validation_1.csv"]
    folder = cut(tmp_path / "both", names)
    table(folder / "train_notes.csv", [{"other": 1}])  # no piece of anything
    assert [len(read_rows(folder, split=split)) for split in ("train", "test", "all")] == [16, 8, 24]  # pyright: ignore
    chosen, every, own = pieces(folder, "test")
    assert own and [file.name for file in chosen] == names[2:] and [file.name for file in every] == names


def test_texts_in_pieces(tmp_path: File) -> None:
    rows = [{"text": f"a good film {i}", "label": ("bad", "good")[i % 2]} for i in range(20)]
    pytest.importorskip("tokenizers")
    for name, names, write in (("tables", ["a.csv", "b.csv"], table), ("columns", ["a.parquet", "b.parquet"], written)):
        folder = cut(tmp_path / name, names, rows, write)
        assert read_texts(folder).texts == tuple(row["text"] for row in rows) and len(read_texts(folder, split="test")) == 4
        assert fresh.kind_of(folder) is Tokenise and {where.split(",")[0] for where in read_texts(folder).where} == {str(folder / name) for name in names}
        write(folder / names[1], [{"label": "bad", "text": "more", "id": 7}])  # a column that is not asked for, another order
        assert read_texts(folder).texts[-1] == "more"
        write(folder / names[1], [{"text": "more"}])
        with pytest.raises(DataError, match=rf"{names[1]} without a column 'label', its columns being text; wanted those of {names[0]}: text, label"):
            read_texts(folder)


def test_the_piece_that_differs_is_named(tmp_path: File) -> None:
    folder = cut(tmp_path / "pieces", ["a.csv", "b.csv", "c.csv"])
    table(folder / "b.csv", [{"acid": 1, "earth": "clay", "label": "red"}])
    with pytest.raises(DataError, match=r"b\.csv with a column 'earth', its columns being acid, earth, label; wanted those of a\.csv: acid, soil, label"):
        read_rows(folder)
    table(folder / "b.csv", [{"label": "red", "acid": 1, "soil": "clay"}])  # another order is the same table
    assert len(read_rows(folder)) == 17
    written(folder / "d.parquet")
    with pytest.raises(DataError, match=r"d\.parquet beside a\.csv"):
        read_rows(folder)
    (tmp_path / "lines").mkdir()
    for name, row in (("a", {"acid": 1, "label": 2}), ("b", {"acid": 1})):
        (tmp_path / "lines" / f"{name}.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=r"b\.jsonl without a column 'label'"):
        read_rows(tmp_path / "lines")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="without a table at all"):
        read_rows(tmp_path / "nothing")
    (tmp_path / "torn.csv").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"torn\.csv: .*UTF-8"):
        columns_of(tmp_path / "torn.csv")
