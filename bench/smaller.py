"""A smaller network trained alike: a dense network of about half the multiply-adds on CIFAR-10, given as many multiply-adds of training as the whole
adaptive one had (the dense network and its healing), beside the adaptive network at the same cost.

`python -m bench smaller --data FOLDER` wants FOLDER/cifar10.npz and the committed result of `python -m bench cifar`. One seed: what two seeds of this network
differ by is in that result. Training resumes where it was cut off.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path as File

import torch

from apportion.deliver import deciding
from apportion.measure.quality import wilson
from apportion.network import Network
from apportion.train import Recipe, dense, fit
from apportion.vocab import Ladder
from bench import cifar, results

SIZES = {"three blocks": {"depth": 3}}


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
    results.write("smaller", "python -m bench smaller --data FOLDER", {"smaller": rows, "adaptive": ours, "samples": len(test)})
