"""The one file that knows the compiler: a module and one example become one whole static graph, or an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx, nn
from torch._dynamo import lookup_backend
from torch._dynamo.exc import TorchDynamoException
from torch._inductor import config as inductor

from apportion.errors import EngineError

Backend = Literal["inductor", "eager"]
Graph = Callable[..., Any]


def check_backend(backend: str) -> None:
    """Raises EngineError where nothing here goes by that name."""
    if backend not in get_args(Backend):
        raise EngineError(f"backend {backend!r}", wanted=f"one of {get_args(Backend)}", do="Name one of these.")


@contextmanager
def serving() -> Iterator[None]:
    """The state in which graphs are built and run: no gradients, and no inference mode either, because tensors made in it fit no graph made outside."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def build(module: nn.Module, example: tuple[Any, ...], *, backend: Backend, name: str) -> Graph:
    """Compile `module` for the shapes, strides and types of `example`, run it once, and seal it.

    With "inductor" the weights are frozen: packed into the graph for speed, so each graph holds a copy and later changes of a weight are not seen.
    "eager" runs the captured graph operator by operator; it starts at once, keeps no copy, and is bound by the same rules.
    The module is put into eval mode. Call the result under `serving()`. Cost, for six blocks on two cores: 6 to 15 s with "inductor", 0.3 s with "eager".

    Raises EngineError for an unknown backend, for a module that is not exactly one graph, and, from the result, for a call that would need another graph.
    """
    check_backend(backend)
    compiler = lookup_backend(backend)
    graphs, sealed = 0, False

    def count(graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        if sealed:
            raise RuntimeError("the graph is sealed")
        graphs += 1
        return compiler(graph, inputs)

    def forward(*inputs: Any) -> Any:
        return module(*inputs)

    # The compiler's limits (8 and 256 graphs) count per code object; a code object for each graph keeps any number of modules of one class clear of both.
    own = FunctionType(forward.__code__.replace(co_name=name), globals(), name, None, forward.__closure__)
    compiled = torch.compile(own, backend=count, fullgraph=True, dynamic=False)

    def run(*inputs: Any) -> Any:
        try:
            return compiled(*inputs)
        except TorchDynamoException as error:
            raise _unbuilt(name) if sealed else _not_whole(name, str(error)) from error

    module.eval()
    with serving(), inductor.patch(freezing=backend == "inductor"):
        run(*example)
    if graphs != 1:
        raise _not_whole(name, f"{graphs} graphs came out")
    # Sealing, and not a "fail on recompile" stance around each call: a stance belongs to the whole process, and two threads would undo each other's.
    sealed = True
    return run


def _unbuilt(name: str) -> EngineError:
    return EngineError(
        f"a call that the graph of {name} was not built for",
        wanted="the shapes, strides and types of the build, under serving(), with the same number of threads, default dtype and autocast",
        do="Build it under the conditions in which it serves.",
    )


def _not_whole(name: str, why: str) -> EngineError:
    return EngineError(
        f"{name}, which does not compile ({' '.join(why.split())[:400]})",
        wanted="exactly one whole static graph",
        do="Keep its forward free of Python that depends on values, and check that the backend works on this machine.",
    )
