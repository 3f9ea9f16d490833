"""Once the whole way for every task: several labels, numbers, embeddings, words and pixels, from a model and data to a bundle that answers."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path as File
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from apportion import verbs
from apportion.deliver import deciding
from apportion.deliver.adapted import load
from apportion.deliver.answers import spelled
from apportion.errors import DataError, PlanError
from apportion.intake import Parts, Preprocess, _torchvision, reader
from apportion.intake.masks import read_masked
from apportion.network import Architecture, Network
from apportion.train import Images, Recipe, dense, fit
from apportion.train.augment import augment
from apportion.vocab import Choice, Plan

_torchvision.ready()
transformers = pytest.importorskip("transformers")
from tests.rooms.test_intake_text_models import words  # noqa: E402

KNOWN = "the a good bad film is was not".split()
NAMES = {0: "praise", 1: "blame", 2: "film"}
PLAN = Plan(
    choices=(Choice("reducer", "tome"), Choice("depth", "skip")), rungs=3, tolerance=90.0, never_slower=False, glance=1, epochs=0.5, batch=32, confidence=0.9
)
SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 60, "max_position_embeddings": 40}


def told(text: list[str], task: str) -> Any:
    """A label that a text of this task has."""
    if task == "multilabel":
        return [name for name, word in (("praise", "good"), ("blame", "bad"), ("film", "film")) if word in text]
    if task == "regression":
        return text.count("good") - text.count("bad") + 0.5
    return ["film" if word == "film" else "praise" if word == "good" else "blame" for word in text]


def model(folder: File, task: str) -> None:
    torch.manual_seed(0)
    kind = {"embedding": "BertModel", "token_classification": "BertForTokenClassification"}.get(task, "BertForSequenceClassification")
    extra: dict[str, Any] = {"num_labels": 1} if task == "regression" else {"id2label": NAMES, "label2id": {name: i for i, name in NAMES.items()}}
    if task == "multilabel":
        extra["problem_type"] = "multi_label_classification"
    config = transformers.BertConfig(**SIZES, **extra, initializer_range=0.5, pad_token_id=0)
    getattr(transformers, kind)(config).save_pretrained(folder)
    words(folder)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["multilabel", "regression", "embedding", "token_classification"])
def test_the_whole_way_of_texts(task: str, tmp_path: File) -> None:
    model(tmp_path / "model", task)
    rng = random.Random(0)
    texts = [[rng.choice(KNOWN) for _ in range(rng.choice((3, 6, 34)))] for _ in range(1400)]
    rows = [{"text": " ".join(text), **({} if task == "embedding" else {"label": told(text, task)})} for text in texts]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options: dict[str, Any] = {"pooling": "mean"} if task == "embedding" else {}
    if task == "embedding":  # labels that the data bring all the same are not what is learned, and no name of an output
        for row in rows:
            row["label"] = "good" if "good" in str(row["text"]) else "bad"
        (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
        assert deciding.named(("bad", "good"), 0) == ()
    weighed = verbs.adapt(
        str(tmp_path / "model"), tmp_path / "data.jsonl", plan=PLAN, out=tmp_path / "out", backend="eager", buckets=(4,), repeats=2, **options
    )
    figures, page = weighed.figures, (tmp_path / "out" / "report.html").read_text()
    assert figures["metric"] in page and 0 < figures["gmacs_adaptive"] < figures["gmacs_dense"]
    assert figures["certificate"]["confidence"] == 0.9 and figures["served"]["same_path"] > 0.98
    if task != "embedding":
        assert abs(figures["served"]["accuracy"] - figures["accuracy_adaptive"]) < 0.02
    again = load(tmp_path / "out", backend="eager", buckets=(4,))
    some = [str(row["text"]) for row in rows[:9]]
    ours, theirs = weighed.adapted(some), again(some)
    assert torch.equal(ours.path, theirs.path) and again.bundle.network.architecture.task == task
    torch.testing.assert_close(ours.logits, theirs.logits)
    answers = [spelled(again.bundle, logits, text) for logits, text in zip(theirs.logits, some, strict=True)]
    if task == "token_classification":
        assert [len(answer["label"]) for answer in answers] == [len(text.split()) for text in some]
        # Alone as in company: the answers of a text's own tokens do not depend on longer texts beside it.
        alone = again(some[:1])
        torch.testing.assert_close(alone.logits[0], theirs.logits[0, : alone.logits.shape[1]])
    elif task == "regression":
        assert all(isinstance(answer["value"], float) for answer in answers) and again.bundle.network.architecture.span > 0
    elif task == "embedding":
        assert len(answers[0]["embedding"]) == SIZES["hidden_size"]
    else:
        assert all(set(answer["label"]) <= set(NAMES.values()) for answer in answers)


def scenes(folder: File, count: int) -> None:
    """Bright ground below a dark sky, whose border moves, and on some a square that is another thing; every mask has some void."""
    rng = np.random.default_rng(0)
    for place in ("images", "masks"):
        (folder / place).mkdir(parents=True)
    for number in range(count):
        mask = np.zeros((36, 40), np.uint8)
        mask[int(rng.integers(9, 27)) :] = 1
        if number % 2:
            top, left = rng.integers(4, 20, 2)
            mask[top : top + 12, left : left + 12] = 2
        colours = np.array([[30, 30, 90], [150, 140, 100], [230, 60, 60]])
        picture = (colours[mask] + rng.normal(0, 12, (*mask.shape, 3))).clip(0, 255).astype(np.uint8)
        mask[:2] = 255
        Image.fromarray(picture).save(folder / "images" / f"{number:04d}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{number:04d}.png")


@pytest.mark.slow
def test_the_whole_way_of_pixels(tmp_path: File) -> None:
    scenes(tmp_path / "data", 700)
    (tmp_path / "data" / "masks" / "0003.png").unlink()
    feed = Preprocess(32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    shape = Architecture(32, 8, 24, 3, 2, 48, 3, pool="every_token", task="segmentation", class_token=False)
    parts = Parts.read(tmp_path / "data", seed=0, read=reader(feed, None, task="segmentation"))
    assert parts.teach is not None and parts.teach.labels is not None and parts.teach.classes == ("0", "1", "2") and len(parts.report) == 139
    torch.manual_seed(0)
    network = Network(shape)
    inputs = torch.cat([inputs for inputs, _ in parts.teach.batches(64, feed)])
    recipe = Recipe(epochs=4, batch=16, learning_rate=3e-3, crop_padding=2, ema=0.9)
    fit(network, Images(inputs, parts.teach.labels), dense(task="segmentation"), recipe=recipe, progress=False)
    plan = replace(PLAN, tolerance=4.0, confidence=0.0, choices=(Choice("reducer", "tome"), Choice("depth", "skip"), Choice("ffn", "matformer")))
    weighed = verbs.adapt(network, parts, plan=plan, preprocess=feed, out=tmp_path / "out", backend="eager", buckets=(4,), repeats=2)
    figures = weighed.figures
    assert figures["metric"] == "share of pixels right" and figures["accuracy_dense"] > 0.8 and figures["drop_points"]["points"] < 4
    assert abs(figures["served"]["accuracy"] - figures["accuracy_adaptive"]) < 0.01
    again = load(tmp_path / "out", backend="eager", buckets=(4,))
    rows, skipped = verbs.run(tmp_path / "out", [tmp_path / "data" / "images" / "0001.png"])
    assert not skipped and abs(sum(rows[0]["label"].values()) - 1) < 1e-3 and again.bundle.classes == ("0", "1", "2")


def test_a_mask_is_cut_like_its_picture_and_what_has_none_is_named(tmp_path: File) -> None:
    scenes(tmp_path / "data", 10)
    (tmp_path / "data" / "masks" / "0004.png").write_bytes(b"nothing")
    feed, told = Preprocess(36, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)), list[str]()
    found = read_masked(tmp_path / "data", feed=feed, on_skip=lambda file, why: told.append(f"{file}: {why}"))
    assert len(found) == 9 and "0004" in told[0] and "does not decode" in told[0]
    inputs, labels = next(found.batches(9, feed))
    assert labels is not None and labels.shape == (9, 36, 36) and labels.dtype == torch.int64 and bool((labels[:, :2] == -100).all())
    sky, ground = inputs[0][:, labels[0] == 0].mean(1), inputs[0][:, labels[0] == 1].mean(1)
    assert float(ground[0]) > 0.5 > 0.2 > float(sky[0])  # a picture and its mask lie on each other
    (tmp_path / "data" / "classes.json").write_text('{"sky": 0, "thing": 2}')
    named = read_masked(tmp_path / "data", feed=feed)
    assert named.classes == ("sky", "1", "thing") and named.labels is not None and set(named.labels.unique().tolist()) == {-100, 0, 2}
    with pytest.raises(DataError, match="no pictures"):
        read_masked(tmp_path / "data" / "images", feed=feed)
    with pytest.raises(DataError, match="label 2"):
        named.check(2)


def test_masks_move_with_their_pixels() -> None:
    image = torch.arange(2 * 36.0).view(2, 1, 6, 6) + 1
    labels = image[:, 0].long()
    recipe = Recipe(epochs=1, batch=2, crop_padding=2, flip=True)
    moved, masks = augment(image, labels, recipe, 3)
    assert masks is not None and torch.equal(torch.where(masks == -100, 0, masks), moved[:, 0].long()) and not torch.equal(masks, labels)
    with pytest.raises(PlanError, match="mixup"):
        augment(image, labels, replace(recipe, mixup=0.2, classes=3), 3)


def test_checkpoints_want_answers_that_say_how_sure_they_are() -> None:
    for task in ("regression", "embedding"):
        with pytest.raises(PlanError, match="how sure"):
            verbs.check_task(task, Plan(control="checkpoints"))
    verbs.check_task("token_classification", Plan(control="checkpoints"))
