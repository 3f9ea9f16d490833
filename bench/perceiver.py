"""One network for every number of latents, width and depth (AdaPerceiver, arXiv 2511.18105), at a small scale: the largest of one to four digits.

`python -m bench perceiver` needs no data: scikit-learn's digits are laid out in the quarters of a picture, some of which stay empty. One network is taught
all settings at once; three networks are trained for one setting each, with as many pictures. Held-out digits choose the hull's settings, the ladder and every
threshold, and teach the controller; the test digits are read once, at the end. A few minutes of one core; it resumes where it was cut off.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path as File
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apportion.control import choose_rungs, decide
from apportion.control.operate import LEVELS, bootstrap_means
from apportion.control.rules import confidence_cascade, envelope, oracle, static_hull
from apportion.deliver import deciding
from apportion.intake import ImageSet, Preprocess, read_images
from apportion.measure.outcomes import look, measure_outcomes
from apportion.network.perceiver import Perceiver, PerceiverArchitecture, placed
from apportion.train import Images, Recipe, dense, fit
from apportion.train.perceiver import classes, nested, passed
from apportion.vocab import Ladder, Outcomes, Path
from bench import results

SEED = 0
SHAPE = {"image_size": 16, "patch": 4, "dim": 64, "depth": 4, "heads": 4, "hidden": 128, "classes": 10, "latents": (2, 4, 8, 16)}
PICTURES = (51_200, 6_000, 10_000)  # to train on, held out, to test on
RECIPE = Recipe(epochs=1.0, batch=128, learning_rate=4e-3, warmup=0.1, ema=0.98, label_smoothing=0.0, crop_padding=0, seed=SEED)
PREPROCESS = Preprocess(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
ALONE = {"full": (16, 128, 4), "middle": (8, 64, 3), "small": (2, 32, 2)}  # latents, width, depth
RUNGS = 6
BUDGETS = (0.15, 0.2, 0.25, 0.3, 0.4, 0.6)
THRESHOLDS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
MARGINS = (0.1, 0.2, 0.3, 0.5, 0.7, 0.9)


def read() -> tuple[ImageSet, ImageSet, ImageSet]:
    """Pictures to train on, held out and to test on; no digit is in two of them."""
    rest, test = read_images("digits", split="all").split(0.25)
    train, held = rest.split(0.25)
    train, held, test = (pictures(digits, count, seed=seed) for seed, (digits, count) in enumerate(zip((train, held, test), PICTURES, strict=True)))
    return train, held, test


def pictures(digits: ImageSet, count: int, *, seed: int) -> ImageSet:
    """One to four digits of 8 x 8 pixels in the quarters of 16 x 16, chosen at random; the label is the largest."""
    assert isinstance(digits.images, np.ndarray) and digits.labels is not None
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(digits), size=(count, 4))
    there = rng.permuted(np.arange(4) < rng.integers(1, 5, (count, 1)), axis=1)
    quarters = (digits.images[:, ::2, ::2][drawn] * there[..., None, None, None].astype(np.uint8)).reshape(count, 2, 2, 8, 8, 3)
    largest = np.where(there, digits.labels.numpy()[drawn], -1).max(1)
    return ImageSet(np.ascontiguousarray(quarters.transpose(0, 1, 3, 2, 4, 5)).reshape(count, 16, 16, 3), torch.from_numpy(largest), digits.classes)


def tensors(images: ImageSet) -> Images:
    return Images(torch.from_numpy(images.images), images.labels, mean=PREPROCESS.mean, std=PREPROCESS.std)


def build(**changes: Any) -> Perceiver:
    torch.manual_seed(SEED)
    return Perceiver(PerceiverArchitecture(**{**SHAPE, **changes}))


def train_joint(train: ImageSet, runs: File) -> Perceiver:
    network = build()
    fit(network, tensors(train), nested(classes(label_smoothing=RECIPE.label_smoothing)), recipe=RECIPE, folder=runs / "joint")
    return network.requires_grad_(False)


def train_alone(train: ImageSet, runs: File, name: str) -> Perceiver:
    latents, width, depth = ALONE[name]
    network = build(latents=(latents,), hidden=width, depth=depth)
    fit(network, tensors(train), dense(label_smoothing=RECIPE.label_smoothing), recipe=RECIPE, folder=runs / name)
    return network.requires_grad_(False)


def main(runs: File) -> None:
    train, held, test = read()
    network = train_joint(train, runs)
    alone = {name: train_alone(train, runs, name) for name in ALONE}
    paths = network.settings()
    known, seen = (answers(network, images) for images in (held, test))
    kept, found = (outcomes(network, logits, images) for logits, images in ((known, held), (seen, test)))
    # A vertex that was chosen on the images it is judged on would flatter the hull.
    hull = found.columns(torch.isin(kept.cost.double(), static_hull(kept).cost).nonzero()[:, 0])
    accuracy = found.correct.double().mean(0).tolist()
    figures = {
        "shape": SHAPE,
        "recipe": {"epochs": RECIPE.epochs, "batch": RECIPE.batch, "learning_rate": RECIPE.learning_rate, "seed": SEED},
        "settings": [{**named(path), "mmacs": network.macs(path) / 1e6, "accuracy": right} for path, right in zip(paths, accuracy, strict=True)],
        "alone": [compared(network, name, model, found, test) for name, model in alone.items()],
        "static_hull": {"share": hull.cost.tolist(), "accuracy": hull.correct.double().mean(0).tolist()},
        "exits": [exits(network, trunk, known, seen, held, test, hull) for trunk in (network.space.full, small_trunk(network, kept))],
        **ladder(network, kept, held, test, hull),
    }
    results.write("perceiver", "python -m bench perceiver", figures)


def named(path: Path) -> dict[str, int]:
    return {"latents": path.tokens[0], "width": path.width[0], "depth": len(path.blocks)}


@torch.no_grad()
def answers(network: Perceiver, images: ImageSet) -> Tensor:
    """Logits of every setting, (n, settings, classes): one pass for each width holds all numbers of latents and all depths."""
    space, parts = network.space, []
    for inputs, _ in images.batches(500, PREPROCESS):
        logits = {}
        for width in space.width:
            for depth, state in enumerate(passed(network, inputs, [width]), 1):
                for count in space.counts:
                    logits[space.path(tokens=count, width=width, blocks=range(depth))] = network.finish(network.first(state, count))
        parts.append(torch.stack([logits[path] for path in network.settings()], 1))
    return torch.cat(parts)


def outcomes(network: Perceiver, logits: Tensor, images: ImageSet) -> Outcomes:
    """The table of all settings without a signal; costs are shares of the full setting, with nothing that decides."""
    cost = torch.tensor([network.macs(path) for path in network.settings()]) / network.macs(network.space.full)
    columns = [lambda state, k=k: state.x[:, k] for k in range(logits.shape[1])]
    return measure_outcomes(look(lambda given: (placed(given), given[:, 0]), columns), [(logits, images.labels)], cost=cost)


def compared(network: Perceiver, name: str, model: Perceiver, found: Outcomes, test: ImageSet) -> dict[str, Any]:
    """A network trained for one setting, and that setting of the joint one; difference in percentage points with its 95 % interval."""
    latents, width, depth = ALONE[name]
    place = network.settings().index(network.space.path(tokens=latents, width=width, blocks=range(depth)))
    full = Ladder((model.space.full,), 0)
    right = deciding.outcomes(model, full, test, PREPROCESS).correct[:, 0].double()
    less = 100 * (found.correct[:, place].double() - right)
    low, high = bootstrap_means(less[:, None])[:, 0].quantile(LEVELS).tolist()
    joint = found.correct[:, place].double().mean().item()
    points = {"points": less.mean().item(), "low": low, "high": high}
    return {"name": name, **named(network.settings()[place]), "alone": right.mean().item(), "joint": joint, "difference": points}


def judged(hull: Outcomes, spent: Tensor, right: Tensor) -> dict[str, Any]:
    """Mean cost (share of the full setting), accuracy, and percentage points above mixing static settings at that cost, with a 95 % interval."""
    table = torch.cat([spent[:, None].double(), right[:, None].double(), hull.correct.double()], 1)

    def gain(means: Tensor) -> Tensor:
        return 100 * (means[..., 1] - envelope(hull.cost, means[..., 2:], means[..., 0]))

    low, high = gain(bootstrap_means(table)).quantile(LEVELS).tolist()
    cost, accuracy = table.mean(0)[:2].tolist()
    return {"cost": cost, "accuracy": accuracy, "gain_points": {"value": gain(table.mean(0)).item(), "low": low, "high": high}}


def small_trunk(network: Perceiver, kept: Outcomes) -> Path:
    """Of the settings with every block, the cheapest that loses at most half a point to the best of all, on held-out images."""
    accuracy = kept.correct.double().mean(0)
    good = zip(network.settings(), (accuracy >= accuracy.max() - 0.005).tolist(), strict=True)
    return next(path for path, close in good if close and len(path.steps) == network.space.depth)


def exits(network: Perceiver, trunk: Path, known: Tensor, seen: Tensor, held: ImageSet, test: ImageSet, hull: Outcomes) -> dict[str, Any]:
    """Leaving after the first block of the trunk that is sure enough; every answer on the way is paid for. Drops are against the trunk's last answer."""
    paths, latents, width = network.settings(), trunk.tokens[0], trunk.width[0]
    places = [paths.index(network.space.path(tokens=latents, width=width, blocks=range(n))) for n in range(1, len(trunk.steps) + 1)]
    spent = torch.tensor(network.macs_until(trunk), dtype=torch.float64) / network.macs(network.space.full)

    def left(logits: Tensor, images: ImageSet, threshold: float) -> tuple[Tensor, Tensor]:
        sure = logits[:, places].softmax(-1).amax(-1) >= threshold
        sure[:, -1] = True
        depth = sure.int().argmax(1)
        return depth, logits[torch.arange(len(logits)), torch.tensor(places)[depth]].argmax(-1) == images.labels

    def drop(logits: Tensor, images: ImageSet, threshold: float) -> float:
        right = left(logits, images, threshold)[1]
        return 100 * ((logits[:, places[-1]].argmax(-1) == images.labels).double() - right.double()).mean().item()

    rows = []
    for threshold in THRESHOLDS:
        depth, right = left(seen, test, threshold)
        rows.append({"threshold": threshold, **judged(hull, spent[depth], right)})
    tuned = next(threshold for threshold in torch.linspace(0.1, 1.01, 92).tolist() if drop(known, held, threshold) <= 0.5)
    depth, right = left(seen, test, tuned)
    inputs, _ = next(test.batches(1000, PREPROCESS))
    ran = network.until_sure(inputs, trunk, tuned)[1] - 1
    placed_at = {"threshold": tuned, "drop_points": drop(seen, test, tuned), **judged(hull, spent[depth], right)}
    return {"trunk": named(trunk), "thresholds": rows, "half_a_point": {**placed_at, "run_as_in_the_table": (ran == depth[:1000]).double().mean().item()}}


def ladder(network: Perceiver, kept: Outcomes, held: ImageSet, test: ImageSet, hull: Outcomes) -> dict[str, Any]:
    """A controller over rungs of all three axes, and the rungs in turn until one is sure: nothing but the patches is used again between them."""
    paths = network.settings()
    chosen = choose_rungs(kept.correct.double().mean(0), kept.cost, RUNGS, quality=kept.quality)
    rungs = Ladder(tuple(paths[index] for index in chosen), 0)
    learn, place = held.split(0.5)
    glance = network.glance(0)
    decision = deciding.decision_macs(glance(next(test.rows([0]).batches(1, PREPROCESS))[0])[1].shape[1], len(chosen))
    first, second, seen = (deciding.outcomes(network, rungs, images, PREPROCESS, decision=decision) for images in (learn, place, test))
    controller = deciding.learned(first, second, seed=SEED)
    full = network.macs(network.space.full)
    ahead = (glance.macs() + decision) / full  # paid by every sample, beside its path
    spent = torch.tensor([network.macs(path) for path in rungs.paths], dtype=torch.float64) / full
    points = []
    for budget in BUDGETS:
        choice = decide(controller, seen, budget)
        right = seen.correct.gather(1, choice[:, None])[:, 0]
        points.append({"budget": budget, **judged(hull, spent[choice] + ahead, right), "share": torch.bincount(choice, minlength=len(chosen)).tolist()})
    bare, reuse = replace(seen, cost=spent), torch.full((len(chosen),), network.tokeniser.macs(SHAPE["patch"]) / full)
    asking = []
    for threshold in MARGINS:
        choice = confidence_cascade(bare, torch.full((len(chosen) - 1,), threshold), reuse).choice
        assert choice is not None
        paid = spent - reuse
        paid[0] = spent[0]
        asking.append({"margin": threshold, **judged(hull, paid.cumsum(0)[choice], seen.correct.gather(1, choice[:, None])[:, 0])})
    best = oracle(bare)
    return {
        "ladder": [named(path) for path in rungs.paths],
        "controller": {"ahead": ahead, "scout": glance.macs() / full, "budgets": deciding},
        "rungs_in_turn": asking,
        "oracle": {"cost": best.cost, "accuracy": best.accuracy},
    }
