"""Deciding, weighed by itself: on made-up populations whose optimum is known, and on the tables of the networks that `cifar` trained.

`python -m bench control --data FOLDER` wants FOLDER/cifar10.npz and the networks of `python -m bench cifar` under `--runs`. Nothing is trained here but
controllers. Held-out images teach (half), place (a quarter) and certify (a quarter); the test images are read once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor

from apportion.control import Controller, acceptable_chance, adaptive_gain, bounds, certify, collapse, decide, fit_controller
from apportion.control.bounds import information_bound, oracle_bound
from apportion.control.complexity import Complexity, calibrate, expected_calibration_error, fit_complexity
from apportion.control.drift import Alarm
from apportion.control.guarantee import certifiable_tolerance, compared
from apportion.control.ordinal import Predictor
from apportion.control.planted import planted
from apportion.control.policy import Policy, fit_policy
from apportion.control.reward import Episodes, Graph, Reward, segments
from apportion.control.rules import confidence_cascade, static_hull, taken
from apportion.control.sequential import fit_sequential, walk
from apportion.control.trees import fit_trees
from apportion.deliver import deciding
from apportion.errors import ControlError
from apportion.intake import ImageSet
from apportion.intake.statistics import image_statistics
from apportion.measure.attack import inflation, relaxed_cost, slow_down
from apportion.measure.corruptions import Kind, corrupt
from apportion.measure.latency import interleaved
from apportion.network import Network
from apportion.vocab import Ladder, Outcomes, Tokens
from bench import cifar, results

BUDGETS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SEEDS = (0, 1, 2)
KINDS: tuple[Kind, ...] = ("noise", "blur", "contrast", "fog")
SHIFTED = 1000  # test images for each corruption and strength
ATTACKED = 64
Sets = tuple[ImageSet, ImageSet, ImageSet]  # taught on, placed on, tested on


def main(data: File, runs: File) -> None:
    train, held, test = cifar.read(data)
    found = {
        "planted": [on_planted(seed) for seed in SEEDS],
        "images": [on_images(train, held, test, runs, seed) for seed in SEEDS],
    }
    results.write("control", "python -m bench control --data FOLDER", found)


def on_planted(seed: int) -> dict[str, Any]:
    """A controller learned from 2,400 + 600 rows against the bounds on 10,000 others; PPO against the exact expectation, one decision each."""
    found: dict[str, Any] = {"seed": seed}
    for name, noise, lucky in (("clear", 0.0, 0.0), ("blurred", 0.5, 0.02)):
        learn, fresh = (planted(rows, noise=noise, lucky=lucky, seed=at) for rows, at in ((3000, seed), (10_000, seed + 100)))
        order = torch.arange(3000)
        controller = fit_controller(learn.outcomes, fit_rows=order[:2400], calibrate_rows=order[2400:], seed=seed)
        found[name] = []
        for budget in BUDGETS:
            choice = decide(controller, fresh.outcomes, budget)
            here = bounds(fresh.outcomes, fresh.acceptable_seen, choice)
            found[name].append(
                {
                    "budget": budget,
                    "cost": here.cost,
                    "accuracy": here.accuracy,
                    "violation": here.violation,
                    "oracle_bound": oracle_bound(fresh.outcomes, here.violation),
                    "information_bound": information_bound(fresh.acceptable_seen, fresh.outcomes.cost, here.violation),
                    "gain_points": gain(fresh.outcomes, choice),
                }
            )
    found["ppo"] = against_exact(seed)
    return found


def against_exact(seed: int) -> list[dict[str, float]]:
    """Reward at equal mean cost of PPO, as a share of the exact expectation's: every rung is an arm, and the first action is the only one."""
    learn, fresh = planted(4000, seed=seed).outcomes, planted(10_000, seed=seed + 100).outcomes
    order = torch.arange(4000)
    controller = fit_controller(learn, fit_rows=order[:3200], calibrate_rows=order[3200:], seed=seed)
    graph, episodes = arms(learn)
    policy = fit_sequential(graph, episodes, seed=seed)
    _, unseen = arms(fresh)
    rows = []
    for budget in BUDGETS:
        exact = taken(fresh, decide(controller, fresh, budget))
        way = walk(policy, unseen.signal, policy.price(budget))
        ours = taken(fresh, way.end - 1)
        rows.append({"budget": budget, "exact_cost": exact.cost, "exact_accuracy": exact.accuracy, "ppo_cost": ours.cost, "ppo_accuracy": ours.accuracy})
    return rows


def arms(outcomes: Outcomes) -> tuple[Graph, Episodes]:
    """The one-shot problem as a graph: node 0 sees the signal and goes to the node of a rung, where there is nothing to do but answer."""
    rows, rungs = outcomes.correct.shape
    after, cost = torch.full((rungs + 1, rungs + 1), -1), torch.zeros(rungs + 1, rungs + 1, dtype=torch.float64)
    after[0, 1:] = torch.arange(1, rungs + 1)
    after[1:, 0] = torch.arange(1, rungs + 1)
    cost[0, 1:] = outcomes.cost.double()
    first = torch.zeros(rows, 1)
    signal = outcomes.signal[:, None].expand(rows, rungs + 1, -1).contiguous()
    return Graph(after, cost), Episodes(signal, torch.cat([first.bool(), outcomes.correct], 1), torch.cat([first, -outcomes.loss], 1))


def on_images(train: ImageSet, held: ImageSet, test: ImageSet, runs: File, seed: int) -> dict[str, Any]:
    """Everything that can be said of deciding on one trained network."""
    network = cifar.heal(cifar.train_dense(train, runs, seed), train, runs, seed).eval().requires_grad_(False)
    space = network.space
    exits = [space.path(blocks=range(depth)) for depth in range(cifar.GLANCE, space.depth + 1)]
    ladder = Ladder(tuple(exits), cifar.GLANCE)
    learn, rest = held.split(0.5)
    place, kept = rest.split(0.5)

    def table(images: ImageSet) -> Outcomes:
        decision = deciding.decision_macs(width(network), len(exits))
        return deciding.outcomes(network, ladder, images, cifar.PREPROCESS, decision=decision)

    fitted, placed, certified, seen = table(learn), table(place), table(kept), table(test)
    controller = deciding.learned(fitted, placed, seed=seed)
    statics = zip(exits, seen.cost.tolist(), seen.correct.double().mean(0).tolist(), strict=True)
    return {
        "seed": seed,
        "ladder": [{"path": path.name, "cost": cost, "accuracy": accuracy} for path, cost, accuracy in statics],
        "budgets": [at_budget(controller, seen, budget) for budget in BUDGETS],
        "calibration_error": expected_calibration_error(controller.complexity(seen.signal), seen.correct),
        "rules": rules(fitted, placed, seen, controller, (learn, place, test), seed),
        "sequential": in_sequence(network, (learn, place, test), seen, seed),
        "certificates": certificates(controller, certified, seen),
        "shift": shifted(network, ladder, controller, placed, test, seen),
        "attack": attacked(network, controller, test),
        "overhead": overhead(network, controller, test),
    }


def width(network: Network) -> int:
    """Features of the glance's signal."""
    side = network.architecture.image_size
    return network.glance(cifar.GLANCE)(torch.zeros(1, 3, side, side))[1].shape[1]


def gain(outcomes: Outcomes, choice: Tensor) -> dict[str, float]:
    return dict(zip(("value", "low", "high"), adaptive_gain(outcomes, choice), strict=True))


def at_budget(controller: Controller, seen: Outcomes, budget: float) -> dict[str, Any]:
    choice = decide(controller, seen, budget)
    found = taken(seen, choice)
    here = bounds(seen, acceptable_chance(controller.complexity(seen.signal)), choice)
    standing = {"oracle": here.oracle, "information_estimate": here.information, "hull": None if here.hull == math.inf else here.hull}
    same = bool(torch.equal(choice, torch.cat([decide(controller, seen.rows(rows), budget) for rows in torch.arange(len(choice)).split(97)])))
    return {
        "budget": budget,
        "cost": found.cost,
        "budget_error": found.cost / budget - 1,
        "accuracy": found.accuracy,
        "gain_points": gain(seen, choice),
        "standing": standing,
        "collapse": collapse(choice, rungs=len(seen.cost))._asdict(),
        "same_in_other_batches": same,
    }


def rules(fitted: Outcomes, placed: Outcomes, seen: Outcomes, full: Controller, images: Sets, seed: int) -> dict[str, list[float]]:
    """Points above the hull at each budget for the controller, and with one part of it taken away or exchanged."""

    def made(predictor: Predictor, policy: Policy, calibration: Outcomes) -> Controller:
        controller = Controller(predictor, policy).requires_grad_(False).eval()  # pyright: ignore[reportArgumentType]
        controller.cost.copy_(calibration.cost)
        controller.set_prices(calibration)
        return controller

    def with_statistics(outcomes: Outcomes, of: ImageSet) -> Outcomes:
        pictures = torch.cat([inputs for inputs, _ in of.batches(500, cifar.PREPROCESS)])
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (cifar.MEAN, cifar.STD))
        signal = torch.cat([outcomes.signal, image_statistics((pictures * std + mean).clamp(0, 1))], 1)
        return replace(outcomes, signal=signal)

    blind = Complexity(features=fitted.signal.shape[1], rungs=len(fitted.cost))
    torch.nn.init.zeros_(blind.outer.weight)
    torch.nn.init.zeros_(blind.outer.bias)
    head = fit_complexity(fitted, seed=seed)
    calibrate(head, placed)
    trees = fit_trees(fitted, seed=seed)
    calibrate(trees, placed)
    wide = [with_statistics(outcomes, of) for outcomes, of in zip((fitted, placed, seen), images, strict=True)]
    more = fit_trees(wide[0], seed=seed)
    calibrate(more, wide[1])
    variants: dict[str, tuple[Controller, Outcomes]] = {
        "complexity head and policy": (full, seen),
        "without the policy": (made(head, fit_policy(fitted, head, seed=seed, epochs=0), placed), seen),
        "without the predictor": (made(blind, fit_policy(fitted, blind, seed=seed), placed), seen),
        "trees and policy": (made(trees, fit_policy(fitted, trees, seed=seed), placed), seen),
        "trees with statistics of the picture": (made(more, fit_policy(wide[0], more, seed=seed), wide[1]), wide[2]),
    }
    return {name: [gain(of, decide(controller, of, budget))["value"] for budget in BUDGETS] for name, (controller, of) in variants.items()}


def in_sequence(network: Network, images: Sets, seen: Outcomes, seed: int) -> list[dict[str, Any]]:
    """PPO at every exit, with and without the step reward, and a cascade that leaves where the margin suffices; all exits' heads are paid for."""
    full = network.macs(network.space.full)
    stops = range(cifar.GLANCE, network.space.depth + 1)
    head = network.head.macs(network.space.tokens, network.space.prefix)  # pyright: ignore[reportCallIssue]
    spent = [network.macs(network.space.path(blocks=range(stop))) for stop in stops]

    def episodes(of: ImageSet) -> Episodes:
        signals, logits, labels = [], [], []
        views = [network.glance(stop) for stop in stops[:-1]]
        with torch.no_grad():
            for inputs, target in of.batches(500, cifar.PREPROCESS):
                states = [view(inputs) for view in views]
                signals.append(torch.stack([signal for _, signal in states] + [torch.zeros_like(states[0][1])], 1))
                logits.append(torch.stack([network.finish(state) for state, _ in states] + [network(inputs, network.space.full)], 1))
                labels.append(target)
        log_p, target = torch.cat(logits).log_softmax(-1), torch.cat(labels)
        right = log_p.argmax(-1) == target[:, None]
        return Episodes(torch.cat(signals), right, log_p.gather(2, target[:, None, None].expand(-1, len(stops), 1))[:, :, 0])

    taught, placed, tested = (episodes(of) for of in images)
    steps = torch.tensor([(after - before) / full for before, after in pairwise(spent)])
    graph, _ = segments(steps, torch.zeros(len(stops)), glance=spent[0] / full)
    rows: list[dict[str, Any]] = []
    for name, reward in (("PPO", Reward()), ("PPO without the step reward", Reward(shaping=0.0))):
        policy = fit_sequential(graph, taught, seed=seed, reward=reward)
        policy.set_prices(placed)
        # Every node that a sample visits asks the policy, and its head once; the last head belongs to the path.
        ask = (policy.macs + head) / full
        for budget in BUDGETS:
            way = walk(policy, tested.signal, policy.price(budget))
            cost = float((way.total + ask * (way.end + 1).clamp_max(len(stops) - 1)).mean())
            accuracy = float(tested.correct.gather(1, way.end[:, None]).double().mean())
            rows.append({"rule": name, "budget": budget, "cost": cost, "accuracy": accuracy, "gain_points": over_hull(seen, cost, accuracy)})
    for threshold in (0.3, 0.5, 0.7, 0.8, 0.9, 0.95):
        found = confidence_cascade(seen, torch.full((len(stops) - 1,), threshold), torch.cat([seen.cost[:1] * 0, seen.cost[:-1]]))
        rows.append(
            {
                "rule": "confidence cascade",
                "threshold": threshold,
                "cost": found.cost,
                "accuracy": found.accuracy,
                "gain_points": over_hull(seen, found.cost, found.accuracy),
            }
        )
    return rows


def over_hull(seen: Outcomes, cost: float, accuracy: float) -> float:
    return 100 * (accuracy - static_hull(seen).interpolate(min(max(cost, float(seen.cost[0])), 1.0)))


def certificates(controller: Controller, kept: Outcomes, seen: Outcomes) -> list[dict[str, Any]]:
    """What the images kept for it certify with confidence 0.9, and the drop on the test images there."""
    budgets = torch.linspace(float(kept.cost[0]), 1.0, 13).tolist()
    rows: list[dict[str, Any]] = []
    for tolerance in (0.3, 0.5, 1.0, 2.0):
        try:
            found = certify(lambda budget: decide(controller, kept, budget), kept, tolerance_points=tolerance, budgets=budgets)
        except ControlError as error:
            rows.append({"tolerance_points": tolerance, "rows": len(kept.correct), "refused": str(error)})
            continue
        drop = compared(seen, decide(controller, seen, found.budget)).drop_points
        rows.append({"tolerance_points": tolerance, "rows": found.rows, "budget": found.budget, "cost": found.mean_cost, "drop_on_test_points": drop})
    least = compared(kept, decide(controller, kept, 0.6))
    return [*rows, {"budget": 0.6, "rows": least.rows, "certifiable_points": certifiable_tolerance(least, delta=0.1)}]


def shifted(network: Network, ladder: Ladder, controller: Controller, placed: Outcomes, test: ImageSet, seen: Outcomes) -> list[dict[str, Any]]:
    """Compute and accuracy at the 0.6x setting on corrupted pictures, and after how many of them the alarm rings."""
    budget, rows = 0.6, torch.arange(SHIFTED)
    start = Alarm.start(decide(controller, placed, budget), rungs=len(ladder.paths))
    clean = taken(seen.rows(rows), decide(controller, seen.rows(rows), budget))
    found: list[dict[str, Any]] = [{"kind": "none", "cost": clean.cost, "accuracy": clean.accuracy}]
    some = test.rows(rows)
    for kind in KINDS:
        for strength in range(1, 6):
            worse = ImageSet(corrupt(some.images, kind, strength), some.labels, some.classes)  # pyright: ignore[reportArgumentType, reportCallIssue]
            table = deciding.outcomes(network, ladder, worse, cifar.PREPROCESS, decision=controller.macs)
            choice = decide(controller, table, budget)
            result, full = taken(table, choice), float(table.correct[:, -1].double().mean())
            found.append(
                {
                    "kind": kind,
                    "strength": strength,
                    "cost": result.cost,
                    "accuracy": result.accuracy,
                    "full": full,
                    "rings_after": start.after(choice).raised_at,
                }
            )
    return found


def attacked(network: Network, controller: Controller, test: ImageSet) -> list[dict[str, Any]]:
    """Mean compute before and after a gradient attack within 8/255, with and without a cap."""
    glance = network.glance(cifar.GLANCE)
    inputs = torch.cat([batch for batch, _ in test.rows(range(ATTACKED)).batches(ATTACKED, cifar.PREPROCESS)])
    radius = 8 / 255 / torch.tensor(cifar.STD).view(1, 3, 1, 1)
    rows: list[dict[str, Any]] = []
    for cap in (math.inf, 0.7):
        budget, limit = controller.setting(budget=0.5, cap=cap)

        def cost(x: Tensor, budget: Tensor = budget, cap: float = cap) -> Tensor:
            return relaxed_cost(controller.worth(glance(x)[1], budget), controller.price(budget), controller.cost, cap=cap)

        with torch.no_grad():
            before = controller(glance(inputs)[1], budget, limit)
            noisy = inputs + radius * torch.randn(inputs.shape, generator=torch.Generator().manual_seed(0)).sign()
            noise = controller(glance(noisy)[1], budget, limit)
        dear = slow_down(cost, inputs, radius=radius, steps=10)
        with torch.no_grad():
            after = controller(glance(dear)[1], budget, limit)
        found = inflation(before, after, controller.cost, cap=cap)
        random = inflation(before, noise, controller.cost, cap=cap)
        rows.append(
            {"cap": None if cap == math.inf else cap, "before": found.before, "after": found.after, "random_signs": random.after, "over_cap": found.over_cap}
        )
    return rows


def overhead(network: Network, controller: Controller, test: ImageSet) -> list[dict[str, Any]]:
    """Time of the decision (the glance's extra head and the controller) against the full path's, operator by operator."""
    budget, cap = controller.setting(budget=0.6)
    glance, full, start = network.glance(cifar.GLANCE), network.at(network.space.full), network.segment(0, cifar.GLANCE, network.space.full)
    rows: list[dict[str, Any]] = []
    for batch in (1, 32):
        inputs = torch.cat([images for images, _ in test.rows(range(batch)).batches(batch, cifar.PREPROCESS)])
        calls: dict[str, Callable[[], Tensor | Tokens]] = {
            "full": partial(full, inputs),
            "deciding": lambda inputs=inputs: controller(glance(inputs)[1], budget, cap),
            "starting": lambda inputs=inputs: start(network.tokeniser(inputs, network.space.patch)),
        }
        with torch.no_grad():
            times = interleaved(calls, repeats=30)
        ms = {name: timing.median_ms for name, timing in times.items()}
        rows.append({"batch": batch, "share_of_full": (ms["deciding"] - ms["starting"]) / ms["full"], "ms": ms})
    return rows
