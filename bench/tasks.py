"""Other tasks than one class: sentence embeddings of a pretrained MiniLM-L6, and road scenes in which every pixel has a class, by a small network of our own.

`python -m bench tasks --data FOLDER --model MODEL` wants FOLDER/banking77 (its labels serve the search alone), FOLDER/camvid_240 (train and test, each with
images and masks; value 11 is void) and the folder of all-MiniLM-L6-v2 as sentence-transformers writes it. Embeddings learn from the model's own, no labels.
How good they are for a search is asked of the nearest neighbour: the sentences of the training set are the index, embedded by the full path, those
of the test set are the questions, embedded adaptively. A part of what is trained on is held out to learn and place the controller; tests are read once.
"""

from __future__ import annotations

import copy
import time
from dataclasses import asdict, replace
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor

from apportion.intake import ImageSet, Parts, Preprocess, Source, read_model, reader
from apportion.intake.masks import read_masked
from apportion.methods.task import UNKNOWN, over_pixels
from apportion.network import Architecture, Network, put
from apportion.train import Images, Recipe, dense, fit, sandwich
from apportion.vocab import Choice, Path, Plan, Space
from bench import results
from bench.plans import Way, compare
from bench.text import memory

CHOICES = (Choice("reducer", "tome"), Choice("depth", "skip"))
PLAN = Plan(choices=CHOICES, glance=1, rungs=5, tolerance=1.0)
NEAR = replace(PLAN, tolerance=6.0)  # a mean cosine of 0.94: one epoch of healing takes the full path itself to 0.977
BUCKETS = (1, 32)
SHARED = {"batch": 32, "warmup": 0.1, "ema": 0.99, "weight_decay": 0.01}
SENTENCES = Recipe(epochs=1.0, learning_rate=1e-4, crop_padding=0, seed=100, **SHARED)
FEED = Preprocess(96, (0.41, 0.43, 0.43), (0.3, 0.31, 0.31), squash=True)
SHAPE = Architecture(96, 8, 96, 6, 3, 384, 11, stem="conv", pool="every_token", task="segmentation", class_token=False)
SCENES = Recipe(epochs=40, learning_rate=1e-3, crop_padding=8, flip=True, **{**SHARED, "batch": 16, "weight_decay": 0.05})
HEALING = replace(SCENES, epochs=15, learning_rate=5e-4, seed=100)


def main(data: File, model: File, runs: File, *, repeats: int = 6) -> None:
    begin = time.monotonic()

    def tell(text: str) -> None:
        print(f"{time.monotonic() - begin:7.1f} s  {text}", flush=True)

    found = {"banking77": embeddings(data / "banking77", model, runs / "banking77", repeats, tell), "camvid": scenes(data, runs / "camvid", repeats, tell)}
    recipes = {"banking77": asdict(SENTENCES), "camvid": [asdict(SCENES), asdict(HEALING)]}
    results.write("tasks", "python -m bench tasks --data FOLDER --model MODEL", {"runs": found, "recipes": recipes})


def taught_paths(space: Space) -> list[Path]:
    """Every exit behind the first block, and half of the tokens gone right after it, at full depth and at two thirds."""
    half = space.prefix + (space.tokens - space.prefix + 1) // 2
    merged = [space.path(blocks=range(depth), tokens=(space.tokens, *(half,) * (depth - 1))) for depth in (space.depth, 2 * space.depth // 3)]
    return [*(space.path(blocks=range(depth)) for depth in range(1, space.depth)), *merged]


def embeddings(data: File, model: File, runs: File, repeats: int, tell: Any) -> dict[str, Any]:
    source = read_model(model, length=64)
    labelled = Parts.read(data, seed=0, read=reader(source.tokenise, None))
    parts, network = labelled.unlabelled(), source.network
    assert parts.teach is not None and labelled.teach is not None
    reference = copy.deepcopy(network).eval().requires_grad_(False)
    for choice in CHOICES:
        put(network, choice)
    network.requires_grad_(True)
    network.tokeniser.get_submodule("word").requires_grad_(False)
    objective = sandwich(taught_paths(network.space), extra=1, teacher=reference, feature_weight=0.1, task="embedding")
    fit(network, memory(parts.teach, source.tokenise), objective, recipe=SENTENCES, folder=runs / "healed")
    network.eval().requires_grad_(False)
    found = compare({"glance": Way(NEAR, buckets=BUCKETS)}, network, reference, parts, source, runs, repeats=repeats, tell=tell)
    index = answers(reference, labelled.teach, source.tokenise)
    asked = {"dense": answers(reference, labelled.report, source.tokenise), **served(runs / "glance", labelled.report, source.tokenise)}
    right = {name: nearest(vectors, index, labelled.report.labels, labelled.teach.labels) for name, vectors in asked.items()}
    return {**found, "search": {"index": len(index), "questions": len(labelled.report), "accuracy": right}}


@torch.no_grad()
def answers(network: Network, samples: Any, feed: Any) -> Tensor:
    return torch.cat([network(inputs, network.space.full) for inputs, _ in samples.batches(64, feed)])


def served(folder: File, samples: Any, feed: Any) -> dict[str, Tensor]:
    """What the bundle answers at its operating point, and along its cheapest path."""
    from apportion.deliver.adapted import load

    model = load(folder, backend="eager", buckets=BUCKETS)
    model.warm()
    batches = [inputs for inputs, _ in samples.batches(64, feed)]
    return {
        "adaptive": torch.cat([model(inputs).logits for inputs in batches]),
        "cheapest path": torch.cat([model.engine.forced(x, 0).logits for x in batches]),
    }


def nearest(asked: Tensor, index: Tensor, wanted: Tensor | None, known: Tensor | None) -> float:
    """The share of questions whose nearest sentence has their label."""
    assert wanted is not None and known is not None
    normal = torch.nn.functional.normalize
    return float((known[(normal(asked, dim=-1) @ normal(index, dim=-1).T).argmax(1)] == wanted).double().mean())


def scenes(data: File, runs: File, repeats: int, tell: Any) -> dict[str, Any]:
    every = without_void(read_masked(data / "camvid_240", feed=FEED, split="train"))
    teach, held = every.split(0.3, seed=0)
    decided, place = held.split(0.5, seed=0)
    tested = without_void(read_masked(data / "camvid_240", feed=FEED, split="test"))
    parts = Parts(teach, decided, place, tested)
    torch.manual_seed(0)
    network = Network(SHAPE)
    inputs = torch.cat([inputs for inputs, _ in teach.batches(64, FEED)])
    fit(network, Images(inputs, teach.labels), dense(task="segmentation", label_smoothing=0.0), recipe=SCENES, folder=runs / "dense")
    reference = copy.deepcopy(network).eval().requires_grad_(False)
    for choice in CHOICES:
        put(network, choice)
    network.requires_grad_(True)
    objective = sandwich(taught_paths(network.space), teacher=reference, feature_weight=0.1, label_smoothing=0.0, task="segmentation")
    fit(network, Images(inputs, teach.labels), objective, recipe=HEALING, folder=runs / "healed")
    network.eval().requires_grad_(False)
    source = Source(network, FEED, None, None, {"source": "bench tasks", "trained_on": "camvid_240"})
    ways = {"glance": Way(PLAN, buckets=BUCKETS), "checkpoints": Way(replace(PLAN, control="checkpoints"), buckets=BUCKETS)}
    found = compare(ways, network, reference, parts, source, runs, repeats=repeats, tell=tell)
    return {**found, "mean_iou": {"dense": mean_iou(reference, tested), "full path": mean_iou(network, tested)}}


def without_void(scenes: ImageSet) -> ImageSet:
    assert scenes.labels is not None
    return replace(scenes, labels=torch.where(scenes.labels == 11, UNKNOWN, scenes.labels), classes=scenes.classes[:11])


@torch.no_grad()
def mean_iou(network: Network, scenes: ImageSet) -> float:
    """Intersection over union of each class over all pixels, mean over the classes (Everingham et al. 2010)."""
    count = torch.zeros(11, 11, dtype=torch.int64)
    for inputs, labels in scenes.batches(32, FEED):
        assert labels is not None
        found = over_pixels(network(inputs, network.space.full), labels.shape[-2:]).argmax(1)
        known = labels != UNKNOWN
        count += torch.bincount(labels[known] * 11 + found[known], minlength=121).view(11, 11)
    both = count.diag().double()
    return float((both / (count.sum(0) + count.sum(1) - both).clamp_min(1)).mean())
