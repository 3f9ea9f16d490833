"""The engine: a table (path, bucket) -> graph, and the routing around it."""

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
from apportion.engine.route import fill, first, group, join, ordered, some, take, whole
from apportion.engine.table import Build, Table
from apportion.errors import EngineError
from apportion.vocab import Answer, Tokens


@final
class Engine:
    """Decides a path for every sample and runs each on its own path, in graphs that were all built beforehand.

    `decide`: (inputs (b, ...), budget (), cap ()) -> (state, rung (b,) int64), where budget and cap are float32 scalars.
    `rungs[k]`: state -> logits (b, classes), the same classes on every rung. `gmacs`: (k,) per sample, controller included.
    `make` builds the graphs. `input_shape`, `dtype`: of one sample, without the batch; graphs are built on inputs that are all `fill`,
    of texts a third `padding`.
    The device is the one that the modules are on.
    Memory of a call: the glance's states of its whole batch. Not for training: nothing here has a gradient.

    A sample's answer does not depend on its company, up to the rounding of a matrix product at another batch size
    (about 1e-6 in float32); only where a decision hangs on that last digit can the path differ.
    """

    def __init__(
        self,
        *,
        decide: nn.Module,
        rungs: Sequence[nn.Module],
        gmacs: Tensor,
        buckets: Sequence[int] = (1, 8, 32),
        backend: Backend = "inductor",
        input_shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        fill: int = 0,
        padding: int | None = None,
        make: Build = build,
    ) -> None:
        if not rungs or gmacs.shape != (len(rungs),):
            raise EngineError(f"{len(rungs)} rungs with costs of shape {tuple(gmacs.shape)}", wanted="at least one rung, one cost for each", do="Measure each.")
        modules = {"decide": decide, **{f"rung {k}": module for k, module in enumerate(rungs)}}
        self._rungs = len(rungs)
        self._table = Table(modules, buckets=buckets, backend=backend, input_shape=input_shape, dtype=dtype, fill=fill, padding=padding, make=make)
        self._gmacs = gmacs.to(self._table.device)
        self._traffic = Counter[int]()

    @property
    def wanted(self) -> int:
        """How many graphs there are to build: the decision and every rung, at every bucket."""
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
        """How often calls, not measurements, brought a group of each size: for `choose`. Calls in several threads at once may lose a count."""
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
            blank, limits = table.blank(), table.limits(1.0, math.inf)
            state = [table.add("decide", (blank[:size].contiguous(), *limits), size, progress) for size in table.buckets][-1][0]
            answers: set[tuple[int, ...]] = set()
            for size in table.buckets:
                example = take(state, torch.zeros(size, dtype=torch.int64))
                answers |= {tuple(table.add(f"rung {k}", (example,), size, progress).shape[1:]) for k in range(self._rungs)}
            table.close(answers)
        return table.wanted

    def at(self, buckets: Sequence[int]) -> Engine:
        """The same at other batch sizes: graphs of sizes that stay are taken along, the others are to be built by `warm`. Both count into one traffic."""
        other = copy.copy(self)
        other._table = self._table.at(buckets)
        return other

    def __call__(self, inputs: Tensor, *, budget: float, cap: float = math.inf) -> Answer:
        """Answers for any number of samples, in order. Cost: one wait for the device, and per graph call a copy of its rows.

        `budget` and `cap` are handed to the decision as they are. Raises EngineError before `warm()` and for inputs of another shape, dtype or device.
        """
        with serving():
            state, index = self._choose(inputs, budget, cap)
            groups = group(index)
            self._traffic.update((len(inputs), *(len(members) for _, members in groups)))
            return self._run(state, index, groups)

    def forced(self, inputs: Tensor, rung: int) -> Answer:
        """Answers along one rung, whatever the decision says, which is made and paid for all the same: what a rung costs when it is measured."""
        with serving():
            state, index = self._choose(inputs, 1.0, math.inf)
            return self._run(state, torch.full_like(index, rung), [(rung, list(range(len(inputs))))])

    def decided(self, inputs: Tensor, *, budget: float, cap: float = math.inf) -> Tensor:
        """The (b,) rungs alone: what a call would take, at the cost of the glance. Raises like a call."""
        with serving():
            return self._choose(inputs, budget, cap)[1]

    def _run(self, state: Tokens, index: Tensor, groups: list[tuple[int, list[int]]]) -> Answer:
        rows, logits = [], []
        for rung, members in groups:
            if not 0 <= rung < self._rungs:
                raise EngineError(f"rung {rung} for sample {members[0]}", wanted=f"0 to {self._rungs - 1}", do="Correct the decision.")
            for piece in fill(members, self._table.buckets, among=len(index)):
                found = self._table[f"rung {rung}", piece.size](take(state, piece.rows))
                rows.append(piece.rows if piece.rows is None else first(piece.rows, piece.real))
                logits.append(first(found, piece.real))
        return Answer(ordered(logits, rows), index, self._gmacs.index_select(0, index))

    def _choose(self, inputs: Tensor, budget: float, cap: float) -> tuple[Tokens, Tensor]:
        self._table.check(inputs)
        limits = self._table.limits(budget, cap)
        pieces = fill(range(len(inputs)), self._table.buckets, among=len(inputs))
        states, indices = zip(*(self._table["decide", piece.size](some(inputs, piece.rows), *limits) for piece in pieces), strict=True)
        real = [piece.real for piece in pieces]
        return join(states, real), whole(indices, real)
