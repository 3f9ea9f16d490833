"""Pictures: a pretrained DeiT-Tiny fine-tuned by us on CIFAR-10, and the same network made adaptive on the same pictures, beside what else one could do.

`python -m bench tuned --data FOLDER --model FILE.safetensors` wants FOLDER/cifar10.npz and DeiT-Tiny's weights. Pictures are enlarged to 96 pixels, positions
resampled for them. Every tenth training picture of each class is held out to learn and place the controller; the test pictures are read once, at the end.
What the adaptive network is held against is the fine-tuned one that it was made from. Beside it: that one trained on for as many multiply-adds as healing took,
smaller networks (the first blocks of DeiT-Tiny) that had as many in all, other run times, INT8, and static cuts of the healed network, in one interleaved run.
One seed. Training resumes where it was cut off. `--ways` names what is to be placed and timed, all by default.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path as File
from typing import Any

import numpy as np
import torch
from PIL import Image

from apportion.deliver import deciding
from apportion.engine import Backend
from apportion.errors import ControlError
from apportion.intake import ImageSet, Parts, Preprocess, Source, read_model
from apportion.measure.quality import wilson
from apportion.network import Network, put
from apportion.train import Images, Recipe, dense, fit, sandwich
from apportion.vocab import Choice, Ladder, Path, Plan, Space
from bench import cifar, peers, results
from bench.plans import Way, compare

SIZE, GLANCE = 96, 2
MERGED = 2  # tokens merged in every block
SHARED = {"batch": 64, "warmup": 0.1, "ema": 0.998, "label_smoothing": 0.05, "crop_padding": 6, "flip": True}
DENSE_EPOCHS, RATE = 0.8, 3e-4
HEALING_EPOCHS, HEALING_RATE = 0.6, 2e-4
FEATURE_WEIGHT = 0.1
GLANCED = Plan(choices=(Choice("reducer", "tome"), Choice("depth", "skip")), glance=GLANCE, rungs=6, tolerance=0.3)
STOPS = replace(GLANCED, control="checkpoints")
BUCKETS = (1, 32)
WAYS = {
    "glance": Way(GLANCED, buckets=BUCKETS),
    "checkpoints": Way(STOPS, buckets=BUCKETS),
    "checkpoints in 8 bits": Way(STOPS, "onnxruntime-int8", (1,)),
}


def enlarged(images: ImageSet, feed: Preprocess) -> ImageSet:
    """The same pictures at the size that the network reads, once for all."""
    assert isinstance(images.images, np.ndarray)
    made = [np.asarray(feed.fit(Image.fromarray(image), Image.Resampling.BICUBIC)) for image in images.images]
    return replace(images, images=np.stack(made))


def classifier(source: Source, classes: int) -> Network:
    """The network that was read, with a fresh layer of classes."""
    torch.manual_seed(0)
    network = Network(replace(source.network.architecture, classes=classes))
    read = {name: value for name, value in source.network.state_dict().items() if not name.startswith("head.")}
    missing = network.load_state_dict(read, strict=False)
    assert not missing.unexpected_keys and all(name.startswith("head.") for name in missing.missing_keys), missing
    return network


def taught_paths(space: Space) -> list[Path]:
    """Every exit from the glance on; half of the tokens gone right after it; and half of those gone in the middle too."""
    movable, middle = space.tokens - space.prefix, space.depth // 2
    half, quarter = (space.prefix + movable // part for part in (2, 4))
    merged = [(half,) * (space.depth - GLANCE), (half,) * (middle - GLANCE) + (quarter,) * (space.depth - middle)]
    return [*(space.path(blocks=range(depth)) for depth in range(GLANCE, space.depth)), *(space.path(tokens=(space.tokens,) * GLANCE + cut) for cut in merged)]


def healing_macs(network: Network) -> float:
    """Multiply-adds of healing on one picture over those of the full path: teacher, full path, and the last two others after their parting, backwards twice."""
    space = network.space
    rest = sum(network.segment_macs(GLANCE, space.depth, path) for path in taught_paths(space)[-2:])
    full = network.macs(space.full)
    return (full + 3 * (full + rest)) / full


def learn(network: Network, taught: Images, epochs: float, folder: File, *, rate: float = RATE, seed: int = 0) -> Network:
    """The dense network taught from labels; a run that was cut off goes on."""
    recipe = Recipe(epochs=epochs, learning_rate=rate, seed=seed, **SHARED)
    fit(network, taught, dense(label_smoothing=SHARED["label_smoothing"]), recipe=recipe, folder=folder)
    return network.eval().requires_grad_(False)


def heal(begun: Network, taught: Images, folder: File) -> Network:
    """Methods into the slots of a copy; then full path and others learn from the labels and from the network as it was."""
    network = copy.deepcopy(begun).requires_grad_(True)
    for choice in GLANCED.choices:
        put(network, choice)
    paths = taught_paths(network.space)
    objective = sandwich(paths, extra=1, teacher=begun, feature_weight=FEATURE_WEIGHT, label_smoothing=SHARED["label_smoothing"])
    fit(network, taught, objective, recipe=Recipe(epochs=HEALING_EPOCHS, learning_rate=HEALING_RATE, seed=100, **SHARED), folder=folder)
    return network.eval().requires_grad_(False)


def shortened(source: Source, classes: int, blocks: int) -> Network:
    """The first blocks of the network that was read."""
    network = classifier(source, classes)
    network.blocks = network.blocks[:blocks]
    network.architecture = replace(network.architecture, depth=blocks)
    return network


def answers(network: Network, test: ImageSet, feed: Preprocess) -> dict[str, Any]:
    """Accuracy of the full path, with its 95 % interval."""
    right = deciding.outcomes(network, Ladder((network.space.full,), 0), test, feed).correct[:, 0]
    return {"accuracy": right.double().mean().item(), "interval": wilson(int(right.sum()), len(right))._asdict()}


def beside(
    dense: Network,
    longer: Network,
    network: Network,
    shorter: dict[int, Network],
    test: ImageSet,
    feed: Preprocess,
    runs: File,
    repeats: int,
    placed: Sequence[str],
) -> list[dict[str, Any]]:
    """Accuracy and time of every other way. Single precision answers alike on all run times, so each network is asked on OpenVINO alone."""
    merging = copy.deepcopy(dense)
    put(merging, Choice("reducer", "tome"))
    space = network.space
    half, quarter = taught_paths(space)[-2:]
    static: dict[str, tuple[Network, Path]] = {
        "dense": (dense, dense.space.full),
        "dense, trained on": (longer, longer.space.full),
        f"merging {MERGED} tokens in every block, not healed": (merging, merging.space.path(tokens=merging.space.merging(MERGED))),
        "half of the tokens from block 3, healed": (network, half),
        "half, then a quarter from block 7, healed": (network, quarter),
        **{f"{count} of 12 blocks, healed": (network, space.path(blocks=range(count))) for count in (6, 8, 10)},
        **{f"{count} blocks, trained alike": (each, each.space.full) for count, each in shorter.items()},
    }
    found: dict[str, peers.Peer] = {}
    for name, (it, path) in static.items():
        found[f"{name}, OpenVINO"] = peers.graphed(it.at(path), it.macs(path) / 1e9, "openvino", size=SIZE, batches=BUCKETS)
    whole = dense.macs(dense.space.full) / 1e9
    others: dict[str, Backend] = {"eager": "eager", "inductor": "inductor", "ONNX Runtime": "onnxruntime"}
    found |= {f"dense, {name}": peers.graphed(dense.at(dense.space.full), whole, it, size=SIZE, batches=BUCKETS) for name, it in others.items()}
    same = {f"dense, {name}": "dense, OpenVINO" for name in others}
    found["dense, ONNX Runtime, INT8"] = peers.graphed(dense.at(dense.space.full), whole, "onnxruntime-int8", size=SIZE, batches=BUCKETS)
    found["early exit that masks, OpenVINO"] = peers.graphed(peers.Masked(network, 8).eval(), whole, "openvino", size=SIZE, batches=BUCKETS)
    for name in placed:
        found[f"adaptive, {name}, {WAYS[name].backend}"] = peers.adaptive(runs / name, WAYS[name].backend, WAYS[name].buckets)
    return peers.weighed(found, test, feed, repeats, same)


def main(data: File, model: File, runs: File, *, repeats: int = 6, blocks: Sequence[int] = (), names: Sequence[str] = (), tests: int = 10_000) -> None:
    torch.set_num_threads(1)
    begin = time.monotonic()

    def tell(text: str) -> None:
        print(f"{time.monotonic() - begin:7.1f} s  {text}", flush=True)

    source = read_model(model, timm_name="deit_tiny_patch16_224", image_size=SIZE)
    feed = replace(source.preprocess, size=SIZE, crop=1.0)
    train, held, test = cifar.read(data)
    train, held, test = (enlarged(part, feed) for part in (train, held, test.rows(range(tests))))
    taught = Images(torch.from_numpy(train.images), train.labels, mean=feed.mean, std=feed.std)
    begun = learn(classifier(source, len(train.classes)), taught, DENSE_EPOCHS, runs / "dense")
    tell("fine-tuned; healing")
    network = heal(begun, taught, runs / "healed")
    spent = HEALING_EPOCHS * healing_macs(network) / 3
    tell(f"healed; the dense network goes on for {spent:.2f} epochs")
    longer = learn(copy.deepcopy(begun).requires_grad_(True), taught, spent, runs / "longer", rate=HEALING_RATE, seed=100)
    told = {"before": answers(begun, test, feed), "longer": answers(longer, test, feed), "healed": answers(network, test, feed)}
    tell(f"on test pictures: {told}")
    full, shorter, smaller = longer.macs(longer.space.full), dict[int, Network](), list[dict[str, Any]]()
    for count in blocks:
        short = shortened(source, len(train.classes), count)
        share = short.macs(short.space.full) / full
        shorter[count] = learn(short, taught, (DENSE_EPOCHS + spent) / share, runs / f"smaller-{count}")
        smaller.append({"blocks": count, "share": share, "epochs": (DENSE_EPOCHS + spent) / share, **answers(short, test, feed)})
        tell(f"smaller: {smaller[-1]}")
    found: dict[str, Any] = {}
    parts = Parts(None, *held.split(0.5), test)
    fed = replace(source, network=network, feed=feed, classes=train.classes, provenance={**source.provenance, "fine_tuned_on": "CIFAR-10"})
    for name, way in ((name, WAYS[name]) for name in names or WAYS):
        try:
            found |= compare({name: way}, network, begun, parts, fed, runs, repeats=repeats, tell=tell)
        except ControlError as error:
            found[name] = {"missed": str(error)}
            tell(f"missed: {error}")
    tell("beside what else one could do")
    placed = [name for name, way in found.items() if "missed" not in way]  # not what another call left in the folder
    others = beside(begun, longer, network, shorter, test, feed, runs, 2 * repeats, placed)
    recipe = {**SHARED, "dense_epochs": DENSE_EPOCHS, "rate": RATE, "healing_epochs": HEALING_EPOCHS, "healing_rate": HEALING_RATE, "longer_epochs": spent}
    results.write(
        "tuned",
        "python -m bench tuned --data FOLDER --model FILE",
        {
            "size": SIZE,
            "pictures": len(train),
            "images": len(test),
            "recipe": recipe,
            "runs": {"cifar10": found},
            "networks": told,
            "smaller": smaller,
            "peers": others,
        },
    )
