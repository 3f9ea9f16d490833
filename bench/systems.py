"""Every method of the shelf that cuts an axis, side by side on one trained DeiT-Tiny as it is: no healing, equal multiply-adds where the axis allows it.

`python -m bench systems --data FOLDER --model FILE.safetensors` wants FOLDER/imagenet_samples_1000. Units are sorted by importance on 128 pictures of the first
half; accuracy is on the 500 of the second. Times are operator by operator, all in the same rounds. What a method makes of healing is not shown here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path as File
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from apportion.engine import serving
from apportion.intake import read_images, read_model
from apportion.measure.latency import interleaved, ratio
from apportion.methods import card, ops
from apportion.methods.mix import mix
from apportion.methods.slots import Mixed
from apportion.network import Network, put, sort_by_importance
from apportion.vocab import Choice, Notes, Path, Tokens
from bench import results

BATCH, CALIBRATED = 8, 128
START = 3  # blocks that run in full before the first cut
COLOURS = {"tokens": "#0a6ebd", "width": "#c2591a", "heads": "#7b3fa0", "depth": "#2d8a4e"}


def lots(x: Tensor) -> Tensor:
    """An order of each sample's tokens (b, n) that is as good as drawn, and the same in every run."""
    seeds = x[..., 0].double() * 1e4
    return (seeds - seeds.floor()).argsort(1)


class Dropped(nn.Module):
    """The control: which tokens go is drawn for each picture by itself, or they are those of the same places in all pictures, evenly spread."""

    reduces = True

    def __init__(self, *, by_lot: bool) -> None:
        super().__init__()
        self.by_lot = by_lot

    def forward(self, tokens: Tokens, keep: int, mixed: Mixed, notes: Notes | None = None, real: Tensor | None = None) -> Tokens:
        n, prefix = tokens.x.shape[1], tokens.prefix
        if keep == n:
            return tokens
        order = (lots(tokens.x[:, prefix:]) if self.by_lot else spread(n - prefix, keep - prefix).expand(len(tokens.x), -1)) + prefix
        first = torch.arange(prefix).expand(len(order), -1)
        kept = torch.cat((first, order[:, : keep - prefix].sort(1).values), 1)
        gone = order[:, keep - prefix :]
        lost = tokens._replace(size=tokens.size.scatter(1, gone, 0.0))  # what goes leaves nothing behind
        return ops.reduce(lost, kept, gone, torch.full_like(gone, prefix))._replace(size=tokens.size.gather(1, kept))

    def macs(self, before: int, keep: int, prefix: int, mixed_heads: int) -> int:
        return 0


def spread(n: int, keep: int) -> Tensor:
    """All n places, `keep` evenly spread ones first."""
    stay = torch.arange(keep) * n // keep
    return torch.cat((stay, torch.ones(n).scatter(0, stay, 0).nonzero()[:, 0]))


def ways(model: File, pictures: Tensor) -> Iterator[tuple[str, str, Network, Path]]:
    """(method, axis, network, path), several paths of each method."""

    def read(*choices: Choice) -> Network:
        network = read_model(model, timm_name="deit_tiny_patch16_224").network.eval().requires_grad_(False)
        for choice in choices:
            put(network, choice)
        sort_by_importance(network, pictures.split(BATCH))
        return network

    for name in ("tome", "evit", "ats", "pyra", "random"):
        network = read(*(() if name == "random" else (Choice("reducer", name),)))
        if name == "random":
            for block in network.blocks:
                block.reducer = Dropped(by_lot=True)
        space = network.space
        for left in (0.75, 0.5):
            keep = space.prefix + round(left * (space.tokens - space.prefix))
            yield name, "tokens", network, space.path(tokens=(space.tokens,) * START + (keep,) * (space.depth - START))
        yield name, "tokens", network, space.path(tokens=space.merging(8))
    for name in ("matformer", "acm"):
        network = read(Choice("ffn", name))
        for width in network.space.width[-3:-1]:
            yield name, "width", network, network.space.path(width=(network.space.width[-1],) * START + (width,) * (network.space.depth - START))
        if name == "matformer":
            rising = mix(network.space.width, 12 - START, round(0.75 * (12 - START) * network.space.width[-1]))
            for label, widths in (("mix'n'match, rising", rising), ("mix'n'match, falling", rising[::-1])):
                yield label, "width", network, network.space.path(width=(network.space.width[-1],) * START + widths)
    network = read(Choice("mixer", "head_prefix"))
    yield "head_prefix", "heads", network, network.space.path(heads=(network.space.heads[-1],) * START + (network.space.heads[-2],) * 9)
    network = read(Choice("depth", "skip"))
    for gone in (1, 2, 3):
        yield "skip", "depth", network, network.space.path(blocks=[*range(5), *range(5 + gone, 12)])
    network = read(Choice("depth", "first"))
    for kept in (11, 10, 9):
        yield "first", "depth", network, network.space.path(blocks=range(kept))


def main(data: File, model: File, *, repeats: int = 7) -> None:
    images = read_images(data / "imagenet_samples_1000", split="all")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    source = read_model(model, timm_name="deit_tiny_patch16_224")
    pictures = torch.cat([x for x, _ in images.rows(order[:CALIBRATED]).batches(BATCH, source.preprocess)])
    batches = list(images.rows(order[len(images) // 2 :]).batches(50, source.preprocess))
    dense = source.network.eval().requires_grad_(False)
    calls: dict[str, nn.Module] = {"dense": dense.at(dense.space.full)}
    rows = [row("dense", "", "dense", dense, dense.space.full, batches)]
    with serving():
        for name, axis, network, path in ways(model, pictures):
            key = f"{name} {path.name}"
            calls[key] = network.at(path)
            rows.append(row(name, axis, key, network, path, batches))
            print(rows[-1], flush=True)
        times = interleaved({key: partial(call, pictures[:BATCH]) for key, call in calls.items()}, repeats=repeats)
    for found in rows:
        found["time_over_dense"] = ratio(times[found["key"]], times["dense"])._asdict()
    results.write("systems", "python -m bench systems --data FOLDER --model FILE", {"images": sum(len(y) for _, y in batches if y is not None), "ways": rows})
    draw(rows)


def row(name: str, axis: str, key: str, network: Network, path: Path, batches: list[Any]) -> dict[str, Any]:
    with serving():
        right = sum(int((network(x, path).argmax(-1) == y).sum()) for x, y in batches)
    slots = {"tokens": "reducer", "width": "ffn", "heads": "mixer", "depth": "depth"}
    known = axis and name not in ("random",) and "mix" not in name
    needs = card(slots[axis], name).needs if known else "nothing"
    return {
        "method": name,
        "axis": axis,
        "key": key,
        "needs": needs,
        "gmacs": network.macs(path) / 1e9,
        "accuracy": right / sum(len(y) for _, y in batches),
    }


def draw(rows: list[dict[str, Any]]) -> None:
    """Accuracy against multiply-adds and against time, as docs/systems.png."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    for place, (label, cost) in enumerate((("GMACs", lambda r: r["gmacs"]), ("time over dense, eager, batch 8", lambda r: r["time_over_dense"]["value"]))):
        for name in dict.fromkeys(found["method"] for found in rows):
            mine = sorted((found for found in rows if found["method"] == name), key=cost)
            style = {"color": COLOURS.get(mine[0]["axis"], "black"), "linestyle": ":" if name == "random" else "-", "linewidth": 1}
            axes[place].plot([cost(found) for found in mine], [100 * found["accuracy"] for found in mine], marker="o", markersize=4, **style)
            axes[place].annotate(name, (cost(mine[0]), 100 * mine[0]["accuracy"]), fontsize=7, xytext=(3, -8), textcoords="offset points")
        axes[place].set_xlabel(label)
        axes[place].grid(alpha=0.3)
    axes[0].set_ylabel("accuracy, % (500 pictures)")
    figure.tight_layout()
    figure.savefig(results.FOLDER.parent.parent / "docs" / "systems.png", dpi=110)


def draw_healed(figures: dict[str, Any]) -> None:
    """Accuracy against multiply-adds and against time, as docs/systems-healed.png: a colour for each axis, a marker for each way, dots for controls."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.5), sharey=True)
    for place, (cost, label) in enumerate((("gmacs", "GMACs"), ("ms", f"ms an image, eager, batch {figures['batch']}"))):
        for (name, axis, points), marker in zip(curves(figures["ways"], cost), itertools.cycle("o^vsDPX<>*"), strict=False):
            control = any(word in name for word in ("lot", "fixed places", "no gate", "dealt"))
            style = {"color": COLOURS.get(axis, "black"), "linestyle": ":" if control else "-", "linewidth": 2 if axis == "decides" else 0.8}
            axes[place].plot(*zip(*points, strict=True), marker=marker, markersize=5, label=name, **style)
        axes[place].plot(*zip(*((x, 100 * y) for x, y in figures["hull"][cost]), strict=True), color="grey", linestyle="--", label="static hull")
        axes[place].set_xlabel(label)
        axes[place].grid(alpha=0.3)
    for found in (found for found in figures["ways"] if "oracle" in found):
        at = found["oracle"]["gmacs"], 100 * found["oracle"]["accuracy"]
        axes[0].plot(*at, marker="*", color="grey", markersize=10)
        axes[0].annotate(f"{found['method']}, foresight", at, fontsize=7, xytext=(6, 3), textcoords="offset points")
    axes[0].set_ylabel(f"accuracy, % ({figures['tests']} images)")
    axes[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.tight_layout()
    figure.savefig(results.FOLDER.parent.parent / "docs" / "systems-healed.png", dpi=110)
    plt.close(figure)


def curves(ways: list[dict[str, Any]], cost: str) -> list[tuple[str, str, list[tuple[float, float]]]]:
    """(name, axis, points in order of cost): one for each method, each of its labels and each that decides."""
    grouped: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for found in ways:
        for row in found["rows"]:
            label = row["label"].rsplit(" ", 1)[0] if row["label"].startswith("mix") else row["label"]
            name = label or found["method"].split(" 0.")[0] + (", its paths" if found["method"] == "ours" else "")
            grouped.setdefault((name, found["axis"]), []).append((row[cost], 100 * row["accuracy"]))
        for row in found.get("adaptive", {}).get("rows", ()):
            grouped.setdefault((found["adaptive"]["method"], "decides"), []).append((row[cost], 100 * row["accuracy"]))
    return [(name, axis, sorted(points)) for (name, axis), points in grouped.items()]
