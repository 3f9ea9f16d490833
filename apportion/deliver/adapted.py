"""The adaptive model as a user holds it: call it on images or texts, ask it what it costs, save it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path as File
from typing import Any, final

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from apportion.control import Cascade, Controller, Decider, Entry
from apportion.control.drift import Alarm
from apportion.deliver import bundle as disk
from apportion.deliver.bundle import Bundle
from apportion.deliver.costs import Ledger
from apportion.deliver.ranking import Tell, Wanted, best, silent
from apportion.deliver.retuning import Retuned, call_rows, chosen, spelled
from apportion.engine import RUNTIMES, Backend, Build, Engine, Lengths, Relay, Routed, build
from apportion.errors import BundleError, PlanError
from apportion.intake import Feed, Tokenise
from apportion.measure.doctor import fingerprint
from apportion.methods.task import sureness
from apportion.network import Network
from apportion.vocab import Answer, Budget, Ladder, Task, Tokens

BUCKETS = (1, 8, 32)
"""Batch sizes for graphs, where neither the call nor the bundle names any."""
Inputs = Tensor | np.ndarray | Sequence[Image.Image] | Sequence[str | File] | Sequence[tuple[str, str]] | Sequence[tuple[Any, int]]


@final
class Decide(nn.Module):
    """Glance and controller as one graph: (inputs, budget, cap) -> (the state after the glance, rung for each sample)."""

    def __init__(self, glance: nn.Module, controller: Controller | Entry) -> None:
        super().__init__()
        self.glance, self.controller = glance, controller

    def forward(self, inputs: Tensor, budget: Tensor, cap: Tensor) -> tuple[Tokens, Tensor]:
        tokens, signal = self.glance(inputs)
        return tokens, self.controller(signal, budget, cap)


@final
class Checkpoint(nn.Module):
    """A stretch of the full path and how sure its answer is, as one graph: inputs or tokens -> (tokens, logits, margin)."""

    def __init__(self, station: nn.Module, task: Task) -> None:
        super().__init__()
        self.station = station
        self.task: Task = task

    def forward(self, given: Tensor | Tokens) -> tuple[Tokens, Tensor, Tensor]:
        tokens, logits = self.station(given)
        return tokens, logits, sureness(logits, self.task)


def routed(
    network: Network,
    ladder: Ladder,
    controller: Decider,
    feed: Feed,
    gmacs: Mapping[int, Tensor],
    *,
    backend: Backend,
    buckets: Sequence[int],
    make: Build = build,
) -> Routed | Lengths:
    """The engine of these paths, its graphs still to be made; for texts one for each length in `gmacs`, which holds the rungs' costs (k,) by tokens at full."""
    a = network.architecture

    def engine(cost: Tensor, shape: tuple[int, ...], dtype: torch.dtype, fill: int = 0, padding: int | None = None) -> Routed:
        form = {
            "gmacs": cost.float(),
            "buckets": buckets,
            "backend": backend,
            "input_shape": shape,
            "dtype": dtype,
            "fill": fill,
            "padding": padding,
            "make": make,
        }
        if isinstance(controller, Cascade):
            exits = [0, *(len(path.steps) for path in ladder.paths)]
            stations = [Checkpoint(network.station(first, last), a.task) for first, last in pairwise(exits)]
            return Relay(stations=stations, limits=controller.thresholds_at, **form)
        decide = Decide(network.glance(ladder.glance), controller)
        rungs = [network.segment(ladder.glance, len(path.steps), path) for path in ladder.paths]
        return Engine(decide=decide, rungs=rungs, **form)

    if not isinstance(feed, Tokenise):
        return engine(gmacs[a.tokens], a.input_shape, torch.float32)
    word = int(feed.padding == 0)  # any that is not the padding
    engines = {length: engine(cost, (2, length) if feed.pairs else (length,), torch.int64, word, feed.padding) for length, cost in gmacs.items()}
    return Lengths(engines, padding=feed.padding)


@dataclass(frozen=True, slots=True)
class Place:
    """One point of the frontier: a served path that every input takes, or the controller at a budget."""

    name: str
    gmacs: float
    accuracy: float
    latency_ms: float | None  # at batch 1 on this device; None where it was not measured here


@final
class Adapted:
    """A trained network that gives each input the compute it needs.

    `model(images)` takes uint8 pictures (an array (n, rows, columns, 3) or a list of PIL images), or a float tensor (n, 3, side, side) that has been
    preprocessed already. A model of texts takes a list of them, or of pairs where it learned from pairs, or their tokens as the tokeniser makes them; a model
    of sound a list of files or of (samples, rate), or the features made of them; a model of rows a list of mappings; a model of series a list of arrays
    (channels, points), or one array of all.
    The first call builds every graph, unless `warm` did; none is built after that.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        backend: Backend = "inductor",
        buckets: Sequence[int] | None = None,
        engine: Routed | Lengths | None = None,
        cache: File | None = None,
    ) -> None:
        """`buckets`: batch sizes to build graphs for; without them the bundle's own, or where it has none BUCKETS. `engine`: one that was built for this very
        bundle and these sizes and is to be used again. `cache`: a folder that keeps converted graphs for the next start."""
        self.bundle, self.buckets = bundle, tuple(buckets or bundle.buckets or BUCKETS)
        self.backend: Backend = backend
        self.ledger = Ledger.of(bundle)
        self.engine = engine or self.built(backend, make=partial(build, cache=cache))

    def built(self, backend: Backend, *, make: Build = build) -> Routed | Lengths:
        """A fresh engine of this bundle, its graphs still to be made."""
        bundle, ledger = self.bundle, self.ledger
        gmacs = dict(zip(ledger.lengths, ledger.rungs, strict=True))
        return routed(bundle.network, bundle.ladder, bundle.controller, bundle.preprocess, gmacs, backend=backend, buckets=self.buckets, make=make)

    def warm(self, progress: Callable[[str], None] | None = None) -> int:
        """Build every graph; returns how many there are."""
        return self.engine.warm(progress)

    def retune(
        self, *, sizes: int | None = None, largest: int | None = None, traffic: Mapping[int, float] | None = None, worth: float = 0.03, tell: Tell = silent
    ) -> Retuned:
        """Choose the batch sizes anew from the groups that calls brought (`engine.traffic`), and build graphs for them while requests are answered.

        At most `sizes` of them (without it as many as now), none above `largest` (without it the largest now, so that the peak of memory stays): larger
        groups come in pieces of it. `traffic`: other groups than those counted, size -> how often. What they cost is counted in rows and calls; how many rows
        a call is worth is read from the bundle's times of this device, where it has them. Sizes stay where others save less than `worth` of that cost.

        Graphs of sizes that stay are kept. The new ones are all there before the first call sees any; calls that have begun end on the old ones. `save`
        keeps the choice. Cost: the builds (`engine.build`), and both sets in memory meanwhile. Not for two threads at once.
        Raises EngineError where no group was counted.
        """
        self.warm(tell)
        old, before = self.engine, self.buckets
        sizes, largest = len(before) if sizes is None else sizes, max(before) if largest is None else largest
        call = call_rows(self.bundle.costs.get(fingerprint()), self.backend)
        found = chosen(old.traffic if traffic is None else traffic, before, sizes=sizes, largest=largest, call=call)
        fits = len(before) <= sizes and max(before) <= largest
        if found.after == before or (fits and found.saved < worth):
            tell(f"batch sizes stay {spelled(before)}: {found.promise}")
            return replace(found, after=before, saved=0.0, kept=old.built)
        tell(f"batch sizes {spelled(found.after)} in place of {spelled(before)}: {found.promise}")
        new = old.at(found.after)
        kept = new.built
        new.warm(tell)
        self.engine, self.buckets, self.bundle = new, found.after, replace(self.bundle, buckets=found.after)
        return replace(found, kept=kept, built=new.built - kept)

    def __call__(self, images: Inputs, budget: str | float | Budget | None = None) -> Answer:
        """Answers, path and cost (GMACs) for each image, at the bundle's operating point or at `budget`. Raises PlanError for a budget out of reach."""
        engine = self.engine  # one for the whole call, whatever `retune` puts in its place meanwhile
        engine.warm()
        inputs = images if isinstance(images, Tensor) else self.bundle.preprocess(images)  # pyright: ignore[reportArgumentType]
        if not isinstance(engine, Lengths):
            mean, cap = self.shares(budget)
            return engine(inputs, budget=mean, cap=cap)
        present = engine.places(inputs).unique().tolist()
        shares = {place: self.shares(budget, place) for place in present}
        caps = [shares[place][1] if place in shares else float("inf") for place in range(len(self.ledger.lengths))]
        return engine(inputs, budget=min((mean for mean, _ in shares.values()), default=1.0), cap=caps)

    def shares(self, budget: str | float | Budget | None, place: int = 0) -> tuple[float, float]:
        """A budget as (mean, cap), both shares of the full path's cost; of a text, of one of the length at this place in the ledger.

        A mean in GMACs or ms is that of texts as the bundle was measured on. Raises PlanError where not even the cheapest path fits.
        """
        if budget is None:
            return self.bundle.budget, float("inf")
        wanted = Budget.parse(budget)
        rungs = self.ledger.rungs[place].tolist() if wanted.cap else [rung.gmacs for rung in self.bundle.rungs]
        share, cheapest = self._share(wanted, rungs[-1]), rungs[0] / rungs[-1]
        if share < cheapest:
            raise PlanError(f"budget {budget}", wanted=f"at least {cheapest:.3f}x, the cheapest path", do="Raise the budget.")
        if not wanted.cap:
            return min(share, 1.0), float("inf")
        # The controller knows costs without its own, to single precision: its cap is the dearest path within the true one.
        within = next((place for place, gmacs in enumerate(rungs) if gmacs / rungs[-1] > share), len(rungs))
        return 1.0, float(self.bundle.controller.cost[within - 1])

    def _share(self, budget: Budget, full: float) -> float:
        if budget.unit == "x":
            return budget.amount
        if budget.unit == "gmacs":
            return budget.amount / full
        if budget.cap and isinstance(self.engine, Lengths):
            raise PlanError("a cap in ms for texts", wanted="a cap in x or GMACs", do="Times were measured over texts of all lengths: state a mean in ms.")
        times = self.latency_ms(1)
        if times is None:
            raise BundleError(
                f"a budget in ms and no times of this device ({fingerprint()})", wanted="a table measured here", do="Run `apportion bench DIR` on this device."
            )
        costs = [rung.gmacs / self.bundle.rungs[-1].gmacs for rung in self.bundle.rungs]
        times = np.maximum.accumulate(times)  # a cheaper path that is slower here must not hide behind a dearer one
        if budget.amount < times[0]:
            raise PlanError(f"budget {budget.amount} ms", wanted=f"at least {times[0]:.3f} ms, the cheapest path", do="Raise the budget.")
        return float(np.interp(budget.amount, times, costs))

    def watch(self, alarm: Alarm, budget: str | float | Budget | None = None) -> Watched:
        """This model at one budget, with every path taken told to an alarm: `Alarm.start(model(familiar).path, rungs=...)`. Raises PlanError."""
        rungs = len(self.bundle.ladder.paths)
        if len(alarm.seen) != rungs:
            raise PlanError(f"an alarm on {len(alarm.seen)} rungs", wanted=f"{rungs}, one for each path", do="Start it on choices of this very model.")
        return Watched(self, alarm, budget)

    def latency_ms(self, batch: int) -> list[float] | None:
        """Milliseconds per input of every rung on this device at this batch size; None where it was not measured here."""
        table = self.bundle.costs.get(fingerprint())
        return None if table is None else table["rungs_ms"].get(str(batch))

    def frontier(self) -> list[Place]:
        """Every served path by itself, cheapest first, then the controller at its budgets."""
        bundle, times = self.bundle, self.latency_ms(1)
        paths = [
            Place(path.name, rung.gmacs, rung.accuracy, None if times is None else times[k])
            for k, (path, rung) in enumerate(zip(bundle.ladder.paths, bundle.rungs, strict=True))
        ]
        ours = []
        for point in bundle.frontier:
            ms = None if times is None else float(np.dot(point["share"], times))
            ours.append(Place(f"controller at {point['budget']:.2f}x", point["cost"] * bundle.rungs[-1].gmacs, point["accuracy"], ms))
        return paths + ours

    def save(self, folder: str | os.PathLike[str], *, extra: Mapping[str, str] | None = None) -> None:
        """Write the bundle; `extra` are more files of text for it, by name."""
        disk.save(self.bundle, File(folder), extra=extra)


@final
class Watched:
    """A model whose choices a drift alarm counts, outside its graphs: it answers as before, and says nothing unless it is asked.

    For inputs in the order in which they arrive, not in several threads at once. Cost: that of `Alarm.after`, on the host, behind each answer.
    """

    def __init__(self, model: Adapted, alarm: Alarm, budget: str | float | Budget | None) -> None:
        self.model, self.alarm, self.budget = model, alarm, budget

    def __call__(self, inputs: Inputs) -> Answer:
        answer = self.model(inputs, self.budget)
        self.alarm = self.alarm.after(answer.path.cpu())
        return answer

    @property
    def drifted(self) -> bool:
        """Whether the alarm has rung: `alarm.raised_at` says after how many inputs, `alarm.level` how near it is."""
        return self.alarm.raised_at is not None


def load(
    folder: str | os.PathLike[str],
    *,
    backend: Wanted = "inductor",
    buckets: Sequence[int] | None = None,
    cache: str | os.PathLike[str] | None = None,
    tell: Tell = silent,
) -> Adapted:
    """The model that `Adapted.save` wrote. `cache`: a folder in which OpenVINO and ONNX Runtime keep what they converted, so that the next start is quick.

    `backend="auto"` takes the one that was fastest on this device when the bundle was measured here, or else measures them now, which builds the full path
    by each of them at two batch sizes; `tell` hears why. Where the fastest has no use for the cache, there is none, and `tell` hears that.
    Raises BundleError where the bundle is not whole, and NoEffect for a cache with a back-end that was named and would not use it.
    """
    bundle, where = disk.load(File(folder)), None if cache is None else File(cache)
    if backend == "auto":
        backend = best(bundle, batch=max(buckets or bundle.buckets or BUCKETS), tell=tell)
        if where is not None and backend not in RUNTIMES:
            tell(f"no cache: {backend} keeps no converted graphs")
            where = None
    return Adapted(bundle, backend=backend, buckets=buckets, cache=where)


__all__ = ["Adapted", "Decide", "Place", "Watched", "load"]
