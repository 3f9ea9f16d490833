"""Rungs that build on each other, run in turn: at each checkpoint whoever is sure leaves, and the others are gathered and go on."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor, nn

from apportion.engine.compile import build
from apportion.engine.graph import Backend, serving
from apportion.engine.route import fill, join, ordered, some, take, whole
from apportion.engine.table import Build, Table
from apportion.errors import EngineError
from apportion.vocab import Answer, Tokens


@final
class Relay:
    """An engine for exits: what one rung did is what the next begins with, and the answer at each says whether to go on.

    `stations[0]`: inputs (b, ...) -> (state, logits (b, classes), sureness (b,)); the others take a state for the inputs. `limits`: (budget, cap) -> the
    sureness from which on a sample leaves at each station but the last. `gmacs`: (k,) per sample, answers on the way included. Else as `Engine`, whose laws
    hold here too. When a batch goes on in part it is gathered anew, so graphs of small buckets matter. Cost beside the graphs: one wait for the device at
    each checkpoint. No threshold is in a graph: others can be had without building anything.
    """

    def __init__(
        self,
        *,
        stations: Sequence[nn.Module],
        limits: Callable[[float, float], Sequence[float]],
        gmacs: Tensor,
        buckets: Sequence[int] = (1, 8, 32),
        backend: Backend = "inductor",
        input_shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        fill: int = 0,
        padding: int | None = None,
        make: Build = build,
    ) -> None:
        if len(stations) < 2 or gmacs.shape != (len(stations),):
            found = f"{len(stations)} stations with costs of shape {tuple(gmacs.shape)}"
            raise EngineError(found, wanted="at least two, one cost for each", do="Measure each.")
        self._last, self._gmacs, self._limits = len(stations) - 1, gmacs, limits
        modules = {f"station {k}": module for k, module in enumerate(stations)}
        self._table = Table(modules, buckets=buckets, backend=backend, input_shape=input_shape, dtype=dtype, fill=fill, padding=padding, make=make)
        self._traffic = Counter[int]()

    @property
    def wanted(self) -> int:
        """How many graphs there are to build: every station at every bucket."""
        return self._table.wanted

    @property
    def built(self) -> int:
        """How many of them there are."""
        return self._table.built

    @property
    def weight_bytes(self) -> int:
        """What its graphs hold of weights beside the modules' own."""
        return self._table.weight_bytes

    @property
    def traffic(self) -> Counter[int]:
        """How often calls, not measurements, brought a group of each size to a station. Calls in several threads at once may lose a count."""
        return self._traffic.copy()

    def forget(self) -> None:
        """Count traffic anew."""
        self._traffic.clear()

    def warm(self, progress: Callable[[str], None] | None = None) -> int:
        """Build every graph that is not built yet and return how many there are; `progress` hears of each before it is built. Raises EngineError."""
        table = self._table
        if table.whole:
            return table.wanted
        with serving():
            given, answers = table.blank(), set[tuple[int, ...]]()
            for station in range(self._last + 1):
                rows = [torch.zeros(size, dtype=torch.int64) for size in table.buckets]
                found = [table.add(f"station {station}", (_rows(given, row),), len(row), progress) for row in rows]
                given, logits = found[-1][:2]
                answers.add(tuple(logits.shape[1:]))
            table.close(answers)
        return table.wanted

    def at(self, buckets: Sequence[int]) -> Relay:
        """The same at other batch sizes: graphs of sizes that stay are taken along, the others are to be built by `warm`. Both count into one traffic."""
        other = copy.copy(self)
        other._table = self._table.at(buckets)
        return other

    def __call__(self, inputs: Tensor, *, budget: float, cap: float = math.inf) -> Answer:
        """Answers for any number of samples, in order. Raises EngineError before `warm()` and for inputs of another shape, dtype or device."""
        answer = self._run(inputs, self._thresholds(budget, cap))
        came = torch.bincount(answer.path).flip(0).cumsum(0)  # who leaves at a station was at all before it
        self._traffic.update(came.tolist())
        return answer

    def forced(self, inputs: Tensor, rung: int) -> Answer:
        """Answers of one rung, by way of every checkpoint before it: what a rung costs when it is measured. Raises EngineError for a rung that is not there."""
        if not 0 <= rung <= self._last:
            raise EngineError(f"rung {rung}", wanted=f"0 to {self._last}", do="Name one of these.")
        return self._run(inputs, [-math.inf if station == rung else math.inf for station in range(self._last)])

    def decided(self, inputs: Tensor, *, budget: float, cap: float = math.inf) -> Tensor:
        """The (b,) rungs alone; here they are known only when the answer is."""
        return self._run(inputs, self._thresholds(budget, cap)).path

    def every(self, inputs: Tensor) -> Tensor:
        """The answers of all rungs, (b, k, classes): what tables are made of where only the graphs themselves can say what they answer."""
        self._table.check(inputs)
        given, found = inputs, []
        with serving():
            for station in range(self._last + 1):
                given, logits, _ = self._station(given, station)
                found.append(logits)
        return torch.stack(found, 1)

    def _thresholds(self, budget: float, cap: float) -> Sequence[float]:
        if math.isnan(budget) or math.isnan(cap):
            raise EngineError(f"budget {budget} with cap {cap}", wanted="two numbers", do="State what may be spent.")
        return self._limits(budget, cap)

    def _run(self, inputs: Tensor, thresholds: Sequence[float]) -> Answer:
        self._table.check(inputs)
        alive, given = torch.arange(len(inputs)), inputs
        rows, logits, path = [], [], torch.full((len(inputs),), self._last)
        with serving():
            for station, limit in enumerate([*thresholds, None]):
                given, said, sure = self._station(given, station)
                leaves = torch.ones_like(sure, dtype=torch.bool) if limit is None else sure >= limit
                stay = (~leaves).nonzero()[:, 0]
                if len(stay) < len(leaves):
                    rows.append(alive[leaves])
                    logits.append(said if not len(stay) else said[leaves.to(said.device)])
                    path[rows[-1]] = station
                if not len(stay):
                    break
                if len(stay) < len(leaves):
                    alive, given = alive[stay], take(given, stay)
            answers = logits[0] if len(logits) == 1 else ordered(logits, rows)
        path = path.to(answers.device)
        return Answer(answers, path, self._gmacs.to(path.device).index_select(0, path))

    def _station(self, given: Tensor | Tokens, station: int) -> tuple[Tokens, Tensor, Tensor]:
        """State, answer and, on the host, how sure of it, after one station."""
        many = len(given if isinstance(given, Tensor) else given.x)
        pieces = fill(range(many), self._table.buckets, among=many)
        states, answers, sure = zip(*(self._table[f"station {station}", piece.size](_rows(given, piece.rows)) for piece in pieces), strict=True)
        real = [piece.real for piece in pieces]
        return join(states, real), whole(answers, real), whole(sure, real).cpu()


def _rows(given: Tensor | Tokens, rows: Tensor | None) -> Tensor | Tokens:
    return some(given, rows) if isinstance(given, Tensor) else take(given, rows)
