"""A module and one example become one whole static graph, or an error; the one file that knows torch's compiler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path as File
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo import lookup_backend
from torch._dynamo.exc import TorchDynamoException
from torch._inductor import config as inductor

from apportion.engine.aotinductor import AOTInductor
from apportion.engine.capture import Pool, captured, check_cuda
from apportion.engine.exported import Runtime, exported
from apportion.engine.graph import Backend, Graph, check_backend, not_whole, serving, unbuilt
from apportion.engine.onnxruntime import Int8, OnnxRuntime
from apportion.engine.openvino import OpenVINO
from apportion.errors import NoEffect

RUNTIMES: dict[Backend, Callable[[], Runtime]] = {"aotinductor": AOTInductor, "openvino": OpenVINO, "onnxruntime": OnnxRuntime, "onnxruntime-int8": Int8}


def build(module: nn.Module, example: tuple[Any, ...], *, backend: Backend, name: str, cache: File | None = None) -> Graph:
    """Compile `module` for the shapes, strides and types of `example`, run it once, and seal it.

    With "inductor" the weights are frozen: packed into the graph for speed, so each graph holds a copy and later changes of a weight are not seen.
    "openvino" and "onnxruntime" hold a copy as well, and run in float32 on a CPU, "onnxruntime-int8" with products in 8 bits. "aotinductor" compiles as
    "inductor" does, packs nothing and looks into the module's own weights, of which a later change is seen. `cache` is a folder that keeps what these four
    converted for the next start.
    "cudagraphs" is "inductor" recorded as a CUDA graph: one launch for all kernels, on memory that stays where it is.
    "eager" runs the captured graph operator by operator; it starts at once, keeps no copy, and is bound by the same rules.
    The module is put into eval mode. Call the result under `serving()`. Cost, for six blocks on two cores: 6 to 15 s with "inductor", 0.3 s with "eager".

    Raises EngineError for an unknown or missing backend, for a module that is not exactly one graph, and, from the result, for a call that would need
    another graph; NoEffect for a cache that the back-end would not use (torch keeps no graph with frozen weights).
    """
    check_backend(backend)
    module.eval()
    if backend in RUNTIMES:
        return exported(module, example, runtime=RUNTIMES[backend](), name=name, cache=cache)
    if cache is not None:
        raise NoEffect(f"a cache for {backend!r}", wanted=f"one of {tuple(RUNTIMES)}", do="Leave the cache out, or choose one of these back-ends.")
    if backend == "cudagraphs":
        check_cuda(example, name)
        return captured(compiled(module, example, backend="inductor", name=name), example, name=name, pool=Pool())
    return compiled(module, example, backend=backend, name=name)


def compiled(module: nn.Module, example: tuple[Any, ...], *, backend: Backend, name: str) -> Graph:
    """`build` by torch's own compiler."""
    compiler = lookup_backend(backend)
    graphs, sealed, weight_bytes = 0, False, 0
    freezing = backend == "inductor"

    def count(graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        nonlocal graphs, weight_bytes
        if sealed:
            raise RuntimeError("the graph is sealed")
        graphs += 1
        if freezing:
            weights = {id(tensor): tensor.nbytes for tensor in (*module.parameters(), *module.buffers())}
            weight_bytes = sum(weights.get(key, 0) for key in {id(tensor) for tensor in (*graph.parameters(), *graph.buffers(), *inputs)})
        return compiler(graph, inputs)

    def forward(*inputs: Any) -> Any:
        return module(*inputs)

    # The compiler's limits (8 and 256 graphs) count per code object; a code object for each graph keeps any number of modules of one class clear of both.
    own = FunctionType(forward.__code__.replace(co_name=name), globals(), name, None, forward.__closure__)
    call = torch.compile(own, backend=count, fullgraph=True, dynamic=False)

    def run(*inputs: Any) -> Any:
        try:
            return call(*inputs)
        except TorchDynamoException as error:
            raise unbuilt(name) if sealed else not_whole(name, str(error)) from error

    with serving(), inductor.patch(freezing=freezing):
        run(*example)
    if graphs != 1:
        raise not_whole(name, f"{graphs} graphs came out")
    # Sealing, and not a "fail on recompile" stance around each call: a stance belongs to the whole process, and two threads would undo each other's.
    sealed = True
    return Graph(run, weight_bytes)


__all__ = ["Backend", "Graph", "build", "check_backend", "serving"]
