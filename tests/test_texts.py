"""Once the whole way for texts: a folder as transformers writes it and a table in, a bundle out that answers strings, from Python and from the shell."""

from __future__ import annotations

import json
import random
from pathlib import Path as File

import pytest
import torch

from apportion import cli, verbs
from apportion.deliver.adapted import load
from apportion.errors import PlanError
from apportion.intake import _torchvision
from apportion.vocab import Choice, Plan
from tests.test_cli import shell

_torchvision.ready()
transformers = pytest.importorskip("transformers")
from tests.rooms.test_intake_text_models import words  # noqa: E402


def test_columns_are_named_in_pairs() -> None:
    assert cli.named(None) is None and cli.named("text=sentence, label=intent") == {"text": "sentence", "label": "intent"}
    with pytest.raises(PlanError, match="columns 'text'"):
        cli.named("text")


@pytest.mark.slow
def test_the_whole_way(tmp_path: File, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 60, "max_position_embeddings": 40}
    config = transformers.BertConfig(**sizes, initializer_range=0.5, pad_token_id=0, id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1})
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    words(tmp_path / "model")
    rng, known = random.Random(0), "the a good bad film is was not".split()
    rows = [{"sentence": " ".join(rng.choice(known) for _ in range(rng.choice((3, 6, 34)))), "label": rng.choice(("bad", "good"))} for _ in range(540)]
    data, out, told = tmp_path / "data.jsonl", tmp_path / "out", list[str]()
    data.write_text("\n".join(map(json.dumps, [*rows, {"sentence": ""}])))
    choices = (Choice("reducer", "tome"), Choice("depth", "skip"))
    plan = Plan(choices=choices, rungs=3, tolerance=100.0, never_slower=False, glance=1, epochs=0.5, batch=32)
    columns = {"text": "sentence"}
    weighed = verbs.adapt(str(tmp_path / "model"), str(data), plan=plan, out=out, columns=columns, backend="eager", buckets=(4,), repeats=2, tell=told.append)
    assert any(text.startswith(f"left out {data}, line 541") for text in told) and told[-1].endswith(str(out))
    assert (out / "tokenizer.json").read_text() == (tmp_path / "model" / "tokenizer.json").read_text()
    page, figures = (out / "report.html").read_text(), weighed.figures
    assert "What it reads" in page and "://" not in page and "model(texts)" in (out / "README.md").read_text()
    assert 0 < figures["gmacs_adaptive"] < figures["gmacs_dense"] < weighed.adapted.ledger.dense[-1]  # most texts are short
    model = load(out, backend="eager", buckets=(4,))
    some = [row["sentence"] for row in rows[:9]]
    first, second = weighed.adapted(some), model(some)
    assert torch.equal(first.path, second.path) and model.bundle.classes == ("bad", "good")
    torch.testing.assert_close(first.logits, second.logits)
    monkeypatch.setattr(verbs, "load", lambda folder, **options: model)
    found = shell("run", out, "a good film", data, "--columns", "text=sentence", "--json")
    answers = json.loads(found.stdout)
    assert found.exit_code == 5 and len(answers["answers"]) == 541 and answers["skipped"] == [{"file": f"{data}, line 541", "why": "an empty text"}]
    assert answers["answers"][0]["text"] == "a good film" and answers["answers"][0]["label"] in ("bad", "good")
