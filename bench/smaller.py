"""A smaller network trained alike: dense networks of about the adaptive one's multiply-adds, given as many multiply-adds of training as the whole adaptive
one had (the dense network, and what its paths learned), beside the adaptive network at the same cost.

`python -m bench smaller --data FOLDER` wants FOLDER/cifar10.npz and the committed result of `python -m bench cifar`. With `--model` it is texts instead:
the first blocks of MiniLM-L6, fine-tuned on the texts of `python -m bench text` (`--sets`, of which results are committed), FOLDER as there; as many blocks
as the adaptive network runs on average, one more and one fewer. One seed. Training resumes where it was cut off; what other calls measured stays.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path as File
from typing import Any

import torch

from apportion.deliver import deciding
from apportion.intake import read_model
from apportion.measure.quality import wilson
from apportion.network import Network
from apportion.train import Recipe, dense, fit
from apportion.vocab import Ladder
from bench import cifar, results, text

SIZES = {"three blocks": {"depth": 3}}
WAY = "checkpoints"  # of `bench text` that smaller networks are held against


def write(made: dict[str, Any]) -> None:
    """What was made now beside what stays."""
    file = results.FOLDER / "smaller.json"
    kept = {name: part for name, part in json.loads(file.read_text()).items() if name != "conditions"} if file.exists() else {}
    results.write("smaller", "python -m bench smaller --data FOLDER", {**kept, **made})


def main(data: File, runs: File) -> None:
    torch.set_num_threads(1)
    train, _, test = cifar.read(data)
    adaptive = json.loads((results.FOLDER / "cifar.json").read_text())["seeds"]
    whole = Network(cifar.ARCHITECTURE)
    full_macs, rows = whole.macs(whole.space.full), []
    for name, changed in SIZES.items():
        torch.manual_seed(0)
        network = Network(replace(cifar.ARCHITECTURE, **changed))
        macs = network.macs(network.space.full)
        epochs = (cifar.DENSE_EPOCHS + cifar.LONGER_EPOCHS) * full_macs / macs
        smoothing = cifar.RECIPE["label_smoothing"]
        recipe = Recipe(epochs=epochs, seed=0, **cifar.RECIPE)
        fit(network, cifar.tensors(train), dense(label_smoothing=smoothing), recipe=recipe, folder=runs / f"smaller-{name.replace(' ', '-')}")
        network.eval().requires_grad_(False)
        right = deciding.outcomes(network, Ladder((network.space.full,), 0), test, cifar.PREPROCESS).correct[:, 0]
        found = {"network": name, "gmacs": macs / 1e9, "share": macs / full_macs, "epochs": epochs, "accuracy": right.double().mean().item()}
        rows.append({**found, "interval": wilson(int(right.sum()), len(right))._asdict()})
        print(rows[-1], flush=True)
    ours = [{"seed": run["seed"], **{key: (at["gmacs_adaptive"], at["accuracy_adaptive"]) for key, at in run["budgets"].items()}} for run in adaptive]
    write({"smaller": rows, "adaptive": ours, "samples": len(test)})


def texts(data: File, model: File, runs: File, *, sets: Sequence[str], depths: Sequence[int] = ()) -> None:
    """`depths`: how many blocks; without, those about the mean of the adaptive network."""
    torch.set_num_threads(1)
    adaptive = json.loads((results.FOLDER / "text.json").read_text())["runs"]
    for name in sets:
        file = results.FOLDER / "smaller.json"
        kept: dict[str, Any] = json.loads(file.read_text()).get("texts", {}) if file.exists() else {}
        done = {row["blocks"]: row for row in kept.get(name, {}).get("smaller", [])}
        figures, spent = adaptive[name][WAY]["figures"], adaptive[name]["training_macs_over_dense_pass"]
        near = max(2, round(text_blocks(figures)))
        ours = {key: figures[key] for key in ("accuracy_dense", "accuracy_adaptive", "gmacs_dense", "gmacs_adaptive", "samples")}
        ours["frontier"] = adaptive[name][WAY]["frontier"]
        for depth in depths or (near, near - 1, near + 1):
            done[depth] = one(data / name, model, runs / name, text.ALLOWANCES[name], depth, spent)
            print(name, done[depth], flush=True)
            made = {"day": time.strftime("%Y-%m-%d"), "commit": results.commit(), "adaptive": ours, "smaller": [done[blocks] for blocks in sorted(done)]}
            write({"texts": kept | {name: made}})


def text_blocks(figures: dict[str, Any]) -> float:
    """How many of the six blocks the adaptive network runs on average, counted in multiply-adds."""
    return 6 * figures["gmacs_adaptive"] / figures["gmacs_dense"]


def one(data: File, model: File, runs: File, allowance: text.Allowance, depth: int, spent: float) -> dict[str, Any]:
    """The first `depth` blocks, taught on `spent` passes of the six for each text, and what they answer on the test texts."""
    source = read_model(model, length=allowance.length)
    parts = text.read_parts(data, source.tokenise, allowance)
    assert parts.teach is not None
    whole = text.classifier(source, len(parts.teach.classes))
    network = text.classifier(source, len(parts.teach.classes))
    network.blocks = network.blocks[:depth]
    network.architecture = replace(network.architecture, depth=depth)
    share = network.macs(network.space.full) / whole.macs(whole.space.full)
    epochs = spent / (3 * share)
    recipe = Recipe(epochs=epochs, learning_rate=allowance.rate, **text.SHARED)
    taught = text.memory(parts.teach, source.tokenise)
    fit(network, taught, dense(label_smoothing=text.LABEL_SMOOTHING), recipe=recipe, folder=runs / f"smaller-{depth}")
    network.eval().requires_grad_(False)
    right = deciding.outcomes(network, Ladder((network.space.full,), 0), parts.report, source.tokenise).correct[:, 0]
    interval = wilson(int(right.sum()), len(right))._asdict()
    return {"blocks": depth, "share": share, "epochs": epochs, "accuracy": right.double().mean().item(), "interval": interval}
