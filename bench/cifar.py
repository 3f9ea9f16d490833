"""CIFAR-10, three seeds: a dense network trained by us from scratch, and the same network made adaptive by a short healing on the same images.

What it is compared with is the dense network trained on for as long as healing took, in multiply-adds.

`python -m bench cifar --data FOLDER` wants FOLDER/cifar10.npz (x_train, y_train, x_test, y_test). Every tenth training image of each class is held out
to learn and place the controller; the test set is read once, at the end. Training resumes where it was cut off.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path as File
from typing import Any

import torch

from apportion import verbs
from apportion.control import decide
from apportion.deliver import deciding
from apportion.deliver.weighing import judged, weigh
from apportion.errors import ControlError
from apportion.files import write_json
from apportion.intake import ImageSet, Preprocess, Source, read_images
from apportion.network import Architecture, Network, put
from apportion.train import Images, Recipe, dense, fit, sandwich
from apportion.vocab import Ladder, Path, Plan, Space
from bench import results

ARCHITECTURE = Architecture(image_size=32, patch=4, dim=96, depth=6, heads=3, hidden=384, classes=10, stem="conv")
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
RECIPE = {"batch": 64, "learning_rate": 1.5e-3, "warmup": 0.1, "ema": 0.998, "label_smoothing": 0.05, "crop_padding": 2, "flip": True}
DENSE_EPOCHS = 2.5
HEALING_EPOCHS, HEALING_RATE = 0.94, 7e-4
# A healing step runs the full path (3 with its backward pass) and the rest of the merged one (0.95): 3.95 against 3 of a dense step.
LONGER_EPOCHS = 1.2375
FEATURE_WEIGHT = 0.1  # of the merged path alone: without a frozen teacher an exit's tokens are the full path's own
GLANCE = 2
PLAN = Plan(glance=GLANCE, rungs=5, tolerance=0.3)
BUDGETS = (0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9)
PREPROCESS = Preprocess(32, MEAN, STD)


def read(data: File) -> tuple[ImageSet, ImageSet, ImageSet]:
    """Training, held-out and test images."""
    held_in, held_out = read_images(data / "cifar10.npz", split="train").split(0.1)
    return held_in, held_out, read_images(data / "cifar10.npz", split="test")


def tensors(images: ImageSet) -> Images:
    return Images(torch.from_numpy(images.images), images.labels, mean=MEAN, std=STD)


def build(seed: int, *, adaptive: bool) -> Network:
    torch.manual_seed(seed)
    network = Network(ARCHITECTURE)
    for choice in PLAN.choices if adaptive else ():
        put(network, choice)
    return network


def train_dense(train: ImageSet, runs: File, seed: int) -> Network:
    network = build(seed, adaptive=False)
    fit(
        network,
        tensors(train),
        dense(label_smoothing=RECIPE["label_smoothing"]),
        recipe=Recipe(epochs=DENSE_EPOCHS, seed=seed, **RECIPE),
        folder=runs / f"dense-{seed}",
    )
    return network


def train_longer(dense_network: Network, train: ImageSet, runs: File, seed: int) -> Network:
    """The dense network trained on for as many multiply-adds as healing takes: what the adaptive network is compared with, the same total training spent."""
    network = build(seed, adaptive=False)
    network.load_state_dict(dense_network.state_dict())
    recipe = Recipe(epochs=LONGER_EPOCHS, seed=seed + 100, **{**RECIPE, "learning_rate": HEALING_RATE})
    fit(network, tensors(train), dense(label_smoothing=RECIPE["label_smoothing"]), recipe=recipe, folder=runs / f"longer-{seed}")
    return network


def taught_paths(space: Space) -> list[Path]:
    """Every exit from the glance on, and half of the tokens gone right after it: one large cut saves more time than several small ones."""
    half = space.prefix + (space.tokens - space.prefix) // 2
    merged = space.path(tokens=(space.tokens,) * GLANCE + (half,) * (space.depth - GLANCE))
    return [*(space.path(blocks=range(depth)) for depth in range(GLANCE, space.depth)), merged]


def heal(dense_network: Network, train: ImageSet, runs: File, seed: int) -> Network:
    """The trained network with methods in its slots: its full path goes on learning from the labels, as the dense one does, and teaches the others."""
    network = build(seed, adaptive=True)
    network.load_state_dict(renamed(dense_network, network))
    objective = sandwich(taught_paths(network.space), extra=0, feature_weight=FEATURE_WEIGHT, label_smoothing=RECIPE["label_smoothing"])
    recipe = Recipe(epochs=HEALING_EPOCHS, seed=seed + 100, **{**RECIPE, "learning_rate": HEALING_RATE})
    fit(network, tensors(train), objective, recipe=recipe, folder=runs / f"adaptive-{seed}")
    return network


def renamed(source: Network, target: Network) -> dict[str, torch.Tensor]:
    """The weights of a network under the names that they have once nested methods wrap their parts; both keep one order."""
    return dict(zip(target.state_dict(), source.state_dict().values(), strict=True))


def main(data: File, runs: File, seeds: list[int]) -> None:
    """Every seed's figures; times for the first one, whose network has the shape of all."""
    train, held, test = read(data)
    found, version = [], hashlib.sha256(File(__file__).read_bytes()).hexdigest()[:8]
    for seed in seeds:
        done = runs / f"figures-{seed}-{version}.json"
        if not done.exists():
            write_json(done, one(train, held, test, runs, seed, timed=seed == seeds[0]))
        found.append(json.loads(done.read_text()))
    results.write(
        "cifar",
        "python -m bench cifar --data FOLDER",
        {
            "seeds": found,
            "recipe": {
                **RECIPE,
                "dense_epochs": DENSE_EPOCHS,
                "healing_epochs": HEALING_EPOCHS,
                "feature_weight": FEATURE_WEIGHT,
                "longer_epochs": LONGER_EPOCHS,
            },
        },
    )


def one(train: ImageSet, held: ImageSet, test: ImageSet, runs: File, seed: int, *, timed: bool) -> dict[str, Any]:
    """One seed: both networks trained, the controller learned and placed on the held-out images, everything read off the test images."""
    begun = train_dense(train, runs, seed).requires_grad_(False)
    network = heal(begun, train, runs, seed).requires_grad_(False)
    reference = train_longer(begun, train, runs, seed).requires_grad_(False)
    source = Source(network, PREPROCESS, train.classes, None, {"model": f"ViT of width {ARCHITECTURE.dim} trained on CIFAR-10, seed {seed}"})
    parts = verbs.Parts(None, *held.split(0.5), test)
    dense_correct = deciding.outcomes(reference, Ladder((reference.space.full,), 0), test, PREPROCESS).correct[:, 0]
    reached = True
    try:
        adapted, seen = deciding.control(network, reference, parts, source, PLAN, backend="inductor", buckets=(1, 32), tell=print)
    except ControlError as error:
        print(f"seed {seed}: not within {PLAN.tolerance} points of the dense network ({error}); placed against its own full path instead")
        reached = False
        adapted, seen = deciding.control(network, network, parts, source, PLAN, backend="inductor", buckets=(1, 32), tell=print)
    bundle = adapted.bundle
    reachable = [budget for budget in BUDGETS if budget >= float(seen.cost[0])]
    budgets = {str(budget): judged(bundle, seen, decide(bundle.controller, seen, budget), dense_correct) for budget in reachable}
    if timed:
        weighed = weigh(adapted, reference, test, seen, dense_correct, repeats=20, tell=print)
        weighed.adapted.save(runs / "bundle", extra=weighed.files())
        figures, times = dict(weighed.figures), next(iter(weighed.adapted.bundle.costs.values()))
    else:
        figures, times = judged(bundle, seen, decide(bundle.controller, seen, bundle.budget), dense_correct), None
    first = deciding.outcomes(begun, Ladder((begun.space.full,), 0), test, PREPROCESS).correct[:, 0]
    start = judged(bundle, seen, decide(bundle.controller, seen, bundle.budget), first)
    against = {"accuracy_dense": start["accuracy_dense"], "drop_points": start["drop_points"]}
    rungs = [{"path": path.name, "gmacs": rung.gmacs, "accuracy": rung.accuracy} for path, rung in zip(bundle.ladder.paths, bundle.rungs, strict=True)]
    return {
        "seed": seed,
        "tolerance_reached": reached,
        "against_the_network_before_healing": against,
        "figures": figures,
        "budgets": budgets,
        "rungs": rungs,
        "times": times,
    }
