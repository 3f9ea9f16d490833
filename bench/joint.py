"""The last stage of teaching: network and policy together, against the same multiply-adds spent on the sandwich alone; CIFAR-10, three seeds.

`python -m bench joint --data FOLDER` wants FOLDER/cifar10.npz and the networks of `python -m bench cifar` under `--runs`. All go on from there, on its training
images; held-out images then teach (half) and place (a quarter) a controller anew for each, and the test images are read once.
"""

from __future__ import annotations

import copy
from pathlib import Path as File
from typing import Any

from apportion.control import Controller, adaptive_gain, decide
from apportion.control.rules import taken
from apportion.deliver import deciding
from apportion.intake import ImageSet
from apportion.network import Network
from apportion.train import Joint, Recipe, fit, joint, sandwich
from apportion.vocab import Ladder, Outcomes
from bench import cifar, results

BUDGETS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SEEDS = (0, 1, 2)
TEMPERATURES = (0.1, 0.05, 0.02)
EPOCHS = 0.3
# A joint step runs all blocks and, once more, those of the glance; one of the sandwich over exits runs all blocks once.
SANDWICH_EPOCHS = EPOCHS * (1 + cifar.GLANCE / cifar.ARCHITECTURE.depth)
RATE = 0.1 * cifar.RECIPE["learning_rate"]


def main(data: File, runs: File) -> None:
    train, held, test = cifar.read(data)
    found = {"seeds": [one(train, held, test, runs, seed) for seed in SEEDS]}
    recipe = {"epochs": EPOCHS, "sandwich_epochs": SANDWICH_EPOCHS, "temperatures": TEMPERATURES, "learning_rate": RATE}
    results.write("joint", "python -m bench joint --data FOLDER", {**found, "recipe": recipe})


def one(train: ImageSet, held: ImageSet, test: ImageSet, runs: File, seed: int) -> dict[str, Any]:
    healed = cifar.heal(cifar.train_dense(train, runs, seed), train, runs, seed).eval().requires_grad_(False)
    space = healed.space
    exits = tuple(space.path(blocks=range(depth)) for depth in range(cifar.GLANCE, space.depth + 1))
    ladder = Ladder(exits, cifar.GLANCE)
    learn, rest = held.split(0.5)
    place, _ = rest.split(0.5)

    def table(network: Network, images: ImageSet) -> Outcomes:
        width = network.glance(cifar.GLANCE)(next(images.rows([0]).batches(1, cifar.PREPROCESS))[0])[1].shape[1]
        return deciding.outcomes(network, ladder, images, cifar.PREPROCESS, decision=deciding.decision_macs(width, len(exits)))

    def controlled(network: Network) -> tuple[Controller, Outcomes]:
        return deciding.learned(table(network, learn), table(network, place), seed=seed), table(network, test)

    def judged(controller: Controller, seen: Outcomes) -> list[dict[str, Any]]:
        rows = []
        for budget in BUDGETS:
            choice = decide(controller, seen, budget)
            found = taken(seen, choice)
            rows.append({"budget": budget, "cost": found.cost, "accuracy": found.accuracy, "gain_points": adaptive_gain(seen, choice)})
        return rows

    controller, before = controlled(healed)
    rows = {"as healed": judged(controller, before)}

    more = copy.deepcopy(healed).requires_grad_(True)
    recipe = {**cifar.RECIPE, "learning_rate": RATE, "seed": seed + 200}
    objective = sandwich(exits[:-1], feature_weight=cifar.FEATURE_WEIGHT, label_smoothing=cifar.RECIPE["label_smoothing"])
    fit(more, cifar.tensors(train), objective, recipe=Recipe(epochs=SANDWICH_EPOCHS, **recipe), folder=runs / f"more-{seed}")
    rows["sandwich alone"] = judged(*controlled(more.eval().requires_grad_(False)))

    both = Joint(copy.deepcopy(healed), ladder, copy.deepcopy(controller)).requires_grad_(True)
    for stage, temperature in enumerate(TEMPERATURES):
        objective = joint(temperature=temperature, feature_weight=cifar.FEATURE_WEIGHT, label_smoothing=cifar.RECIPE["label_smoothing"])
        part = Recipe(epochs=EPOCHS / len(TEMPERATURES), **{**recipe, "seed": seed + 300 + stage})
        fit(both, cifar.tensors(train), objective, recipe=part, folder=runs / f"joint-{seed}-{stage}")
    both.eval().requires_grad_(False)
    moved, seen = controlled(both.network)
    rows["network and policy together"] = judged(moved, seen)
    kept: Controller = both.decider  # pyright: ignore[reportAssignmentType]
    kept.set_prices(table(both.network, place))
    rows["the same, its own policy kept"] = judged(kept, seen)
    return {"seed": seed, "rules": rows}
