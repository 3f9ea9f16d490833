"""Adaptive Computation Modules on two trained encoders: a small ViT on CIFAR-10 and MiniLM-L6 on SST-2, one gate each for every budget.

`python -m bench acm --data FOLDER --model MODEL` wants FOLDER/cifar10/cifar10.npz and the dense network of `python -m bench cifar` under `--networks`,
FOLDER/sst2 and the dense classifier of `python -m bench text` under `--texts`. Both are taught in the three stages on the training data, with the dense
network as teacher, and read once on the test data at every budget: as served, with the same share for every token, and with the gate's words dealt at random
among a sample's tokens. Times are of the whole network, in turns with the dense one.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor

from apportion.deliver import deciding
from apportion.deliver.costs import macs as closed_form
from apportion.engine import Backend, build, serving
from apportion.intake import Parts, Preprocess, Samples, Tokenise, read_model, reader
from apportion.measure.latency import interleaved, ratio, realisation_ratio
from apportion.measure.macs import executed_macs
from apportion.measure.quality import paired_drop
from apportion.methods.ffn.acm import AdaptiveComputation, Gate
from apportion.network import Network, put, sort_by_importance
from apportion.train import Data, Recipe, acm
from apportion.vocab import Choice, Ladder, Path
from bench import cifar, results, text
from bench.healing import Dealt

LEARNERS, GATE = 8, 16
BACKENDS: tuple[Backend, ...] = ("openvino", "eager")
BATCH = 32
SORTED_ON = 8  # batches of BATCH training samples


@dataclass(frozen=True)
class Setting:
    """A trained encoder, what it is taught on and what it is asked."""

    dense: Network
    taught: Data
    begin: Sequence[Tensor]  # training inputs, to sort the hidden units on
    test: Samples
    feed: Preprocess | Tokenise
    recipe: Recipe
    label_smoothing: float


def images(data: File, networks: File) -> Setting:
    train, _, test = cifar.read(data / "cifar10")
    network = cifar.train_dense(train, networks, 0).eval().requires_grad_(False)
    recipe = Recipe(epochs=1.5, seed=100, **{**cifar.RECIPE, "learning_rate": cifar.HEALING_RATE})
    begin = [inputs for inputs, _ in train.rows(range(SORTED_ON * BATCH)).batches(BATCH, cifar.PREPROCESS)]
    return Setting(network, cifar.tensors(train), begin, test, cifar.PREPROCESS, recipe, cifar.RECIPE["label_smoothing"])


def sentences(data: File, model: File, texts: File) -> Setting:
    source = read_model(model, length=text.LENGTH)
    parts = Parts.read(data / "sst2", seed=0, read=reader(source.tokenise, None))
    assert parts.teach is not None
    taught, network = text.memory(parts.teach, source.tokenise), text.classifier(source, len(parts.teach.classes))
    text.train_dense(network, taught, text.ALLOWANCES["sst2"], texts / "sst2" / "dense")
    begin = [inputs for inputs, _ in parts.teach.rows(range(SORTED_ON * BATCH)).batches(BATCH, source.tokenise)]
    recipe = Recipe(epochs=6.0, learning_rate=1e-4, seed=100, **text.SHARED)
    return Setting(network.eval().requires_grad_(False), taught, begin, parts.report, source.tokenise, recipe, 0.05)


def taught(setting: Setting, folder: File) -> Network:
    """Learners and gates in every block, taught: at once where it was done before."""
    network = copy.deepcopy(setting.dense).requires_grad_(True)
    torch.manual_seed(0)
    put(network, Choice("ffn", "acm", options={"learners": LEARNERS, "gate": GATE}))
    sort_by_importance(network, setting.begin)
    last = acm.end_to_end(setting.dense, label_smoothing=setting.label_smoothing)
    acm.teach(network, setting.taught, teacher=setting.dense, last=last, recipe=setting.recipe, folder=folder)
    return network.eval().requires_grad_(False)


def gateless(network: Network, *, at_random: bool) -> Network:
    """The control: the same weights without a gate, or with one whose words go to other tokens."""
    made = copy.deepcopy(network)
    for block in made.blocks:
        ffn = block.ffn
        assert isinstance(ffn, AdaptiveComputation) and isinstance(ffn.gate, Gate)
        ffn.gate = Dealt(ffn.gate) if at_random else None  # pyright: ignore[reportAttributeAccessIssue]
    return made


def weighed(setting: Setting, network: Network, repeats: int) -> dict[str, Any]:
    space = network.space
    paths = [space.path(width=width) for width in space.width]
    quality = {"dense": good(setting, setting.dense, [setting.dense.space.full])}
    quality |= {"served": good(setting, network, paths), "same for all": good(setting, gateless(network, at_random=False), paths)}
    quality["dealt at random"] = good(setting, gateless(network, at_random=True), paths)
    inputs = batch(setting)
    dense_macs = executed_macs(lambda: setting.dense(inputs[:1], setting.dense.space.full))
    rows: list[dict[str, Any]] = []
    for k, path in enumerate(paths):
        macs = executed_macs(lambda path=path: network(inputs[:1], path))
        assert macs == closed_form(network, path, inputs.shape[-1] if network.architecture.words else network.architecture.tokens)
        drops = {way: paired_drop(quality["dense"][:, 0].numpy(), quality[way][:, k].numpy())._asdict() for way in quality if way != "dense"}
        accuracy = {way: found[:, k].double().mean().item() for way, found in quality.items() if way != "dense"}
        rows.append({"learners": k + 1, "macs_share": macs / dense_macs, "accuracy": accuracy, "drop_points": drops})
        print(rows[-1], flush=True)
    for backend in BACKENDS:
        for row, found in zip(rows, timed(setting, network, paths, inputs, backend, repeats), strict=True):
            saved = realisation_ratio(1.0, found["value"], 1.0, row["macs_share"]) if row["macs_share"] < 1 else None
            row.setdefault("time", {})[backend] = {**found, "realised": saved}
            print(backend, row["learners"], row["time"][backend], flush=True)
    return {"accuracy_dense": quality["dense"].double().mean().item(), "samples": len(quality["dense"]), "inputs": list(inputs.shape), "rows": rows}


def good(setting: Setting, network: Network, paths: Sequence[Path]) -> Tensor:
    """(n, k) bool: whether each answer is right."""
    return deciding.outcomes(network, Ladder(tuple(paths), 0), setting.test, setting.feed).correct


def batch(setting: Setting) -> Tensor:
    """Test inputs to be timed: of texts, of the length that most are padded to."""
    if isinstance(setting.feed, Preprocess):
        return next(setting.test.rows(range(BATCH)).batches(BATCH, setting.feed))[0]
    sizes = setting.test.sizes(setting.feed)
    assert sizes is not None
    short = (sizes <= 32).nonzero()[:BATCH, 0]
    return next(setting.test.rows(short).batches(BATCH, setting.feed))[0][..., :32].contiguous()


def timed(setting: Setting, network: Network, paths: Sequence[Path], inputs: Tensor, backend: Backend, repeats: int) -> list[dict[str, float]]:
    """Each path's time over the dense network's, in one interleaved run."""
    modules = {"dense": setting.dense.at(setting.dense.space.full), **{path.name: network.at(path) for path in paths}}
    with serving():
        calls: dict[str, Callable[[], Any]] = {
            name: partial(build(module, (inputs,), backend=backend, name=name.replace(" ", "-")), inputs) for name, module in modules.items()
        }
        times = interleaved(calls, repeats=repeats)
    return [ratio(times[path.name], times["dense"])._asdict() for path in paths]


def main(data: File, model: File, runs: File, *, networks: File, texts: File, repeats: int, only: Sequence[str]) -> None:
    torch.set_num_threads(1)
    ways: dict[str, Callable[[], Setting]] = {"MiniLM-L6, SST-2": partial(sentences, data, model, texts), "ViT, CIFAR-10": partial(images, data, networks)}
    found: dict[str, Any] = {}
    for name, setting in ways.items():
        if only and name.split(",")[0] not in only:
            continue
        given, begin = setting(), time.monotonic()
        network = taught(given, runs / name.split(",")[0])
        seconds = time.monotonic() - begin
        found[name] = {**weighed(given, network, repeats), "training_seconds": seconds, "epochs": given.recipe.epochs}
    results.write("acm", "python -m bench acm --data FOLDER --model MODEL", {"learners": LEARNERS, "gate": GATE, "batch": BATCH, "runs": found})
