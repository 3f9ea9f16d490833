"""People with data and no model: what the data are is seen, a dense network is trained on them, adapted, written, and answers."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path as File
from typing import Any

import pytest
import torch
from sklearn.datasets import load_wine

from apportion import verbs
from apportion.deliver.adapted import load
from apportion.deliver.beginning import begin_with
from apportion.errors import DataError, PlanError
from apportion.intake import KINDS, ImageSet, RowSet, Tabulate, TextSet, Tokenise, fresh, read_rows
from apportion.intake.vocabulary import entries, learned
from apportion.network import Architecture
from apportion.train import Recipe
from apportion.vocab import Choice, Plan
from tests.test_cli import shell

pytest.importorskip("tokenizers")
SMALL = {"image_size": 0, "patch": 0, "dim": 16, "depth": 3, "heads": 2, "hidden": 32, "classes": 1, "class_token": False, "pool": "mean"}
WORDS = Architecture(**SMALL, words=1, length=24, positions=24)  # pyright: ignore
PLAN = Plan(choices=(Choice("reducer", "tome"), Choice("depth", "skip")), rungs=3, tolerance=90.0, never_slower=False, glance=1, epochs=0.5, batch=32)
RECIPE = Recipe(epochs=8, batch=32, learning_rate=5e-3, ema=0.9)
FILLING = "the film was a long story about people who play music in towns by sea".split()


def reviews(count: int = 600) -> list[tuple[str, str]]:
    """Texts, and whether a word of praise or of blame is in them."""
    rng = random.Random(0)
    made = []
    for number in range(count):
        text = [rng.choice(FILLING) for _ in range(rng.choice((3, 5, 14)))]
        text.insert(rng.randrange(len(text)), rng.choice((("dreadful", "dull"), ("splendid", "lovely"))[number % 2]))
        made.append((" ".join(text), ("bad", "good")[number % 2]))
    return made


def table(file: File, rows: list[tuple[Any, ...]], head: tuple[str, ...] = ("text", "label")) -> File:
    with file.open("w", newline="", encoding="utf-8") as lines:
        csv.writer(lines).writerows([head, *rows])
    return file


def accuracy(network: Any, parts: Any, feed: Any) -> float:
    inputs, labels = next(parts.report.batches(1000, feed))
    return float((network.eval()(inputs, network.space.full).argmax(-1) == labels).double().mean())


def same_answers(weighed: Any, folder: File, some: Any) -> None:
    """What was adapted and what is read back from its folder say the same."""
    again = load(folder, backend="eager", buckets=(4,))
    ours, theirs = weighed.adapted(some), again(some)
    assert again.bundle.preprocess == weighed.adapted.bundle.preprocess and torch.equal(ours.path, theirs.path)
    torch.testing.assert_close(ours.logits, theirs.logits)


def test_pieces_are_those_of_the_texts_and_the_same_each_time() -> None:
    texts = [text for text, _ in reviews(60)]
    feed = learned(texts, length=24, size=60)
    vocabulary = json.loads(feed.tokenizer)["model"]["vocab"]
    assert entries(feed) == len(vocabulary) == 60 and [vocabulary[name] for name in ("[PAD]", "[UNK]", "[CLS]", "[SEP]")] == [0, 1, 2, 3]
    letters = {letter for text in texts for letter in text if letter != " "}
    assert letters < set(vocabulary) and {name.removeprefix("##")[0] for name in vocabulary} == letters | {"["}
    first, second = feed(["The FILM, splendid"]), feed(["the film splendid"])
    assert first[0, 0] == 2 and first[0, -1] == 3 and (first == 1).sum() == 1  # the comma, which no text has
    assert first[first != 1].tolist() == second.flatten().tolist()
    for order in range(3):  # the package's own order is that of a hash, another one each time
        assert learned(random.Random(order).sample(texts, len(texts)), length=24, size=60).tokenizer == feed.tokenizer


def test_pairs_have_types_and_what_makes_no_vocabulary_is_refused() -> None:
    feed = learned([("a film", "a sea"), ("a sea", "a film")], length=10)
    ids, kinds = feed([("a film", "sea")])[0]
    assert feed.pairs and kinds.tolist() == [0] * (len(ids) - 3 - int(kinds.sum()) + 3) + [1] * int(kinds.sum()) and kinds[-1] == 1 and kinds[0] == 0
    with pytest.raises(PlanError, match="vocabulary of 8 "):
        learned(["a film"], length=10, size=8)
    with pytest.raises(PlanError, match="texts of 4 tokens"):
        learned(["a film"], length=4)
    with pytest.raises(DataError, match="without a letter"):
        learned([" "], length=10)


def test_what_data_are_is_seen(tmp_path: File) -> None:
    texts = table(tmp_path / "reviews.csv", [("good", 1)])
    assert fresh.kind_of(texts) is Tokenise and KINDS[fresh.kind_of("digits")][0] is ImageSet
    (tmp_path / "rows.jsonl").write_text('\n{"sentence": "good"}\n')
    assert fresh.kind_of(tmp_path / "rows.jsonl", {"text": "sentence"}) is Tokenise
    for folder, ending in (("heard", "wav"), ("seen", "png")):
        (tmp_path / folder / "one").mkdir(parents=True)
        (tmp_path / folder / "one" / f"a.{ending}").touch()
        table(tmp_path / folder / "notes.csv", [("good", 1)])  # beside class folders a table is no data
    assert fresh.kind_of(tmp_path / "heard") is fresh.kind_called("recordings") and fresh.kind_of(tmp_path / "seen") is fresh.kind_called("images")
    wines = table(tmp_path / "wines.csv", [(1.5, "red")], ("acid", "colour"))
    assert fresh.kind_of(wines, {"label": "colour"}) is Tabulate is fresh.kind_called("rows")
    with pytest.raises(DataError, match="without a column 'review'"):
        fresh.kind_of(wines, {"text": "review"})
    with pytest.raises(DataError, match="no file"):
        fresh.kind_of(tmp_path / "nothing.csv")
    with pytest.raises(PlanError, match="'pictures'"):
        fresh.kind_called("pictures")


@pytest.mark.slow
def test_texts_the_whole_way(tmp_path: File) -> None:
    data, out, told = table(tmp_path / "reviews.csv", reviews(1200)), tmp_path / "out", list[str]()
    network, feed, parts = verbs.scratch(data, recipe=RECIPE, architecture=WORDS, vocabulary=200, certify=True, tell=told.append)
    assert isinstance(parts.teach, TextSet) and isinstance(feed, Tokenise) and told == ["training 3 blocks of width 16 on 768 texts"]
    assert feed == learned(parts.teach.texts, length=24, size=200) and network.architecture.words == entries(feed)
    assert parts.certify is not None and accuracy(network, parts, feed) > 0.9
    weighed = verbs.adapt(network, parts, plan=PLAN, out=out, preprocess=feed, backend="eager", buckets=(4,), repeats=2)
    assert 0 < weighed.figures["gmacs_adaptive"] < weighed.figures["gmacs_dense"] and (out / "tokenizer.json").read_text() == feed.tokenizer
    same_answers(weighed, out, [text for text, _ in reviews(9)])


@pytest.mark.slow
@pytest.mark.parametrize("task", ["multilabel", "regression", "token_classification"])
def test_every_task_of_texts(task: Any, tmp_path: File) -> None:
    def told(text: str) -> Any:
        words = text.split()
        if task == "multilabel":
            return [name for name in ("film", "music", "sea") if name in words]
        return float(len(words)) if task == "regression" else ["film" if word == "film" else "other" for word in words]

    rows = [{"text": text, "label": told(text)} for text, _ in reviews(600)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    network, feed, parts = verbs.scratch(tmp_path / "data.jsonl", recipe=RECIPE, architecture=WORDS, vocabulary=200, task=task)
    weighed = verbs.adapt(network, parts, plan=PLAN, task=task, preprocess=feed, backend="eager", buckets=(4,), repeats=2, out=tmp_path / "out")
    assert network.architecture.classes == {"multilabel": 3, "regression": 1, "token_classification": 2}[task] and weighed.figures["accuracy_dense"] > 0.6
    same_answers(weighed, tmp_path / "out", [row["text"] for row in rows[:9]])


@pytest.mark.slow
def test_one_line(tmp_path: File, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fresh.SHAPES, Tokenise, WORDS)  # the default one takes minutes here
    data, out = table(tmp_path / "reviews.csv", reviews(600)), tmp_path / "out"
    (tmp_path / "plan.toml").write_text('tolerance = 90.0\nnever_slower = false\nrungs = 2\nbatch = 16\n[[choices]]\nslot = "depth"\nname = "skip"\n')
    found = shell("adapt", "scratch", data, "--out", out, "--plan", tmp_path / "plan.toml", "--backend", "eager", "--vocabulary", "100", "--json")
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["accuracy_dense"] > 0.5
    answer = shell("run", out, "a splendid film", "--json")
    assert json.loads(answer.stdout)["answers"][0]["label"] in ("bad", "good")


def test_what_cannot_be_learned_is_refused(tmp_path: File) -> None:
    with pytest.raises(DataError, match="texts without labels"):
        verbs.scratch(table(tmp_path / "bare.csv", [(text,) for text, _ in reviews(40)], ("text",)), recipe=RECIPE)
    with pytest.raises(DataError, match="texts without labels"):
        verbs.scratch(table(tmp_path / "reviews.csv", reviews(40)), recipe=RECIPE, task="embedding")
    found = shell("adapt", "timm:vit_tiny_patch16_224", tmp_path / "reviews.csv", "--kind", "texts")
    assert found.exit_code == 3
    assert shell("adapt", "scratch").exit_code == shell("adapt", "scratch", "digits", "--data", "digits").exit_code == 2  # none, and two


CELLS = [{"acid": "1", "soil": "clay"}, {"acid": "3.0", "soil": " sand"}, {"acid": "NA", "soil": "clay"}, {"acid": "", "soil": "sand"}]


def test_one_class_is_refused_before_anything_is_trained(tmp_path: File, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verbs, "fit", None)
    every = table(tmp_path / "one.csv", [(number, -number, "yes") for number in range(300)], ("size", "age", "label"))
    with pytest.raises(DataError, match=r"rows of one class.*wanted two or more"):
        verbs.scratch(every, recipe=RECIPE)


def test_columns_are_standardised_and_gaps_are_values() -> None:
    feed = Tabulate.learned([*CELLS, {"acid": 2, "soil": "marl"}, {"acid": 2.0, "soil": None}])
    assert feed == Tabulate(("acid",), (2.0,), (0.5**0.5,), ("soil",), (("clay", "sand"),)) and feed.entries == (4,)
    found = feed([{"acid": 2 + 0.5**0.5, "soil": "sand", "more": 1}, {"acid": None, "soil": ""}, {"acid": "2", "soil": "lava"}])
    torch.testing.assert_close(found, torch.tensor([[1.0, 3.0], [float("nan"), 0.0], [0.0, 1.0]]), equal_nan=True)
    assert Tabulate.learned([{"acid": 7}, {"acid": 7}]).std == (1.0,)  # all the same: nothing to divide by


def test_what_is_wrong_with_a_table_is_named(tmp_path: File) -> None:
    feed = Tabulate.learned(CELLS)
    with pytest.raises(DataError, match="row 1: 'sour' in column 'acid'"):
        feed([CELLS[0], {"acid": "sour", "soil": "clay"}])
    with pytest.raises(DataError, match="wines, line 7: no 'soil'"):
        feed([{"acid": 1}], where=["wines, line 7"])
    with pytest.raises(DataError, match=r"'name' with 40 values in 40 rows.*--columns text=name"):
        Tabulate.learned([{"name": f"wine {number}"} for number in range(40)])
    with pytest.raises(DataError, match="'acid' with nothing"):
        Tabulate.learned([{"acid": ""}, {"acid": None}])
    with pytest.raises(PlanError, match="columns acid"):
        Tabulate(("acid",), (0.0,), (0.0,), (), ())
    with pytest.raises(PlanError, match="length of 9 for rows"):
        verbs.scratch(table(tmp_path / "a.csv", [(1, 2)], ("acid", "label")), recipe=RECIPE, length=9)
    with pytest.raises(PlanError, match="token_classification of rows"):
        verbs.scratch(table(tmp_path / "a.csv", [(1, 2)], ("acid", "label")), recipe=RECIPE, task="token_classification")
    torn = table(tmp_path / "torn.csv", [(1, "red"), (2,), (3, "white"), (4, ""), (5, "red"), (6, "white")], ("acid", "label"))
    told: list[tuple[str, str]] = []
    found = read_rows(torn, on_skip=lambda where, why: told.append((where, why)))
    assert told == [(f"{torn}, line 3", "other columns than in the first row"), (f"{torn}, line 5", "no label")]
    assert found.classes == ("red", "white") and found.labels is not None and found.labels.tolist() == [0, 1, 0, 1] and found.cells[1] == {"acid": "3"}
    with pytest.raises(DataError, match=r"label 1 at .*torn.csv, line 4"):
        found.check(1)
    with pytest.raises(DataError, match=r"no table .*parquet"):
        read_rows(tmp_path / "a.parquet")
    folder = tmp_path / "both"
    folder.mkdir()
    for split, rows in (("train", [(1, "red"), (2, "white")]), ("val", [(3, "white")])):
        table(folder / f"{split}.csv", rows, ("acid", "label"))
    assert [len(read_rows(folder, split=split)) for split in ("train", "test", "all")] == [2, 1, 3]  # pyright: ignore
    assert read_rows(folder, split="test").labels == torch.tensor([1])  # numbered as in both


def wines(file: File) -> File:
    """scikit-learn's wines three times over with a little noise, one column told in words, and gaps."""
    data: Any = load_wine()
    rng, rows = random.Random(0), []
    for values, label in zip(data.data.tolist() * 4, data.target.tolist() * 4, strict=True):
        cells: list[Any] = [round(value * rng.uniform(0.97, 1.03), 4) for value in values]
        cells[0] = "strong" if cells[0] > 13 else "light"
        cells[rng.randrange(13)] = ""
        rows.append((*cells, ("barolo", "grignolino", "barbera")[label]))
    rng.shuffle(rows)
    return table(file, rows, (*data.feature_names, "cultivar"))


@pytest.mark.slow
def test_tables_the_whole_way(tmp_path: File) -> None:
    shape = Architecture(0, 0, dim=16, depth=3, heads=2, hidden=32, classes=1, numbers=1)
    data, out = wines(tmp_path / "wines.csv"), tmp_path / "out"
    network, feed, parts = verbs.scratch(data, recipe=RECIPE, architecture=shape, columns={"label": "cultivar"})
    assert isinstance(parts.teach, RowSet) and feed == Tabulate.learned(parts.teach.cells) and network.architecture.input_shape == (13,)
    assert isinstance(feed, Tabulate) and feed.categories == ("alcohol",) and feed.values == (("light", "strong"),)
    assert accuracy(network, parts, feed) > 0.85 and parts.report.classes == ("barbera", "barolo", "grignolino")
    weighed = verbs.adapt(network, parts, plan=PLAN, out=out, preprocess=feed, backend="eager", buckets=(4,), repeats=2)
    assert 0 < weighed.figures["gmacs_adaptive"] < weighed.figures["gmacs_dense"] and "model(rows)" in (out / "README.md").read_text()
    assert isinstance(parts.report, RowSet) and "[tabulate]" in (out / "plan.toml").read_text()
    same_answers(weighed, out, list(parts.report.cells[:9]))
    again = verbs.bench(out, data, columns={"label": "cultivar"}, backend="eager", buckets=(4,), repeats=2)
    assert again.figures["samples"] == weighed.figures["samples"] == len(parts.report)
    assert abs(again.figures["accuracy_adaptive"] - weighed.figures["accuracy_adaptive"]) < 0.02
    rows, skipped = verbs.run(out, [data])
    assert len(rows) == 712 and not skipped and {row["label"] for row in rows} == {"barbera", "barolo", "grignolino"}
    (tmp_path / "odd.csv").write_text(data.read_text().split("\n")[0] + "\n" + ",".join(["strong", "many", *["1"] * 11, "barolo"]) + "\n")
    (row,) = verbs.run(out, [data, tmp_path / "odd.csv"])[1]
    assert row[0].endswith("odd.csv, line 2") and "'many' in column 'malic_acid'" in row[1]


def test_pictures_whose_patches_may_be_joined_begin_with_a_product_for_each() -> None:
    begun = Architecture(image_size=16, patch=4, dim=8, depth=1, heads=1, hidden=8, classes=2, stem="conv")
    assert begin_with(begun, "patch").stem == "patch" and begin_with(begun, None) is begun
    with pytest.raises(PlanError, match="no picture"):
        begin_with(Architecture(0, 0, 16, 1, 2, 32, 2, numbers=2), "patch")
