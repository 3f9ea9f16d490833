"""What an answer says in words and numbers, task by task: what `run` writes down for each input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from apportion.deliver.bundle import Bundle
from apportion.intake import Tokenise
from apportion.methods.task import UNKNOWN, said

DIGITS = 5


def spelled(bundle: Bundle, logits: Tensor, sample: Any) -> dict[str, Any]:
    """Answer (outputs,) or (n, outputs) to one sample: "label" and its "probability"; lists of them for several labels; "label" for each word of a text, or the
    share of each class in a picture; "value" for numbers; "embedding"."""
    task, logits = bundle.network.architecture.task, logits.float()
    if task == "regression":
        found = [round(value, DIGITS) for value in logits.tolist()]
        return {"value": found[0] if len(found) == 1 else found}
    if task == "embedding":
        return {"embedding": [round(value, DIGITS) for value in logits.tolist()]}
    if task == "multilabel":
        chance = logits.sigmoid()
        named = said(logits, task).nonzero().flatten().tolist()
        return {"label": [name(bundle, index) for index in named], "probability": [round(float(chance[index]), DIGITS) for index in named]}
    if task == "token_classification":
        feed = bundle.preprocess
        assert isinstance(feed, Tokenise)
        first = {word: place for place, word in enumerate(feed.words(sample)) if word != UNKNOWN}
        every = range(len(sample.split()))  # words behind the length at which texts are cut have no answer
        return {"label": [name(bundle, int(logits[first[word]].argmax())) if word in first else None for word in every]}
    if task == "segmentation":
        share = torch.bincount(logits.argmax(-1), minlength=logits.shape[-1]).double() / len(logits)
        return {"label": {name(bundle, index): round(float(share[index]), DIGITS) for index in share.argsort(descending=True).tolist() if share[index] > 0}}
    best = logits.softmax(-1).max(-1)
    return {"label": name(bundle, int(best.indices)), "probability": float(best.values)}


def name(bundle: Bundle, index: int) -> str:
    """Of a class; its number where nobody named it."""
    return bundle.classes[index] if bundle.classes else str(index)
