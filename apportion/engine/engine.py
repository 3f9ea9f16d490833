"""The engine: a table (path, bucket) -> graph, and the routing around it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, final

import torch
from torch import Tensor, nn

from apportion.engine.compile import Backend, Graph, build, check_backend, serving
from apportion.engine.route import fill, group, join, take
from apportion.errors import EngineError
from apportion.vocab import Answer, Tokens


@final
class Engine:
    """Decides a path for every sample and runs each on its own path, in graphs that were all built beforehand.

    `decide`: (inputs (b, ...), budget (), cap ()) -> (state, rung (b,) int64), where budget and cap are float32 scalars.
    `rungs[k]`: state -> logits (b, classes), the same classes on every rung. `gmacs`: (k,) per sample, controller included.
    `input_shape`, `dtype`: of one sample, without the batch; graphs are built on inputs that are all `fill`. The device is the one that the modules are on.
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
    ) -> None:
        check_backend(backend)
        if not rungs or gmacs.shape != (len(rungs),):
            raise EngineError(f"{len(rungs)} rungs with costs of shape {tuple(gmacs.shape)}", wanted="at least one rung, one cost for each", do="Measure each.")
        if not buckets or min(buckets) < 1 or list(buckets) != sorted(set(buckets)):
            raise EngineError(f"buckets {tuple(buckets)}", wanted="positive batch sizes, ascending", do="Use for example (1, 8, 32).")
        self._decide, self._rungs, self._gmacs = decide, tuple(rungs), gmacs
        self._backend: Backend = backend
        self._buckets, self._shape, self._dtype, self._fill = tuple(buckets), tuple(input_shape), dtype, fill
        tensors = chain.from_iterable(part for module in (decide, *rungs) for part in (module.parameters(), module.buffers()))
        self._device = next((tensor.device for tensor in tensors), torch.device("cpu"))
        self._graphs: dict[tuple[str, int], Graph] = {}

    @property
    def wanted(self) -> int:
        """How many graphs there are to build: the decision and every rung, at every bucket."""
        return (1 + len(self._rungs)) * len(self._buckets)

    def warm(self, progress: Callable[[str], None] | None = None) -> int:
        """Build every graph that is not built yet and return how many there are; `progress` hears of each before it is built. Raises EngineError."""
        if len(self._graphs) == self.wanted:
            return self.wanted
        classes: set[tuple[int, ...]] = set()
        with serving():
            for key, module, example in self._examples():
                if key not in self._graphs:
                    name = f"{key[0]}, batch {key[1]}"
                    if progress is not None:
                        progress(f"graph {len(self._graphs) + 1} of {self.wanted}: {name}")
                    self._graphs[key] = build(module, example, backend=self._backend, name=name)
                if module is not self._decide:
                    classes.add(tuple(self._graphs[key](*example).shape[1:]))
        if len(classes) != 1:
            self._graphs.clear()
            raise EngineError(f"rungs that answer in shapes {sorted(classes)}", wanted="one shape for all", do="Give every rung the same head.")
        return len(self._graphs)

    def __call__(self, inputs: Tensor, *, budget: float, cap: float = math.inf) -> Answer:
        """Answers for any number of samples, in order. Cost: one wait for the device, and per graph call a copy of its rows.

        `budget` and `cap` are handed to the decision as they are. Raises EngineError before `warm()` and for inputs of another shape, dtype or device.
        """
        with serving():
            return self._run(*self._choose(inputs, budget, cap))

    def forced(self, inputs: Tensor, rung: int) -> Answer:
        """Answers along one rung, whatever the decision says, which is made and paid for all the same: what a rung costs when it is measured."""
        with serving():
            state, index = self._choose(inputs, 1.0, math.inf)
            return self._run(state, torch.full_like(index, rung))

    def decided(self, inputs: Tensor, *, budget: float, cap: float = math.inf) -> Tensor:
        """The (b,) rungs alone: what a call would take, at the cost of the glance. Raises like a call."""
        with serving():
            return self._choose(inputs, budget, cap)[1]

    def _run(self, state: Tokens, index: Tensor) -> Answer:
        rows, logits = [], []
        for rung, members in group(index):
            if not 0 <= rung < len(self._rungs):
                raise EngineError(f"rung {rung} for sample {members[0]}", wanted=f"0 to {len(self._rungs) - 1}", do="Correct the decision.")
            for piece, real in fill(members, self._buckets):
                rows.append(piece[:real])
                logits.append(self._graphs[f"rung {rung}", len(piece)](take(state, piece))[:real])
        grouped = torch.cat(logits)
        ordered = torch.empty_like(grouped).index_copy_(0, torch.cat(rows).to(grouped.device), grouped)
        return Answer(ordered, index, self._gmacs.to(index.device)[index])

    def _choose(self, inputs: Tensor, budget: float, cap: float) -> tuple[Tokens, Tensor]:
        self._check(inputs, budget, cap)
        limits = self._limits(budget, cap)
        states, indices = [], []
        for piece, real in fill(range(len(inputs)), self._buckets):
            state, index = self._graphs["decide", len(piece)](inputs.index_select(0, piece.to(inputs.device)), *limits)
            states.append(Tokens(state.x[:real], state.size[:real], state.origin[:real], state.prefix))
            indices.append(index[:real])
        return join(states), torch.cat(indices)

    def _check(self, inputs: Tensor, budget: float, cap: float) -> None:
        if len(self._graphs) != self.wanted:
            raise EngineError(f"{len(self._graphs)} of {self.wanted} graphs built", wanted="all of them before the first call", do="Call warm() once.")
        found = (tuple(inputs.shape[1:]), inputs.dtype, inputs.device)
        if found != (self._shape, self._dtype, self._device) or not len(inputs):
            raise EngineError(
                f"inputs of shape {tuple(inputs.shape)}, {inputs.dtype}, on {inputs.device}",
                wanted=f"(b, {', '.join(map(str, self._shape))}) with b >= 1, {self._dtype}, on {self._device}",
                do="Resize or convert the inputs, or make an engine for this shape.",
            )
        if math.isnan(budget) or math.isnan(cap):
            raise EngineError(f"budget {budget} with cap {cap}", wanted="two numbers", do="State what may be spent.")

    def _limits(self, budget: float, cap: float) -> tuple[Tensor, Tensor]:
        return torch.tensor(budget, dtype=torch.float32, device=self._device), torch.tensor(cap, dtype=torch.float32, device=self._device)

    def _examples(self) -> Iterator[tuple[tuple[str, int], nn.Module, tuple[Any, ...]]]:
        """What to build, decisions first: their output is what the rungs are built with."""
        blank = torch.full((self._buckets[-1], *self._shape), self._fill, dtype=self._dtype, device=self._device)
        limits = self._limits(1.0, math.inf)
        for size in self._buckets:
            yield ("decide", size), self._decide, (blank[:size].contiguous(), *limits)
        state, _ = self._graphs["decide", len(blank)](blank, *limits)
        for size in self._buckets:
            for rung, module in enumerate(self._rungs):
                yield (f"rung {rung}", size), module, (take(state, torch.zeros(size, dtype=torch.int64)),)
