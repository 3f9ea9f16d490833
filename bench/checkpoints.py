"""Leaving when sure: thresholds at every exit beside one decision after a glance, and thresholds that were placed on another network or other data.

`python -m bench checkpoints --data FOLDER` wants FOLDER/cifar10.npz with the networks of `python -m bench cifar` under `--runs`, and FOLDER/sst2 with the
bundle of `python -m bench text` under `--texts`. Held-out samples place thresholds and teach controllers; the test samples are read once.
"""

from __future__ import annotations

from pathlib import Path as File
from typing import Any

import torch

from apportion.control import Decider, adaptive_gain, decide, exits
from apportion.control.rules import taken
from apportion.deliver import bundle as disk
from apportion.deliver import deciding
from apportion.deliver.costs import profile
from apportion.intake import Feed, Parts, Samples, reader
from apportion.network import Network
from apportion.vocab import Ladder, Outcomes
from bench import cifar, results

BUDGETS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SEEDS = (0, 1, 2)
Tables = tuple[Outcomes, Outcomes, Outcomes]  # learned on, placed on, tested on


def main(data: File, runs: File, texts: File) -> None:
    train, held, test = cifar.read(data)
    learn, place = held.split(0.5)
    images = {}
    for seed in SEEDS:
        network = cifar.heal(cifar.train_dense(train, runs, seed), train, runs, seed).eval().requires_grad_(False)
        images[f"cifar, seed {seed}"] = tables(network, (learn, place, test), cifar.PREPROCESS, cifar.GLANCE)
    bundle = disk.load(texts / "sst2" / "checkpoints")
    parts = Parts.read(data / "sst2", seed=0, read=reader(bundle.preprocess, bundle.classes or None))
    sst2 = {"sst2": tables(bundle.network, (parts.decide, parts.place, parts.report), bundle.preprocess, bundle.plan.glance)}
    found = {name: judged(name, every) for every in (images, sst2) for name in every}
    rungs = len(sst2["sst2"][1][2].cost)
    for name, (_, with_exits) in images.items():  # as many exits as the text network has, evenly spread
        kept = torch.linspace(0, len(with_exits[2].cost) - 1, rungs).round().long()
        found["sst2"][f"thresholds of {name}"] = rows(deciding.stopping(*(table.columns(kept) for table in with_exits[:2])), sst2["sst2"][1][2])
    results.write("checkpoints", "python -m bench checkpoints --data FOLDER", {"runs": found})


def tables(network: Network, parts: tuple[Samples, Samples, Samples], feed: Feed, glance: int) -> tuple[Tables, Tables]:
    """The same exits with the costs of one decision, and with those of an answer at each."""
    ladder, over = Ladder(tuple(exits(network.space, glance)), glance), profile(network, parts[1], feed)
    signal = network.glance(glance)(next(parts[0].rows([0]).batches(1, feed))[0])[1]
    decision = deciding.decision_macs(signal.shape[1], len(ladder.paths))
    once = tuple(deciding.outcomes(network, ladder, part, feed, decision=decision, over=over) for part in parts)
    cost = deciding.outcomes(network, ladder, parts[0].rows([0]), feed, checkpoints=True, over=over).cost
    return once, tuple(Outcomes(t.signal, t.correct, t.agree, t.loss, t.margin, cost) for t in once)  # pyright: ignore[reportReturnType]


def judged(name: str, every: dict[str, tuple[Tables, Tables]]) -> dict[str, Any]:
    """One decision, thresholds of its own, and thresholds of each other network of the same shape."""
    once, with_exits = every[name]
    found = {
        "exits": [{"cost": c, "accuracy": a} for c, a in zip(with_exits[2].cost.tolist(), with_exits[2].correct.double().mean(0).tolist(), strict=True)],
        "one decision": rows(deciding.learned(*once[:2], seed=0), once[2]),
        "thresholds": rows(deciding.stopping(*with_exits[:2]), with_exits[2]),
    }
    others = {f"thresholds of {other}": rows(deciding.stopping(*every[other][1][:2]), with_exits[2]) for other in every if other != name}
    return {**found, **others}


def rows(decider: Decider, seen: Outcomes) -> list[dict[str, Any]]:
    """At each budget: what was spent, how much of the answers is right, and points above the hull of the exits."""
    found = []
    for budget in BUDGETS:
        if budget < float(decider.cost[0]):
            continue
        choice = decide(decider, seen, budget)
        spent = taken(seen, choice)
        gain = dict(zip(("value", "low", "high"), adaptive_gain(seen, choice), strict=True))
        found.append({"budget": budget, "cost": spent.cost, "accuracy": spent.accuracy, "gain_points": gain, "rungs": len(choice.unique())})
    return found
