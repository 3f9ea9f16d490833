"""Data for every purpose, pictures and texts by one way; and what a user hands over to be answered."""

from __future__ import annotations

import json
from pathlib import Path as File

import numpy as np
import pytest
import torch

from apportion.errors import DataError, PlanError
from apportion.intake import ImageSet, Parts, Preprocess, Source, TextSet, Tokenise, matched, opened, reader
from apportion.network import Architecture, Network
from tests.rooms.test_deliver_texts import tokenise

pytest.importorskip("tokenizers")
SHAPE = {"image_size": 0, "patch": 0, "dim": 8, "depth": 1, "heads": 1, "hidden": 8, "words": 10, "length": 48, "padding": 1}
PICTURES = Preprocess(8, (0.5,) * 3, (0.25,) * 3)


def table(file: File, count: int = 60) -> File:
    file.write_text("\n".join(json.dumps({"sentence": f"a good film {i}", "intent": ("bad", "good")[i % 2]}) for i in range(count)))
    return file


def source(feed: Tokenise | Preprocess, classes: int = 2, types: int = 0) -> Source:
    return Source(Network(Architecture(**SHAPE, classes=classes, token_types=types)), feed, None, None, {})  # pyright: ignore


def texts(*some: str | tuple[str, str]) -> TextSet:
    return TextSet(some, None, ())


def test_texts_are_dealt_out_as_pictures_are(tmp_path: File) -> None:
    columns = {"text": "sentence", "label": "intent"}
    parts = Parts.read(table(tmp_path / "data.jsonl"), seed=0, certify=True, read=reader(tokenise(), ("good", "bad"), columns))
    every = [part for part in (parts.teach, parts.decide, parts.place, parts.report, parts.certify) if isinstance(part, TextSet)]
    assert len(every) == 5 and sorted(line for part in every for line in part.where) == sorted(f"{tmp_path / 'data.jsonl'}, line {n}" for n in range(1, 61))
    assert all(text.endswith(("0", "2", "4", "6", "8")) == bool(label) for part in every for text, label in zip(part.texts, part.labels.tolist(), strict=True))
    assert parts.report.classes == ("good", "bad")


def test_what_is_wrong_with_a_row_is_told_by_file_and_line(tmp_path: File) -> None:
    file = table(tmp_path / "data.jsonl", 4)
    file.write_text(file.read_text() + '\n{"sentence": "a", "intent": 7}\n{"sentence": " ", "intent": 1}')
    told: list[str] = []
    with pytest.raises(DataError, match="label 7 beside names"):
        Parts.read(file, seed=0, tell=told.append, read=reader(tokenise(), None, {"text": "sentence", "label": "intent"}))
    with pytest.raises(DataError, match=r"label 5 at data\.csv, line 3"):
        TextSet(("a", "b"), torch.tensor([0, 5]), (), where=("data.csv, line 2", "data.csv, line 3")).check(2)
    with pytest.raises(PlanError, match="'colour'"):
        reader(tokenise(), None, {"colour": "red"})
    with pytest.raises(PlanError, match="images"):
        reader(PICTURES, None, {"text": "sentence"})


def test_a_feed_takes_what_the_data_holds() -> None:
    one, two = texts("a film"), texts(("a", "film"))
    plain, paired = (matched(source(tokenise(), types=2), Parts(None, one, one, last)).feed for last in (one, two))
    assert isinstance(plain, Tokenise) and isinstance(paired, Tokenise) and not plain.pairs and paired.pairs
    with pytest.raises(DataError, match="pairs"):
        matched(source(tokenise()), Parts(None, one, two, one))
    with pytest.raises(PlanError, match="token_classification of images"):
        reader(PICTURES, None, task="token_classification")
    assert Parts(None, one, two, one).unlabelled().place.labels is None
    pictures = ImageSet(np.zeros((1, 8, 8, 3), np.uint8), None, ())
    with pytest.raises(DataError, match="images for a model of texts"):
        matched(source(tokenise()), Parts(None, one, one, pictures))
    with pytest.raises(DataError, match="texts for a model of images"):
        matched(source(PICTURES), Parts(one, pictures, pictures, pictures))


def test_texts_are_opened_from_tables_and_as_they_stand(tmp_path: File) -> None:
    file = table(tmp_path / "data.jsonl", 3)
    file.write_text(file.read_text() + '\nnonsense\n{"sentence": ""}')
    found = list(opened(["a film", str(file), "", "bad " * 200], tokenise(), {"text": "sentence"}))
    assert [(name.removeprefix(f"{file}, "), why) for name, _, why in found] == [
        ("text 1", ""),
        *[(f"line {n}", "") for n in (1, 2, 3)],
        ("line 4", "not a JSON object"),
        ("line 5", "an empty text"),
        ("text 3", "an empty text"),
        ("text 4", ""),
    ]
    assert [text for _, text, why in found if not why][:2] == ["a film", "a good film 0"]
    for gone in ("gone.csv", str(tmp_path / "gone.jsonl.gz")):
        with pytest.raises(DataError, match="gone"):
            list(opened([gone], tokenise()))
