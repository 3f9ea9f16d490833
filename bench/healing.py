"""Every method in its slot of one trained network, each healed on as many images: accuracy against multiply-adds and time, and what no method passes.

`python -m bench healing --data FOLDER` wants FOLDER/cifar10.npz and the dense network of `python -m bench cifar` under `--networks`. All heal by one rule: the
full path learns from the labels and its answers teach the others, the cheapest and one more in each step. The test images are read once for each method. What
is done lies under `--runs`, method by method, and is not done again. `--seeds 0,1,2`: the first seed heals everything, the others what we serve.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor, nn

from apportion.control import Controller, Decider, adaptive_gain, decide
from apportion.control.complexity import Complexity
from apportion.control.policy import Policy
from apportion.control.rules import oracle, taken
from apportion.deliver import deciding
from apportion.deliver.costs import mean_rung_macs, profile
from apportion.engine import serving
from apportion.files import write_json
from apportion.intake import ImageSet
from apportion.measure.latency import interleaved
from apportion.measure.pareto import hull
from apportion.methods import card
from apportion.methods.ffn.acm import AdaptiveComputation, Gate
from apportion.methods.mix import mix
from apportion.methods.mixer.mind_skip import MindSkip, grouped, over_capacity
from apportion.methods.objective.cross_entropy import METHOD as CrossEntropy
from apportion.methods.slots import Mixed
from apportion.network import Network, put, sort_by_importance
from apportion.train import Objective, Recipe, acm, dense, fit, sandwich
from apportion.vocab import Choice, Ladder, Notes, Outcomes, Path, Space, Tokens
from bench import cifar, results
from bench.systems import Dropped, draw_healed, lots

SORTED_ON = 512  # training images
BUDGETS = (0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9)
BATCH = 64  # of timing
CAPACITIES = (0.75, 0.5, 0.25)
SMOOTHING = cifar.RECIPE["label_smoothing"]


@dataclass(frozen=True)
class Way:
    """A method in its slot. `paths` are taught and tested, `more` only tested; without paths the full one learns, `objective` where it learns otherwise."""

    axis: str
    choices: tuple[Choice, ...] = ()
    paths: Callable[[Space], list[Path]] = lambda space: []
    more: Callable[[Space], dict[str, Path]] = lambda space: {}
    reducer: Callable[[], nn.Module] | None = None
    objective: Objective[Network] | None = None


def cuts(space: Space) -> list[Path]:
    """Half of the tokens gone in the first block, a quarter left from the second on, an eighth from the third on."""
    movable = space.tokens - space.prefix
    left = [space.prefix + movable // part for part in (2, 4, 8)]
    return [space.path(tokens=[*left[:most], *(left[most - 1],) * (space.depth - most)]) for most in (1, 2, 3)]


def narrowed(space: Space) -> list[Path]:
    return [space.path(width=width) for width in space.width[:-1]]


def blended(space: Space) -> dict[str, Path]:
    """Widths that fall and rise from block to block, none of which was taught."""
    found = {}
    for part in (0.75, 0.375, 0.2):
        rising = mix(space.width, space.depth, round(part * space.depth * space.width[-1]))
        for label, widths in (("falling", rising[::-1]), ("rising", rising)):
            found[f"mix'n'match, {label} {part}"] = space.path(width=widths)
    return found


def beheaded(space: Space) -> list[Path]:
    full, half = space.heads[-1], space.depth // 2
    return [space.path(heads=heads) for heads in (full - 1, (full - 1,) * half + (1,) * (space.depth - half), 1)]


def skipped(space: Space) -> list[Path]:
    return [space.path(blocks=space.orders[depth - 1]) for depth in (4, 3, 2)]


def left_early(space: Space) -> list[Path]:
    return [space.path(blocks=range(depth)) for depth in (4, 2, 1)]


def kept_open(capacity: float) -> Objective[Network]:
    """Cross-entropy, and no more open gates in each block than the capacity allows."""

    def objective(network: Network, inputs: Tensor, labels: Tensor | None, rng: Any) -> Tensor:
        notes: Notes = {}
        loss = CrossEntropy(smoothing=SMOOTHING)(network(inputs, network.space.full, notes), target=labels)
        return loss + over_capacity(torch.stack(notes["open"], 1), capacity)

    return objective


WAYS: dict[str, Way] = {
    "ours": Way("all", cifar.PLAN.choices, cifar.taught_paths),
    "dense, longer": Way(""),
    **{name: Way("tokens", (Choice("reducer", name),), cuts) for name in ("tome", "evit", "ats", "pyra")},
    "tokens by lot": Way("tokens", (), cuts, reducer=partial(Dropped, by_lot=True)),
    "tokens of fixed places": Way("tokens", (), cuts, reducer=partial(Dropped, by_lot=False)),
    "matformer": Way("width", (Choice("ffn", "matformer"),), narrowed, blended),
    "acm": Way("width", (Choice("ffn", "acm", options={"gate": 16}),), narrowed),
    "acm, no gate": Way("width", (Choice("ffn", "acm"),), narrowed),
    "head_prefix": Way("heads", (Choice("mixer", "head_prefix"),), beheaded),
    "skip": Way("depth", (Choice("depth", "skip"),), skipped),
    "first": Way("depth", (Choice("depth", "first"),), left_early),
    "fixed_point": Way("attention", (Choice("mixer", "fixed_point", options={"iterations": 2}),)),
    **{f"mind_skip {part}": Way("attention", (Choice("mixer", "mind_skip"),), objective=kept_open(part)) for part in CAPACITIES},
}


class Dealt(nn.Module):
    """The control of a gate: its logits dealt at random among a sample's tokens, so that as many get as much, but others."""

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, x: Tensor, k: int) -> Tensor:
        logits = self.gate(x, k)
        return logits.gather(1, lots(x)[..., None].expand_as(logits))

    def macs(self, tokens: int) -> int:
        return self.gate.macs(tokens)


class OpenOnly(nn.Module):
    """Attention for the samples whose gate is open, as it is timed."""

    def __init__(self, of: MindSkip) -> None:
        super().__init__()
        self.of, self.choices = of, of.choices

    def forward(self, tokens: Tokens, heads: int, notes: Notes | None = None) -> Mixed:
        out = grouped(self.of, tokens, heads)
        return Mixed(out, out[:0], out[:0])  # no reducer looks at queries or keys here


@dataclass(frozen=True)
class Setting:
    """What all methods share."""

    train: ImageSet
    held: ImageSet
    test: ImageSet
    begun: Network  # dense, frozen
    runs: File
    seed: int
    images: int

    @property
    def recipe(self) -> Recipe:
        return Recipe(epochs=self.images / len(self.train), seed=self.seed + 100, **{**cifar.RECIPE, "learning_rate": cifar.HEALING_RATE})

    def healed(self, name: str) -> Network:
        """The method in its slot, taught: at once where it was taught before."""
        way, network = WAYS[name], copy.deepcopy(self.begun).requires_grad_(True)
        torch.manual_seed(self.seed)
        for choice in way.choices:
            put(network, choice)
        for block in network.blocks if way.reducer else ():
            block.reducer = way.reducer()  # pyright: ignore[reportOptionalCall]
        sort_by_importance(network, [x for x, _ in self.train.rows(range(SORTED_ON)).batches(100, cifar.PREPROCESS)])
        paths, data = way.paths(network.space), cifar.tensors(self.train)
        objective = sandwich(paths, feature_weight=0, label_smoothing=SMOOTHING) if paths else way.objective or dense(label_smoothing=SMOOTHING)
        folder = self.runs / f"{name.replace(' ', '-')}-{self.seed}-{self.images}"
        if name.startswith("acm"):
            acm.teach(network, data, teacher=self.begun, last=objective, recipe=self.recipe, folder=folder)
        else:
            fit(network, data, objective, recipe=self.recipe, folder=folder)
        return network.eval().requires_grad_(False)


def table(
    network: Network, paths: Sequence[Path], samples: ImageSet, *, glance: int = 0, checkpoints: bool = False, decision: int = 0
) -> tuple[list[Path], Outcomes, float]:
    """These paths and the full one on these samples, cheapest first; and GMACs of a cost of 1."""
    every = [*sorted(paths, key=network.macs), network.space.full]
    ladder = Ladder(tuple(every), glance)
    gmacs = mean_rung_macs(network, ladder, decision=decision, checkpoints=checkpoints)[-1] / 1e9
    return every, deciding.outcomes(network, ladder, samples, cifar.PREPROCESS, checkpoints=checkpoints, decision=decision), gmacs


def one(setting: Setting, name: str) -> dict[str, Any]:
    """Everything about one method but its times."""
    began, way = time.monotonic(), WAYS[name]
    network = setting.healed(name)
    seconds = time.monotonic() - began
    found: dict[str, Any] = {"method": name, "axis": way.axis, "seed": setting.seed, "seconds": seconds, "needs": needs(way)}
    if name.startswith("mind_skip"):
        return {**found, "rows": [gated(network, setting.test)]}
    if name == "ours":
        return {**found, **ours(setting, network)}
    labels = {path: label for label, path in way.more(network.space).items()}
    every, seen, _ = table(network, [*way.paths(network.space), *labels], setting.test)
    found["rows"] = static(network, every, seen, labels)
    if name == "acm":
        for block in network.blocks:
            assert isinstance(block.ffn, AdaptiveComputation) and isinstance(block.ffn.gate, Gate)
            block.ffn.gate = Dealt(block.ffn.gate)  # pyright: ignore[reportAttributeAccessIssue]
        every, seen, _ = table(network, way.paths(network.space), setting.test)
        found["rows"] += static(network, every[:-1], seen, dict.fromkeys(every, "acm, gate dealt at random"))
    if name == "first":
        (learn, place), exits = halves(setting.held), way.paths(network.space)
        tables = [table(network, exits, part, checkpoints=True) for part in (learn, place, setting.test)]
        every, seen, gmacs = tables[-1]
        found["adaptive"] = {"method": "first, thresholds", "paths": names(every), "rows": judged(deciding.stopping(tables[0][1], tables[1][1]), seen, gmacs)}
        found["oracle"] = foreseen(seen, gmacs)
    return found


def needs(way: Way) -> str:
    found = {card(choice.slot, choice.name).needs for choice in way.choices}
    return next((need for need in ("training", "healing", "calibration") if need in found), "nothing")


def halves(held: ImageSet) -> tuple[ImageSet, ImageSet]:
    return held.split(0.5)


def names(paths: Sequence[Path]) -> list[str]:
    return [path.name for path in paths]


def static(network: Network, every: Sequence[Path], seen: Outcomes, labels: dict[Path, str]) -> list[dict[str, Any]]:
    rows = []
    for rung, path in enumerate(every):
        right = taken(seen, torch.full((len(seen.signal),), rung)).accuracy
        rows.append({"label": labels.get(path, ""), "path": path.name, "gmacs": network.macs(path) / 1e9, "accuracy": right})
    return rows


def gated(network: Network, test: ImageSet) -> dict[str, Any]:
    """Accuracy, and the cost where attention runs for the open samples only."""
    full, right, opened = network.space.full, 0, []
    with torch.no_grad():
        for inputs, labels in test.batches(deciding.BATCH, cifar.PREPROCESS):
            notes: Notes = {}
            right += int((network(inputs, full, notes).argmax(-1) == labels).sum())
            opened.append(torch.stack(notes["open"], 1))
    shares = torch.cat(opened).mean(0).tolist()
    mixers = [block.mixer for block in network.blocks if isinstance(block.mixer, MindSkip)]
    saved = sum(m.macs(n, h) - m.grouped_macs(n, h, share) for m, share, n, h in zip(mixers, shares, full.tokens, full.heads, strict=True))
    return {"label": "", "path": full.name, "gmacs": (network.macs(full) - saved) / 1e9, "accuracy": right / len(test), "open": shares}


def ours(setting: Setting, network: Network) -> dict[str, Any]:
    """One decision on the ladder that the default plan chooses: learned on half of the held-out images, placed on the other."""
    learn, place = halves(setting.held)
    over = profile(network, place, cifar.PREPROCESS)
    ladder = deciding.choose_ladder(network, setting.begun, learn, cifar.PREPROCESS, cifar.PLAN, over, backend="eager", buckets=(1,), tell=print)
    width = network.glance(cifar.GLANCE)(next(learn.rows([0]).batches(1, cifar.PREPROCESS))[0])[1].shape[1]
    decision = deciding.decision_macs(width, len(ladder.paths))
    tables = [table(network, ladder.paths[:-1], part, glance=cifar.GLANCE, decision=decision) for part in (learn, place, setting.test)]
    every, seen, gmacs = tables[-1]
    controller = deciding.learned(tables[0][1], tables[1][1], seed=setting.seed)
    adaptive = {"method": "ours, one decision", "paths": names(every), "rows": judged(controller, seen, gmacs)}
    return {"rows": static(network, every, seen, {}), "adaptive": adaptive, "oracle": foreseen(seen, gmacs), "ladder": [path.to_dict() for path in every]}


def judged(decider: Decider, seen: Outcomes, gmacs: float) -> list[dict[str, Any]]:
    """At each budget: GMACs spent, accuracy, points above the hull of the same paths, and the share of samples on each path."""
    rows = []
    for budget in BUDGETS:
        if budget < float(decider.cost[0]):
            continue
        choice = decide(decider, seen, budget)
        spent = taken(seen, choice)
        gain = dict(zip(("value", "low", "high"), adaptive_gain(seen, choice), strict=True))
        share = (torch.bincount(choice, minlength=len(seen.cost)).double() / len(choice)).tolist()
        rows.append({"budget": budget, "gmacs": spent.cost * gmacs, "accuracy": spent.accuracy, "gain_points": gain, "share": share})
    return rows


def foreseen(seen: Outcomes, gmacs: float) -> dict[str, float]:
    """What these paths would cost whoever knew beforehand which is enough."""
    found = oracle(seen)
    return {"gmacs": found.cost * gmacs, "accuracy": found.accuracy}


def calls(setting: Setting, found: dict[str, Any]) -> dict[str, Callable[[Tensor], Any]]:
    """What is to be timed of one method, under the path's name; what decides, with its decision, under `rung N`."""
    network, name = setting.healed(found["method"]), found["method"]
    if name.startswith("mind_skip"):
        for block in network.blocks:
            block.mixer = OpenOnly(block.mixer) if isinstance(block.mixer, MindSkip) else block.mixer
        return {found["rows"][0]["path"]: network.at(network.space.full)}
    if name == "ours":
        paths = [Path.from_dict(each) for each in found["ladder"]]
        glance = network.glance(cifar.GLANCE)
        width = glance(torch.zeros(1, *network.architecture.input_shape))[1].shape[1]
        sizes = {"features": width, "rungs": len(paths)}
        controller = Controller(Complexity(**sizes), Policy(**sizes)).requires_grad_(False)  # what it decides is of no matter to its time
        rungs = {f"rung {rung}": partial(decided, glance, controller, network.segment(cifar.GLANCE, len(path.steps), path)) for rung, path in enumerate(paths)}
        return {**{path.name: network.at(path) for path in paths}, **rungs}
    way = WAYS[name]
    paths = [*way.paths(network.space), *way.more(network.space).values(), network.space.full]
    made: dict[str, Callable[[Tensor], Any]] = {path.name: network.at(path) for path in paths}
    if name == "first":
        ends = sorted(len(path.steps) for path in paths)
        stations = [network.station(first, last) for first, last in zip((0, *ends), ends, strict=False)]
        made |= {f"rung {rung}": partial(passed, stations[: rung + 1]) for rung in range(len(stations))}
    return made


def decided(glance: nn.Module, controller: Controller, rest: nn.Module, inputs: Tensor) -> Tensor:
    tokens, signal = glance(inputs)
    controller(signal, controller.cost[-1], controller.cost[-1])
    return rest(tokens)


def passed(stations: Sequence[nn.Module], inputs: Tensor) -> Tensor:
    state, logits = stations[0](inputs)
    for station in stations[1:]:
        state, logits = station(state)
    return logits


def timed(setting: Setting, every: list[dict[str, Any]], repeats: int) -> None:
    """Add `ms` of an image to every row: the median over rounds that all share; of what decides, the mean over its paths."""
    inputs = next(setting.test.rows(range(BATCH)).batches(BATCH, cifar.PREPROCESS))[0]
    with serving():
        made = {f"{found['method']}|{key}": partial(call, inputs) for found in every for key, call in calls(setting, found).items()}
        times = {key: timing.median_ms / BATCH for key, timing in interleaved(made, repeats=repeats).items()}
    for found in every:
        for row in found["rows"]:
            row["ms"] = times[f"{found['method']}|{row['path']}"]
        for row in found.get("adaptive", {}).get("rows", ()):
            row["ms"] = sum(share * times[f"{found['method']}|rung {rung}"] for rung, share in enumerate(row["share"]))


def main(data: File, networks: File, runs: File, *, images: int, tests: int, seeds: Sequence[int], repeats: int, without: Sequence[str] = ()) -> None:
    torch.set_num_threads(1)
    train, held, test = cifar.read(data)
    held, test = held.rows(torch.randperm(len(held), generator=torch.Generator().manual_seed(0))[:tests]), test.rows(range(min(tests, len(test))))
    first, *others = seeds
    every: dict[int, list[dict[str, Any]]] = {}
    settings = {}
    for seed in (first, *others):
        begun = cifar.train_dense(train, networks, seed).eval().requires_grad_(False)
        settings[seed] = Setting(train, held, test, begun, runs, seed, images)
        every[seed] = []
        for name in [name for name in WAYS if name not in without] if seed == first else ("ours", "dense, longer"):
            done = runs / f"{name.replace(' ', '-')}-{seed}-{images}-{tests}.json"
            if not done.exists():
                write_json(done, one(settings[seed], name))
            every[seed].append(json.loads(done.read_text()))
            print(f"{name}, seed {seed}: {[(round(row['gmacs'], 4), row['accuracy']) for row in every[seed][-1]['rows']]}", flush=True)
    ways = every[first]
    full = settings[first].begun.space.full
    _, seen, _ = table(settings[first].begun, [], test)
    start = {"method": "dense", "axis": "", "needs": "nothing", "seed": first, "seconds": 0.0, "rows": static(settings[first].begun, [full], seen, {})}
    timed(settings[first], ways, repeats)
    start["rows"][0]["ms"] = next(found for found in ways if found["method"] == "dense, longer")["rows"][0]["ms"]  # the same network with other weights
    ways.insert(0, start)
    fixed = [row for found in ways if not found["method"].startswith("mind_skip") for row in found["rows"]]
    hulls = {cost: hull([row[cost] for row in fixed], [row["accuracy"] for row in fixed]) for cost in ("gmacs", "ms")}
    more = [way for seed in others for way in every[seed]]
    figures = {"images": images, "tests": len(test), "batch": BATCH, "left_out": list(without), "ways": ways, "hull": hulls, "other_seeds": more}
    results.write("systems-healed", f"python -m bench healing --data FOLDER --seeds {','.join(map(str, seeds))}", figures)
    draw_healed(figures)
