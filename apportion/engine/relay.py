"""Rungs that build on each other, run in turn: at each checkpoint whoever is sure leaves, and the others are gathered and go on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor, nn

from apportion.engine.compile import build
from apportion.engine.graph import Backend, serving
from apportion.engine.route import fill, join, take
from apportion.engine.table import Build, Table
from apportion.errors import EngineError
from apportion.vocab import Answer, Tokens


@final
class Relay:
    """An engine for exits: what one rung did is what the next begins with, and the answer at each says whether to go on.

    `stations[0]`: (inputs (b, ...), budget (), cap ()) -> (state, logits (b, classes), leaves (b,) bool); those between take a state for the inputs; the last
    gives (state, logits). `gmacs`: (k,) per sample, answers on the way included. Else as `Engine`, whose laws hold here too. When a
    batch goes on in part it is gathered anew, so graphs of small buckets matter. Cost beside the graphs: one wait for the device at each checkpoint.
    """

    def __init__(
        self,
        *,
        stations: Sequence[nn.Module],
        gmacs: Tensor,
        buckets: Sequence[int] = (1, 8, 32),
        backend: Backend = "inductor",
        input_shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        fill: int = 0,
        make: Build = build,
    ) -> None:
        if len(stations) < 2 or gmacs.shape != (len(stations),):
            found = f"{len(stations)} stations with costs of shape {tuple(gmacs.shape)}"
            raise EngineError(found, wanted="at least two, one cost for each", do="Measure each.")
        self._last, self._gmacs = len(stations) - 1, gmacs
        modules = {f"station {k}": module for k, module in enumerate(stations)}
        self._table = Table(modules, buckets=buckets, backend=backend, input_shape=input_shape, dtype=dtype, fill=fill, make=make)

    @property
    def wanted(self) -> int:
        """How many graphs there are to build: every station at every bucket."""
        return self._table.wanted

    def warm(self, progress: Callable[[str], None] | None = None) -> int:
        """Build every graph that is not built yet and return how many there are; `progress` hears of each before it is built. Raises EngineError."""
        table = self._table
        if table.whole:
            return table.wanted
        with serving():
            given, answers = table.blank(), set[tuple[int, ...]]()
            for station in range(self._last + 1):
                rows = [torch.zeros(size, dtype=torch.int64) for size in table.buckets]
                found = [table.add(f"station {station}", self._example(given, row, station, 1.0, math.inf), len(row), progress) for row in rows]
                given, logits = found[-1][:2]
                answers.add(tuple(logits.shape[1:]))
        table.same_shape(answers)
        return table.wanted

    def __call__(self, inputs: Tensor, *, budget: float, cap: float = math.inf) -> Answer:
        """Answers for any number of samples, in order. Raises EngineError before `warm()` and for inputs of another shape, dtype or device."""
        return self._run(inputs, budget, cap, None)

    def forced(self, inputs: Tensor, rung: int) -> Answer:
        """Answers of one rung, by way of every checkpoint before it: what a rung costs when it is measured. Raises EngineError for a rung that is not there."""
        if not 0 <= rung <= self._last:
            raise EngineError(f"rung {rung}", wanted=f"0 to {self._last}", do="Name one of these.")
        return self._run(inputs, 1.0, math.inf, rung)

    def decided(self, inputs: Tensor, *, budget: float, cap: float = math.inf) -> Tensor:
        """The (b,) rungs alone; here they are known only when the answer is."""
        return self._run(inputs, budget, cap, None).path

    def _run(self, inputs: Tensor, budget: float, cap: float, until: int | None) -> Answer:
        self._table.check(inputs)
        alive, given = torch.arange(len(inputs)), inputs
        rows, logits, path = [], [], torch.empty(len(inputs), dtype=torch.int64)
        with serving():
            for station in range(self._last + 1):
                given, said, leaves = self._station(given, station, budget, cap)
                leaves = torch.full_like(leaves, station == until) if until is not None and station < self._last else leaves
                rows.append(alive[leaves])
                logits.append(said[leaves.to(said.device)])
                path[alive[leaves]] = station
                stay = (~leaves).nonzero()[:, 0]
                if not len(stay):
                    break
                alive, given = alive[stay], take(given, stay)
            grouped = torch.cat(logits)
            ordered = torch.empty_like(grouped).index_copy_(0, torch.cat(rows).to(grouped.device), grouped)
        path = path.to(ordered.device)
        return Answer(ordered, path, self._gmacs.to(path.device)[path])

    def _station(self, given: Tensor | Tokens, station: int, budget: float, cap: float) -> tuple[Tokens, Tensor, Tensor]:
        """State, answer and who leaves, on the host, after one station."""
        found = []
        for piece, real in fill(range(len(given if isinstance(given, Tensor) else given.x)), self._table.buckets):
            state, logits, *leaves = self._table[f"station {station}", len(piece)](*self._example(given, piece, station, budget, cap))
            kept = Tokens(state.x[:real], state.size[:real], state.origin[:real], state.prefix)
            found.append((kept, logits[:real], leaves[0][:real] if leaves else torch.ones(real, dtype=torch.bool)))
        states, answers, who = zip(*found, strict=True)
        return join(states), torch.cat(answers), torch.cat(who).cpu()

    def _example(self, given: Tensor | Tokens, rows: Tensor, station: int, budget: float, cap: float) -> tuple[Tensor | Tokens, ...]:
        """What a station is called with, for these rows."""
        part = given.index_select(0, rows.to(given.device)) if isinstance(given, Tensor) else take(given, rows)
        return (part,) if station == self._last else (part, *self._table.limits(budget, cap))
