"""Once the whole way for every task: several labels, numbers, embeddings, words and pixels, from a model and data to a bundle that answers."""

from __future__ import annotations

import json
import random
from pathlib import Path as File
from typing import Any

import pytest
import torch

from apportion import verbs
from apportion.deliver.adapted import load
from apportion.deliver.answers import spelled
from apportion.errors import PlanError
from apportion.intake import _torchvision
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


def test_checkpoints_want_answers_that_say_how_sure_they_are() -> None:
    for task in ("regression", "embedding"):
        with pytest.raises(PlanError, match="how sure"):
            verbs.check_task(task, Plan(control="checkpoints"))
    verbs.check_task("token_classification", Plan(control="checkpoints"))
