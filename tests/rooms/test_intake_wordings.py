"""What somebody new is told of data that cannot be used: what was found, what was wanted and what to do, before anything is trained or tried."""

from __future__ import annotations

import json
import wave
from pathlib import Path as File
from typing import cast

import numpy as np
import pytest
import torch
from PIL import Image

from apportion.errors import DataError
from apportion.intake import KINDS, Align, ImageSet, Listen, Parts, Preprocess, RowSet, SeriesSet, Tabulate, TextSet, Tokenise, fresh, reader
from apportion.intake.folders import allowed, counted

FEED = {kind: fresh.blank(kind, None, None) for kind in (Preprocess, Listen, Tabulate, Align)}


def picture(file: File) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(file)


def silence(file: File, count: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(file), "wb") as sound:
        sound.setparams((1, 2, 16000, 0, "NONE", ""))
        sound.writeframes(np.zeros(count, np.int16).tobytes())


def made(folder: File) -> File:
    """One of everything that is not as it should be."""
    for name, text in {
        "zero.csv": "",
        "head.csv": "text,label\n",
        "one.csv": "text,label\na film,1\n",
        "latin.csv": "",
        "columns.csv": "body,label\na film,1\n",
        "zero.ts": "",
        "zero.wav": "",
        "labels/labels.csv": "file,label\n",
        "words.txt": "a film",
        "notes/readme.txt": "a film",
        "onlytest/test.csv": "text,label\na film,1\n",
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "latin.csv").write_bytes("text,label\ncafé,1\n".encode("latin-1"))
    (folder / "zero.npz").write_bytes(b"")
    (folder / "empty" / "train").mkdir(parents=True)
    for label in "ab":
        picture(folder / "tests" / "test" / label / "1.png")
        silence(folder / "silent" / label / "1.wav", 0)
    (folder / "emptyclass" / "a").mkdir(parents=True)
    picture(folder / "emptyclass" / "b" / "1.png")
    return folder


CASES = {
    "missing.csv": r"no file or folder .*missing\.csv",
    "zero.csv": r"zero\.csv without any rows; wanted at least one",
    "head.csv": r"head\.csv without any rows; wanted at least one",
    "one.csv": r"1 text, of which a part of 0\.5 is to be held out; wanted at least one on either side",
    "latin.csv": r"latin\.csv: bytes that are no UTF-8 .*; wanted a whole table in UTF-8\. Convert it",
    "zero.ts": r"zero\.ts without @data",
    "zero.wav": r"zero\.wav: an empty file.*wanted a usable recording",
    "zero.npz": r"zero\.npz: File is not a zip file; wanted x_train",
    "labels": r"labels with a table of labels without any rows",
    "onlytest": r"onlytest without a table to learn from",
    "empty": r"empty without any file; wanted tables, pictures",
    "tests": r"tests with test in it, and no folder to learn from; wanted one called train",
    "silent": r"2 of 2 files that are no usable recordings in .*silent.*0 s of sound; wanted 0\.025",
    "words.txt": r"words\.txt, of which nothing tells what it is .*wanted a table \(\.csv.*--kind images",
    "notes": r"notes, of which nothing tells what it is \(readme\.txt\)",
    "emptyclass": r"no file in class folder .*emptyclass/a",
}


@pytest.mark.parametrize("name", CASES)
def test_a_newcomer_is_told_what_to_do(name: str, tmp_path: File) -> None:
    source = made(tmp_path) / name
    with pytest.raises(DataError, match=CASES[name]) as error:
        kind = fresh.kind_of(source)
        Parts.read(source, seed=0, read=reader(FEED.get(kind, kind), None))
    assert "split" not in str(error.value) and "0 of 0" not in str(error.value)


def test_a_broken_line_is_left_out_and_told(tmp_path: File) -> None:
    rows = [json.dumps({"text": f"film {i}", "label": i % 2}) for i in range(200)]
    (tmp_path / "a.jsonl").write_text("\n".join([*rows[:90], '{"text": "brok', *rows[90:]]))
    told = list[str]()
    parts = Parts.read(tmp_path / "a.jsonl", seed=0, teach=False, tell=told.append, read=reader(Tokenise, None))
    assert {text.split(", ")[-1] for text in told} == {"line 91: not a JSON object"} and len(parts.decide) + len(parts.place) + len(parts.report) == 200


def test_labels_that_are_missing_are_told_by_kind() -> None:
    for samples, match in (
        (RowSet(({"a film": "a sea", "0": "1"},), None, ()), r"rows without labels \(columns a film, 0\).*first line of a table"),
        (SeriesSet((torch.zeros(1, 4),), None, ()), "series without labels; .*y in an .npz"),
        (TextSet(("a film",), None, ()), "texts without labels; .*--columns label=NAME"),
        (ImageSet((File("a.png"),), None, ()), "images without labels; .*a folder of their own"),
    ):
        kind = next(kind for kind, (held, _) in KINDS.items() if held is type(samples))
        with pytest.raises(DataError, match=match):
            fresh.fitted(FEED.get(kind, kind), samples, None, task="classification", length=None, vocabulary=9)


@pytest.mark.parametrize(("teach", "certify", "need"), [(False, False, 80), (True, False, 160), (False, True, 160), (True, True, 320)])
def test_too_few_are_refused_with_what_is_needed(teach: bool, certify: bool, need: int) -> None:
    def parts(count: int) -> Parts:
        every = TextSet(tuple(f"film {i}" for i in range(count)), None, ())

        def read(source: object, *, split: str, **_: object) -> TextSet:
            return every if split == "train" else every.rows([0])

        return Parts.read("", seed=0, teach=teach, certify=certify, read=cast(object, read))  # pyright: ignore[reportArgumentType]

    parts(need + 8).suffice("texts")  # held out by shares that are rounded
    with pytest.raises(DataError, match=rf"texts to learn decisions from.*1 for the test; wanted at least 40 .*: {need} beside those for the test"):
        parts(need - 8).suffice("texts")


def test_what_may_not_be_read_is_named(tmp_path: File) -> None:
    with pytest.raises(DataError, match=r"locked: Permission denied; wanted what may be read\. Change its permissions"), allowed():
        raise PermissionError(13, "Permission denied", "locked")


def test_rows_of_one_column_are_refused_before_anything_is_trained() -> None:
    samples = RowSet(({"body": "a"}, {"body": "a"}), torch.tensor([0, 1]), ("0", "1"))
    with pytest.raises(DataError, match=r"rows of one column, 'body'; wanted two or more.*--columns text=body"):
        fresh.fitted(Tabulate, samples, None, task="classification", length=None, vocabulary=9)


def test_one_of_them_is_said_as_one() -> None:
    assert [counted(1, "texts"), counted(2, "texts"), counted(1, "series"), counted(0, "rows")] == ["1 text", "2 texts", "1 series", "0 rows"]


def test_bars_of_transformers_are_quiet_and_then_as_they_were() -> None:
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    from apportion.intake.hf_folder import quiet

    for bars, downloads in ((True, True), (False, False), (True, False)):
        (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
        (enable_progress_bars if downloads else disable_progress_bars)()
        with pytest.raises(ValueError), quiet():
            assert not logging.is_progress_bar_enabled()
            raise ValueError
        assert (logging.is_progress_bar_enabled(), are_progress_bars_disabled()) == (bars, not downloads)
    logging.enable_progress_bar()
