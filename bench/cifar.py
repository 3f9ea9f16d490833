"""CIFAR-10, three seeds: a dense network and an adaptive one, trained by us from scratch for the same number of multiply-adds.

`python -m bench cifar --data FOLDER` wants FOLDER/cifar10.npz (x_train, y_train, x_test, y_test). Every tenth training image of each class is held out
to learn and place the controller; the test set is read once, at the end. Training resumes where it was cut off.
"""

from __future__ import annotations

from pathlib import Path as File

import torch

from apportion.intake.images import ImageSet, read_images
from apportion.network import Architecture, Network, put
from apportion.train import Images, Recipe, dense, fit, sandwich
from apportion.vocab import Path, Plan, Space

ARCHITECTURE = Architecture(image_size=32, patch=4, dim=96, depth=6, heads=3, hidden=384, classes=10, stem="conv")
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
RECIPE = {"batch": 64, "learning_rate": 1.5e-3, "warmup": 0.1, "ema": 0.998, "label_smoothing": 0.05, "crop_padding": 2, "flip": True}
DENSE_EPOCHS = 2.5
GLANCE = 2
PLAN = Plan(glance=GLANCE, rungs=5)


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
    fit(network, tensors(train), dense(label_smoothing=RECIPE["label_smoothing"]), recipe=Recipe(epochs=DENSE_EPOCHS, seed=seed, **RECIPE), folder=runs / f"dense-{seed}")
    return network


def taught_paths(space: Space) -> list[Path]:
    """Every exit from the glance on, and half of the tokens gone right after it: one large cut saves more time than several small ones."""
    half = space.prefix + (space.tokens - space.prefix) // 2
    merged = space.path(tokens=(space.tokens,) * GLANCE + (half,) * (space.depth - GLANCE))
    return [*(space.path(blocks=range(depth)) for depth in range(GLANCE, space.depth)), merged]


def adaptive_epochs(network: Network) -> float:
    """As many epochs as cost the multiply-adds of the dense run: a step also runs the merged path from where it parts."""
    full, merged = network.space.full, taught_paths(network.space)[-1]
    return DENSE_EPOCHS / (1 + network.segment_macs(GLANCE, len(merged.steps), merged) / network.macs(full))


def train_adaptive(train: ImageSet, runs: File, seed: int) -> Network:
    network = build(seed, adaptive=True)
    objective = sandwich(taught_paths(network.space), extra=0, label_smoothing=RECIPE["label_smoothing"])
    recipe = Recipe(epochs=adaptive_epochs(network), seed=seed, **RECIPE)
    fit(network, tensors(train), objective, recipe=recipe, folder=runs / f"adaptive-{seed}")
    return network
