"""Graphs by name and bucket: all built before the first call, none after, whoever does the routing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn

from apportion.engine.capture import pooled
from apportion.engine.exported import copied_bytes, resting, together
from apportion.engine.graph import ALONE, Backend, Graph, check_backend
from apportion.errors import EngineError

SPARE = 64 * 2**20
"""Bytes of weights that graphs may hold more than once. Where it would be more they run in one model that holds equal weights once: a call takes 0.01 to
0.06 ms longer there, which a network of that size does not feel."""


class Build(Protocol):
    """What makes a graph of a module and its example."""

    def __call__(self, module: nn.Module, example: tuple[Any, ...], /, *, backend: Backend, name: str) -> Graph: ...


def plain(module: nn.Module, example: tuple[Any, ...], /, *, backend: Backend, name: str) -> Graph:
    """The module itself, operator by operator: for whoever follows what a call does. It is not for serving: nothing is captured, and nothing sealed."""
    return Graph(module, 0)


def checked(buckets: Sequence[int], backend: Backend) -> tuple[int, ...]:
    """These batch sizes. Raises EngineError where they are not positive and ascending, or more than the back-end may run at once."""
    if not buckets or min(buckets) < 1 or list(buckets) != sorted(set(buckets)):
        raise EngineError(f"buckets {tuple(buckets)}", wanted="positive batch sizes, ascending", do="Use for example (1, 8, 32).")
    if backend in ALONE and tuple(buckets) != (1,):
        do = "Pass buckets=(1,): in larger batches an answer would depend on the samples beside it."
        raise EngineError(f"buckets {tuple(buckets)} for {backend!r}", wanted="one sample at a time", do=do)
    return tuple(buckets)


@final
class Table:
    """One graph for each module and bucket. `input_shape`, `dtype`: of one sample, without the batch; graphs are built on inputs that are all `fill`,
    for texts with the last third of them `padding`, so that whatever padding changes is compared too where a graph is compared.

    The device is the one that the modules are on. Raises EngineError for an unknown back-end or buckets that are not positive and ascending.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        *,
        buckets: Sequence[int],
        backend: Backend,
        input_shape: tuple[int, ...],
        dtype: torch.dtype,
        fill: int,
        padding: int | None = None,
        make: Build,
    ) -> None:
        check_backend(backend)
        self.buckets = checked(buckets, backend)
        self.modules, self._make = dict(modules), make
        self._backend: Backend = backend
        self._shape, self._dtype, self._fill, self._padding = tuple(input_shape), dtype, fill, padding
        tensors = chain.from_iterable(part for module in modules.values() for part in (module.parameters(), module.buffers()))
        self.device = next((tensor.device for tensor in tensors), torch.device("cpu"))
        self._graphs: dict[tuple[str, int], Graph] = {}
        self._seen: dict[tuple[str, int], tuple[tuple[Any, ...], Any]] = {}
        self._last: tuple[tuple[float, float], tuple[Tensor, Tensor]] = (1.0, math.inf), self._limits(1.0, math.inf)

    @property
    def wanted(self) -> int:
        """How many graphs there are to build."""
        return len(self.modules) * len(self.buckets)

    @property
    def built(self) -> int:
        """How many there are."""
        return len(self._graphs)

    @property
    def weight_bytes(self) -> int:
        """What the graphs built so far hold of weights beside the modules' own."""
        return sum(graph.weight_bytes for graph in self._graphs.values())

    @property
    def whole(self) -> bool:
        return len(self._graphs) == self.wanted and not self._seen

    def at(self, buckets: Sequence[int]) -> Table:
        """The same modules at other batch sizes: graphs of sizes that stay are taken along, the others are still to be built. Raises EngineError."""
        other = copy.copy(self)
        other.buckets = checked(buckets, self._backend)
        other._graphs, other._seen = {key: graph for key, graph in self._graphs.items() if key[1] in other.buckets}, {}
        return other

    def __getitem__(self, key: tuple[str, int]) -> Graph:
        return self._graphs[key]

    def add(self, name: str, example: tuple[Any, ...], size: int, progress: Callable[[str], None] | None) -> Any:
        """Build one graph, if it is not there yet, and what it gives for the example; `progress` hears of it before. Raises EngineError."""
        key = name, size
        if key not in self._graphs:
            text = f"{name}, batch {size}"
            if progress is not None:
                progress(f"graph {len(self._graphs) + 1} of {self.wanted}: {text}")
            self._graphs[key] = self._make(self.modules[name], example, backend=self._backend, name=text)
        answer = self._graphs[key](*example)
        self._seen[key] = example, answer
        if copied_bytes(self._graphs.values()) > SPARE:
            self._graphs |= {key: resting(self._graphs[key]) for key in self._seen}
        return answer

    def close(self, answers: set[tuple[int, ...]]) -> None:
        """After the last graph was added: where weights are large, all graphs share them.

        Raises EngineError, and forgets every graph, where the rungs do not all answer in one shape.
        """
        if len(answers) != 1:
            self._graphs.clear()
            self._seen.clear()
            raise EngineError(f"rungs that answer in shapes {sorted(answers)}", wanted="one shape for all", do="Give every rung the same head.")
        if copied_bytes(self._graphs.values()) > SPARE:
            self._graphs = dict(zip(self._seen, together([self._graphs[key] for key in self._seen], list(self._seen.values())), strict=True))
        self._graphs |= pooled(self._graphs)
        self._seen = {}  # not before: what could not be joined is not whole, and is not served

    def blank(self) -> Tensor:
        """Inputs for the largest bucket."""
        made = torch.full((self.buckets[-1], *self._shape), self._fill, dtype=self._dtype, device=self.device)
        if self._padding is not None:
            ids = made if made.ndim == 2 else made[:, 0]
            ids[:, -(ids.shape[1] // 3) or ids.shape[1] :] = self._padding
        return made

    def limits(self, budget: float, cap: float) -> tuple[Tensor, Tensor]:
        """Budget and cap as graphs take them, made once for as long as they stay the same. Raises EngineError for what is not a number."""
        last = self._last  # read once: another thread may write it
        if last[0] != (budget, cap):
            self._last = last = (budget, cap), self._limits(budget, cap)
        return last[1]

    def _limits(self, budget: float, cap: float) -> tuple[Tensor, Tensor]:
        if math.isnan(budget) or math.isnan(cap):
            raise EngineError(f"budget {budget} with cap {cap}", wanted="two numbers", do="State what may be spent.")
        return torch.tensor(budget, dtype=torch.float32, device=self.device), torch.tensor(cap, dtype=torch.float32, device=self.device)

    def check(self, inputs: Tensor) -> None:
        """Raises EngineError before all graphs are there, and for inputs of another shape, dtype or device."""
        if not self.whole:
            raise EngineError(
                f"{len(self._graphs)} of {self.wanted} graphs built",
                wanted="all of them, and warm() come to its end, before the first call",
                do="Call warm() once.",
            )
        if inputs.shape[1:] != self._shape or inputs.dtype != self._dtype or inputs.device != self.device or not len(inputs):
            raise EngineError(
                f"inputs of shape {tuple(inputs.shape)}, {inputs.dtype}, on {inputs.device}",
                wanted=f"(b, {', '.join(map(str, self._shape))}) with b >= 1, {self._dtype}, on {self.device}",
                do="Resize or convert the inputs, or make an engine for this shape.",
            )
