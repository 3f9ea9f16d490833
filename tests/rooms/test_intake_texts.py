"""Texts come in whole, or what is wrong with them is named: file, row, what was wanted."""

from __future__ import annotations

import gzip
import json

import pytest
import torch

from apportion.errors import DataError, PlanError
from apportion.intake.texts import TextSet, Tokenise, read_texts

pytest.importorskip("tokenizers")
ROWS = [{"text": f"text {i}", "label": i % 2} for i in range(10)]


def jsonl(file, rows):
    content = "\n".join(json.dumps(row) if not isinstance(row, str) else row for row in rows)
    file.write_bytes(gzip.compress(content.encode()) if file.name.endswith(".gz") else content.encode())
    return file


@pytest.fixture
def words():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"the a good bad film".split()]
    tokenizer = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["[PAD]"])
    pair = "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1"
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair=pair, special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return tokenizer.to_str()


@pytest.mark.parametrize("name", ["data.csv", "data.tsv", "data.jsonl", "data.jsonl.gz"])
def test_every_format_gives_the_same(tmp_path, name):
    file = tmp_path / name
    if "jsonl" in name:
        jsonl(file, ROWS)
    else:
        comma = "," if name.endswith(".csv") else "\t"
        file.write_text("\n".join([comma.join(("label", "text")), *(f'{row["label"]}{comma}"{row["text"]}"' for row in ROWS)]))
    found = read_texts(file)
    assert found.texts == tuple(row["text"] for row in ROWS) and found.labels.tolist() == [0, 1] * 5 and found.classes == ("0", "1")
    test, train = read_texts(file, split="test"), read_texts(file, split="train")
    assert len(test) == 2 and set(test.texts) | set(train.texts) == set(found.texts) and sorted(test.labels.tolist()) == [0, 1]
    assert read_texts(file, limit=4).labels.tolist() == [0, 1, 0, 1] or sorted(read_texts(file, limit=4).labels.tolist()) == [0, 0, 1, 1]


def test_a_folder_with_a_split_of_its_own(tmp_path):
    jsonl(tmp_path / "train.jsonl", [{"text": "x", "label": "b"}, {"text": "y", "label": "a"}])
    jsonl(tmp_path / "dev.jsonl.gz", [{"text": "z", "label": "c"}])
    assert read_texts(tmp_path, split="test").labels.tolist() == [2] and read_texts(tmp_path, split="train").classes == ("a", "b", "c")
    assert len(read_texts(tmp_path)) == 3
    assert read_texts(tmp_path, classes=("c", "b", "a")).labels.tolist() == [1, 2, 0]
    with pytest.raises(DataError, match="'c'"):
        read_texts(tmp_path, classes=("a", "b"))


def test_bad_rows_are_named(tmp_path):
    told = []
    file = jsonl(tmp_path / "data.jsonl", [*ROWS, '{"text": ', {"label": 1}, {"text": " ", "label": 0}, {"text": "no label"}, {"text": 3, "label": 1}])
    found = read_texts(file, on_skip=lambda where, why: told.append((where, why)))
    assert len(found) == 10 and tuple(told) == found.skipped
    assert [(where.rpartition("line ")[2], why) for where, why in told] == [
        ("11", "not a JSON object"),
        ("12", "no text"),
        ("13", "an empty text"),
        ("14", "no label"),
        ("15", "int where a text or a pair of texts was wanted"),
    ]
    with pytest.raises(DataError, match=r"3 of 4 rows.*line 2: an empty text"):
        read_texts(jsonl(tmp_path / "worse.jsonl", [ROWS[0], *[{"text": "", "label": 1}] * 3]))


def test_what_cannot_be_used_is_refused(tmp_path):
    (tmp_path / "data.csv").write_text("a,b\n1,2\n")
    for call, what in (
        (lambda: read_texts(tmp_path / "data.csv"), "columns a, b.*column 'text'"),
        (lambda: read_texts(tmp_path / "data.parquet"), "data.parquet"),
        (lambda: read_texts(tmp_path), "data.csv with columns a, b"),
        (lambda: read_texts(["x"], labels=[1, 2]), "2 labels for 1"),
        (lambda: read_texts([]), "without any rows"),
        (lambda: read_texts(["x", "y"], labels=["a", 1]), "label 1 beside names"),
        (lambda: read_texts(["x", "y"], labels=[-1, 1]), "label -1"),
        (lambda: read_texts(["x", "y"], labels=["0", 10**15]), "label 1000000000000000; wanted.*below 1000000"),
        (lambda: read_texts(["x"], limit=0), "limit 0"),
        (lambda: TextSet(("x",), torch.tensor([4]), ()).check(3), "label 4 at row 0"),
        (lambda: TextSet(("x",), None, ()).split(0.5), "1 text, of which a part of 0.5"),
    ):
        with pytest.raises(DataError, match=what):
            call()


def test_lists_pairs_and_splits():
    found = read_texts([("a", "b"), ("c", "d"), ("e", "f"), ("g", "h")], labels=["no", "yes", "no", "yes"])
    assert found.classes == ("no", "yes") and found.labels.tolist() == [0, 1, 0, 1]
    rest, held = found.split(0.5, seed=1)
    assert sorted(rest.labels.tolist()) == sorted(held.labels.tolist()) == [0, 1] and not set(rest.texts) & set(held.texts)
    assert read_texts(["x", "y"]).labels is None


def test_tokens(words):
    tokenise = Tokenise(words, length=6, padding=0)
    assert tokenise(["good"]).tolist() == [[2, 6, 3]] and tokenise.sizes(["good", "the film"]).tolist() == [3, 4]
    assert tokenise.spans("a film") == [(0, 0), (0, 1), (2, 6), (0, 0)]
    assert tokenise(["the good film", "a"]).tolist() == [[2, 4, 6, 8, 3], [2, 5, 3, 0, 0]]
    assert tokenise(["the good film " * 9]).tolist() == [[2, 4, 6, 8, 4, 3]]
    paired = Tokenise(words, length=6, padding=0, pairs=True)
    assert paired != tokenise and paired(["good"]).tolist() == [[[2, 6, 3], [0, 0, 0]]]
    assert paired([("a", "film"), ("a", "good film")]).tolist() == [
        [[2, 5, 3, 8, 3, 0], [0, 0, 0, 1, 1, 0]],
        [[2, 5, 3, 6, 8, 3], [0, 0, 0, 1, 1, 1]],
    ]


def test_what_gives_no_tokens_is_refused(words):
    tokenise = Tokenise(words, length=6, padding=0)
    for texts, what in ((["a", " "], "row 1: an empty"), (["a [PAD] b"], "row 0: the padding token"), ([("a", "b")], "row 0: a pair"), ([], "no text")):
        with pytest.raises(DataError, match=what):
            tokenise(texts)
    with pytest.raises(DataError, match="one string"):
        tokenise("a good film")
    with pytest.raises(DataError, match=r"data\.csv, line 7: an empty"):
        TextSet(("a", ""), None, (), where=("data.csv, line 6", "data.csv, line 7")).sizes(tokenise)
    with pytest.raises(PlanError, match="cannot be read"):
        Tokenise("{}", length=6, padding=0)
    with pytest.raises(PlanError, match="id 0"):
        padded = json.loads(words) | {"padding": {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None}}
        padded["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"}
        Tokenise(json.dumps(padded), length=6, padding=1)


def test_batches(words):
    tokenise = Tokenise(words, length=6, padding=0)
    found = read_texts(["good", "the film", "bad", "a good film", "the"], labels=[1, 0, 0, 1, 0])
    batches = list(found.batches(2, tokenise))
    assert [tuple(x.shape) for x, _ in batches] == [(2, 4), (2, 5), (1, 3)] and torch.cat([y for _, y in batches]).tolist() == [1, 0, 0, 1, 0]
    shuffled = torch.cat([y for _, y in found.batches(2, tokenise, seed=1)])
    assert sorted(shuffled.tolist()) == [0, 0, 0, 1, 1]
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(found.batches(2, tokenise, seed=1), found.batches(2, tokenise, seed=1), strict=True))
