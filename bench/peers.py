"""What else one could do with a trained DeiT-Tiny, in one interleaved run: other run times, INT8, static cuts, merging at a fixed rate, exits that mask.

`python -m bench peers --data FOLDER --model FILE.safetensors` wants FOLDER/imagenet_samples_1000 and, for the adaptive network, the bundles of
`python -m bench deit` under `--runs`. Accuracy is on the 500 images that the bundles report on; each figure is of the very call that is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path as File
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

import apportion
from apportion.engine import Backend, build, serving
from apportion.intake import ImageSet, Preprocess, read_images, read_model
from apportion.measure.latency import interleaved, ratio, realisation_ratio
from apportion.network import Network, put
from apportion.vocab import Choice
from bench import results

BATCHES = (1, 8)
RATE = 8  # tokens merged in every block, as in the token merging paper's DeiT runs
EXIT = 9  # the block after which the exits look
SURE = 0.9


class Peer(NamedTuple):
    """One way to run the network: calls by batch size, multiply-adds as its authors would count them, and how the images are answered."""

    calls: dict[int, Callable[[Tensor], Any]]
    gmacs: float
    answer: Callable[[Tensor], Tensor]


@final
class Masked(nn.Module):
    """An early exit as it is often published: every block runs on every sample, and those that are sure at the exit are given that answer."""

    def __init__(self, network: Network, exit: int = EXIT) -> None:
        super().__init__()
        self.network, space = network, network.space
        self.start, self.rest = space.full.steps[:exit], space.full.steps[exit:]

    def forward(self, inputs: Tensor) -> Tensor:
        tokens = self.network.run(self.network.tokeniser(inputs, self.network.space.patch), self.start)
        early, late = self.network.finish(tokens), self.network.finish(self.network.run(tokens, self.rest))
        return torch.where(early.softmax(-1).amax(-1, keepdim=True) > SURE, early, late)


def main(data: File, model: File, runs: File, *, repeats: int = 15) -> None:
    images = read_images(data / "imagenet_samples_1000", split="all")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    report = images.rows(order[len(images) // 2 :])
    source = read_model(model, timm_name="deit_tiny_patch16_224")
    dense = source.network.eval().requires_grad_(False)
    merging = read_model(model, timm_name="deit_tiny_patch16_224").network.eval().requires_grad_(False)
    put(merging, Choice("reducer", "tome"))
    put(merging, Choice("depth", "skip"))
    peers = made(dense, merging, runs)
    found = weighed(peers, report, source.preprocess, repeats)
    results.write("peers", "python -m bench peers --data FOLDER --model FILE", {"images": len(report), "peers": found})


def made(dense: Network, merging: Network, runs: File) -> dict[str, Peer]:
    space, full = merging.space, dense.space.full
    half = space.prefix + (space.tokens - space.prefix) // 2
    static = {
        "merging 8 tokens in every block": space.path(tokens=space.merging(RATE)),
        "half of the tokens from block 3": space.path(tokens=(space.tokens,) * 3 + (half,) * (space.depth - 3)),
        "9 of 12 blocks": space.path(blocks=range(9)),
    }
    macs = dense.macs(full) / 1e9
    peers = {"dense, eager": graphed(dense.at(full), macs, "eager")}
    backends: dict[str, Backend] = {"dense, inductor": "inductor", "dense, OpenVINO": "openvino", "dense, ONNX Runtime": "onnxruntime"}
    peers |= {name: graphed(dense.at(full), macs, backend) for name, backend in backends.items()}
    peers["dense, ONNX Runtime, INT8"] = graphed(dense.at(full), macs, "onnxruntime-int8")
    peers |= {f"{name}, inductor": graphed(merging.at(path), merging.macs(path) / 1e9, "inductor") for name, path in static.items()}
    peers |= {f"{name}, OpenVINO": graphed(merging.at(path), merging.macs(path) / 1e9, "openvino") for name, path in static.items()}
    peers["early exit that masks, inductor"] = graphed(Masked(merging).eval(), macs, "inductor")
    for run in ("training-free", "healed"):
        for backend in ("inductor", "openvino"):
            peers[f"adaptive, {run}, {backend}"] = adaptive(runs / run, backend)
    return peers


def graphed(module: nn.Module, gmacs: float, backend: Backend, *, size: int = 224, batches: Sequence[int] = BATCHES) -> Peer:
    graphs = {batch: build(module, (torch.zeros(batch, 3, size, size),), backend=backend, name=f"peer {batch}") for batch in batches}
    return Peer(dict(graphs), gmacs, graphs[batches[-1]])


def adaptive(folder: File, backend: Backend, batches: Sequence[int] = BATCHES) -> Peer:
    """A bundle, every input on its own path."""
    adapted = apportion.load(folder, backend=backend, buckets=tuple(batches))
    adapted.warm(lambda text: print(f"{folder.name}, {backend}: {text}", flush=True))
    return Peer(dict.fromkeys(batches, adapted), float("nan"), lambda x: adapted(x).logits)


def weighed(peers: dict[str, Peer], report: ImageSet, preprocess: Preprocess, repeats: int, same: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Accuracy of every peer, then all of them timed in the same rounds. `same`: who answers as whom, in single precision, and is not asked again."""
    rows: dict[str, dict[str, Any]] = {}
    with serving():
        for name, peer in peers.items():
            rows[name] = {"peer": name, **(answered(name, peer, report, preprocess) if name not in (same or {}) else {})}
            print(rows[name], flush=True)
        for name, whose in (same or {}).items():
            rows[name] |= {"accuracy": rows[whose]["accuracy"], "gmacs": rows[whose]["gmacs"], "answers_of": whose}
        for batch in sorted({batch for peer in peers.values() for batch in peer.calls}):
            able = [name for name, peer in peers.items() if batch in peer.calls]
            # Different images in every round: an adaptive network takes a different path for each.
            rounds = {name: iter(range(10**9)) for name in able}
            inputs = torch.cat([x for x, _ in report.rows(range(64)).batches(64, preprocess)])

            def call(name: str, batch: int = batch, inputs: Tensor = inputs, rounds: dict[str, Any] = rounds) -> None:
                start = (next(rounds[name]) * batch) % len(inputs)
                peers[name].calls[batch](inputs[start : start + batch])

            times = interleaved({name: partial(call, name) for name in able}, repeats=repeats)
            for name, timing in times.items():
                over = ratio(timing, times["dense, inductor"])
                rows[name][f"batch {batch}"] = {"ms": timing.median_ms / batch, "over_dense_inductor": over._asdict()}
                like = "dense, OpenVINO" if "openvino" in name.lower() else "dense, inductor"
                if rows[name]["gmacs"] < 0.999 * rows[like]["gmacs"]:
                    saved = realisation_ratio(times[like].median_ms, timing.median_ms, rows[like]["gmacs"], rows[name]["gmacs"])
                    rows[name][f"batch {batch}"]["realisation"] = saved
    return list(rows.values())


def answered(name: str, peer: Peer, report: ImageSet, preprocess: Preprocess) -> dict[str, float]:
    """Share of right answers, by the very calls that are timed, and the mean multiply-adds that they took."""
    right, spent, batch = 0, 0.0, max(peer.calls)
    for inputs, labels in report.batches(batch, preprocess):
        padded = torch.cat([inputs, inputs[-1:].expand(batch - len(inputs), -1, -1, -1)])
        right += int((peer.answer(padded)[: len(inputs)].argmax(-1) == labels).sum())
        if name.startswith("adaptive"):
            spent += float(peer.calls[batch](inputs).cost.sum())
    return {"accuracy": right / len(report), "gmacs": spent / len(report) if spent else peer.gmacs}
