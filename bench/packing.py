"""Texts of different lengths, all along the full path: padded to the longest of the batch, by graphs for lengths, and packed into rows.

`python -m bench packing --data FOLDER --model MODEL` wants FOLDER/sst2 and FOLDER/newsgroups20 (train.jsonl with "text") and the folder of all-MiniLM-L6-v2.
Every way has the same batch buckets and the same back-end, by default none: the modules operator by operator, at the shapes that graphs would have. Lengths
are chosen on half of the texts and timed on the other. All ways are timed in the same rounds; each is first held against every text by itself.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path as File
from typing import Any, final

import torch
from torch import Tensor

from apportion.engine import Backend, Build, Graph, Packs, build, choose_lengths, cut, lengths, plain, serving, used
from apportion.engine.route import fill, some
from apportion.intake import Source, read_model
from apportion.measure.latency import interleaved, ratio
from apportion.network import Network
from apportion.network.packed import Packed
from bench import results

BUCKETS = (1, 8, 32)
MOST = 1500  # texts read of each set
BATCHES = 2  # timed


@dataclass(frozen=True, slots=True)
class Load:
    """Batches of so many texts of each set, at most `length` tokens long; `slots` texts to a packed row."""

    counts: dict[str, int]
    length: int
    slots: int


LOADS = {"short": Load({"sst2": 32}, 64, 8), "long": Load({"newsgroups20": 8}, 256, 8), "mixed": Load({"sst2": 24, "newsgroups20": 8}, 256, 16)}


@final
class ByLength:
    """The full path in a graph for each length and batch size, as `engine.Lengths` routes texts, without a decision."""

    def __init__(self, network: Network, sizes: Sequence[int], padding: int, backend: Backend, make: Build) -> None:
        self.sizes, self.padding = tuple(sizes), padding
        at = network.at(network.space.full)
        self.graphs: dict[tuple[int, int], Graph] = {
            (n, b): make(at, (torch.full((b, n), padding + 1),), backend=backend, name=f"{n} tokens, batch {b}") for n in sizes for b in BUCKETS
        }

    def parts(self, inputs: Tensor) -> Iterator[tuple[int, Tensor, Tensor, int]]:
        place = torch.searchsorted(torch.tensor(self.sizes), used(inputs, self.padding))
        for number, length in enumerate(self.sizes):
            rows = (place == number).nonzero()[:, 0]
            if len(rows):
                mine = cut(inputs[rows], length, self.padding)
                for piece in fill(range(len(rows)), BUCKETS, among=len(rows)):
                    yield length, some(mine, piece.rows), rows if piece.rows is None else rows[piece.rows[: piece.real]], piece.real

    def tokens_run(self, inputs: Tensor) -> int:
        return sum(length * len(mine) for length, mine, _, _ in self.parts(inputs))

    def __call__(self, inputs: Tensor) -> Tensor:
        found = [(rows, self.graphs[length, len(mine)](mine)[:real]) for length, mine, rows, real in self.parts(inputs)]
        return torch.cat([part for _, part in found])[torch.cat([rows for rows, _ in found]).argsort()]


def texts(data: File, name: str, tokenise: Callable[[list[str]], Tensor], padding: int) -> list[Tensor]:
    """The first texts of a set as tokens, without padding."""
    with (data / name / "train.jsonl").open() as file:
        rows = [text for text in (json.loads(line)["text"] for line, _ in zip(file, range(MOST), strict=False)) if text.strip()]
    inputs = tokenise(rows)
    return [row[:n] for row, n in zip(inputs, used(inputs, padding).tolist(), strict=True)]


def batches(load: Load, found: dict[str, list[Tensor]], padding: int, count: int, seed: int) -> list[Tensor]:
    draw, made = random.Random(seed), []
    for _ in range(count):
        some = [text[: load.length] for name, many in load.counts.items() for text in draw.sample(found[name], many)]
        made.append(torch.nn.utils.rnn.pad_sequence(some, batch_first=True, padding_value=padding))
    return made


def one(source: Source, load: Load, seen: dict[str, list[Tensor]], asked: dict[str, list[Tensor]], backend: Backend | None, repeats: int) -> dict[str, Any]:
    network, padding = source.network.eval().requires_grad_(False), source.tokenise.padding
    full, make, named = network.space.full, plain if backend is None else build, backend or "eager"
    traffic = Counter(n for inputs in batches(load, seen, padding, 60, 0) for n in used(inputs, padding).tolist())
    doubled = lengths(load.length)
    chosen = choose_lengths(traffic, at_most=len(doubled), longest=load.length)
    by = {"lengths, doubled": ByLength(network, doubled, padding, named, make), "lengths, chosen": ByLength(network, chosen, padding, named, make)}
    packed = Packs(Packed(network, full, slots=load.slots), length=load.length, slots=load.slots, padding=padding, backend=named, make=make)
    graphs = {"padded": 0, **{name: len(way.graphs) for name, way in by.items()}, "packed": packed.warm()}
    at, many = network.at(full), batches(load, asked, padding, BATCHES, 1)
    ways: dict[str, Callable[[Tensor], Tensor]] = {"padded": at, **by, "packed": packed}
    run = {"padded": sum(inputs.numel() for inputs in many), **{name: sum(map(way.tokens_run, many)) for name, way in by.items()}}
    run["packed"] = sum(map(packed.tokens_run, many))
    with serving():
        alone = [torch.cat([at(row[None, :n]) for row, n in zip(inputs, used(inputs, padding).tolist(), strict=True)]) for inputs in many]
        off = {name: max(float((way(inputs) - wanted).abs().max()) for inputs, wanted in zip(many, alone, strict=True)) for name, way in ways.items()}
        times = interleaved({name: partial(each, way, many) for name, way in ways.items()}, repeats=repeats, warmup=1)
    real = sum(int(used(inputs, padding).sum()) for inputs in many)
    rows = {
        name: {
            "graphs": graphs[name],
            "tokens_run": run[name],
            "padding": 1 - real / run[name],
            "off_alone": off[name],
            "median_ms": times[name].median_ms / len(many),
            "time_over_padded": ratio(times[name], times["padded"])._asdict(),
            "time_over_doubled": ratio(times[name], times["lengths, doubled"])._asdict(),
        }
        for name in ways
    }
    return {"length": load.length, "texts": load.counts, "tokens": real, "doubled": doubled, "chosen": chosen, "slots": load.slots, "ways": rows}


def each(way: Callable[[Tensor], Tensor], many: list[Tensor]) -> None:
    for inputs in many:
        way(inputs)


def main(data: File, model: File, *, backend: Backend | None = None, repeats: int = 5) -> None:
    found = {}
    for name, load in LOADS.items():
        source = read_model(model, length=load.length)
        every = {part: texts(data, part, source.tokenise, source.tokenise.padding) for part in load.counts}
        seen, asked = ({part: rows[start::2] for part, rows in every.items()} for start in (0, 1))
        found[name] = one(source, load, seen, asked, backend, repeats)
        print(name, json.dumps(found[name], indent=1), flush=True)
    results.write("packing", "python -m bench packing --data FOLDER --model MODEL", {"backend": backend, "buckets": BUCKETS, "loads": found})
