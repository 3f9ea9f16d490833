"""What each term of the paths' loss is worth: labels, the full path's answer, its tokens, and the bound on what a path errs oftener than it.

`python -m bench distil --data FOLDER` wants FOLDER/cifar10.npz and, under `--runs`, the dense networks of `python -m bench cifar`; digits come with
scikit-learn. Each way of teaching begins with the same dense network, takes the same steps on the same images and teaches the same paths.
Where the full path teaches, an exit's tokens are its own, so that the features weigh on the merged path alone: that row says nothing about them.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor

from apportion import verbs
from apportion.control.rules import envelope
from apportion.files import write_json
from apportion.network import Architecture, Network, put
from apportion.train import Images, Recipe, fit, sandwich
from apportion.train.sandwich import branch, run
from bench import cifar, results

SEEDS = (0, 1, 2)
BUDGETS = tuple(round(0.4 + 0.05 * step, 2) for step in range(11))
TERMS = ("label_weight", "logit_weight", "feature_weight", "excess_weight")
NAMES = dict(zip(TERMS, ("labels", "logits", "features", "bound"), strict=True))
SLACK = 0.05  # of the samples: what a path may err oftener before the bound asks anything of it
WAYS = {
    "all terms": TERMS,
    **{f"without {NAMES[gone]}": tuple(term for term in TERMS if term != gone) for gone in TERMS},
    "logits alone": ("logit_weight",),
    "labels alone": ("label_weight",),
}
DIGITS = Architecture(image_size=16, patch=2, dim=48, depth=6, heads=3, hidden=192, classes=10, stem="conv")  # the demo's
DIGITS_DENSE = {"epochs": 10.0, "batch": 32, "learning_rate": 2e-3, "crop_padding": 1, "ema": 0.99}
DIGITS_RECIPE = {"epochs": 2.0, "batch": 32, "learning_rate": 1e-3, "crop_padding": 2}
CIFAR_IMAGES, CIFAR_TEST = 3200, 2000  # taught with, in each way and seed; and judged on, the first of the test set
CIFAR_RATE = 2e-4  # so few steps at the rate of `python -m bench cifar` take away more than they give


@dataclass(frozen=True, slots=True)
class Task:
    """A dense network for each seed, what it is taught with and what it is judged on."""

    begin: Callable[[int], tuple[Network, Images, list[tuple[Tensor, Tensor]]]]
    recipe: Mapping[str, Any]
    feature_weight: float
    frozen: bool  # whether a copy of the dense network teaches, as in `adapt`, or the full path, which goes on learning, as in `python -m bench cifar`
    smoothing: float


def main(data: File, runs: File) -> None:
    """Every way on both sets of images; a seed that is done is not done again."""
    epochs = CIFAR_IMAGES / len(cifar.read(data)[0])
    healing = {**cifar.RECIPE, "learning_rate": CIFAR_RATE, "epochs": epochs}
    tasks = {
        "digits": Task(partial(digits, runs), DIGITS_RECIPE, 1.0, frozen=True, smoothing=0.1),
        "cifar10": Task(partial(images, data, runs), healing, cifar.FEATURE_WEIGHT, frozen=False, smoothing=cifar.RECIPE["label_smoothing"]),
    }
    version = hashlib.sha256(File(__file__).read_bytes()).hexdigest()[:8]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in tasks}
    for name, task in tasks.items():
        for seed in SEEDS:
            done = runs / f"distil-{name}-{seed}-{version}.json"
            if not done.exists():
                write_json(done, one(task, seed))
            found[name].append(json.loads(done.read_text()))
    recipes = {name: {**task.recipe, "feature_weight": task.feature_weight, "frozen_teacher": task.frozen} for name, task in tasks.items()}
    shared = {"excess_weight": 1.0, "slack": SLACK, "cifar_images": CIFAR_IMAGES, "cifar_test_images": CIFAR_TEST, "area_budgets": BUDGETS}
    results.write("distil", "python -m bench distil --data FOLDER", {"ways": found, "recipe": {**shared, **recipes}})


def digits(runs: File, seed: int) -> tuple[Network, Images, list[tuple[Tensor, Tensor]]]:
    """The demo's network; judged on every image that it was not taught with."""
    recipe = Recipe(seed=seed, **DIGITS_DENSE)
    network, feed, parts = verbs.scratch("digits", recipe=recipe, architecture=DIGITS, folder=runs / f"distil-digits-{seed}")
    assert parts.teach is not None
    inputs, labels = next(parts.teach.batches(len(parts.teach), feed))
    others = [batch for part in (parts.decide, parts.place, parts.report) for batch in part.batches(500, feed)]
    return network, Images(inputs, labels), [(inputs, labels) for inputs, labels in others if labels is not None]


def images(data: File, runs: File, seed: int) -> tuple[Network, Images, list[tuple[Tensor, Tensor]]]:
    """A network of `python -m bench cifar`."""
    train, _, test = cifar.read(data)
    some = test.rows(range(CIFAR_TEST))
    batches = [(inputs, labels) for inputs, labels in some.batches(500, cifar.PREPROCESS) if labels is not None]
    return cifar.train_dense(train, runs, seed), cifar.tensors(train), batches


def one(task: Task, seed: int) -> dict[str, Any]:
    """All ways from one dense network."""
    begun, taught, judged = task.begin(seed)
    made = Network(begun.architecture)
    for choice in cifar.PLAN.choices:
        put(made, choice)
    made.load_state_dict(cifar.renamed(begun, made))
    rows = {"as it was": judge(made.eval(), judged)}
    for name, terms in WAYS.items():
        network = copy.deepcopy(made).requires_grad_(True)
        weights = {term: (task.feature_weight if term == "feature_weight" else 1.0) if term in terms else 0.0 for term in TERMS}
        teacher = copy.deepcopy(made).eval().requires_grad_(False) if task.frozen else None
        objective = sandwich(
            cifar.taught_paths(network.space),
            extra=0,
            teacher=teacher,
            label_weight=weights["label_weight"],
            logit_weight=weights["logit_weight"],
            feature_weight=weights["feature_weight"],
            excess_weight=weights["excess_weight"],
            slack=SLACK,
            label_smoothing=task.smoothing,
        )
        fit(network, taught, objective, recipe=Recipe(**{**task.recipe, "seed": seed + 100}), progress=False)
        rows[name] = judge(network, judged)
        print(seed, name, rows[name], flush=True)
    images = Recipe(**task.recipe).steps(len(taught)) * task.recipe["batch"]
    return {"seed": seed, "images": images, "samples": sum(len(labels) for _, labels in judged), "ways": rows}


@torch.no_grad()
def judge(network: Network, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Accuracy of every path, cheapest first, and the mean over budgets of what mixtures of them reach."""
    space = network.space
    paths = sorted([*cifar.taught_paths(space), space.full], key=network.macs)
    right, samples = torch.zeros(len(paths)), 0
    for inputs, labels in batches:
        trunk = run(network, inputs, space.full)
        right += torch.stack([(branch(network, inputs, trunk, path).logits.argmax(-1) == labels).float().sum() for path in paths])
        samples += len(labels)
    cost, accuracy = torch.tensor([network.macs(path) for path in paths]) / network.macs(space.full), right / samples
    area = envelope(cost, accuracy, torch.tensor(BUDGETS)).mean().item()
    return {"area": area, "paths": [{"path": path.name, "cost": c, "accuracy": a} for path, c, a in zip(paths, cost.tolist(), accuracy.tolist(), strict=True)]}
