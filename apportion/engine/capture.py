"""CUDA graphs: the kernels of a compiled graph recorded once and from then on launched by one call, all of them in one pool of memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any, Protocol, final

import torch
from torch import Tensor

from apportion.engine.exported import refilled, sealed, tensors_of
from apportion.engine.graph import Graph
from apportion.errors import EngineError

WARM = 3  # runs before a recording, in which libraries take the memory that they keep


class Recorder(Protocol):
    """Does what `run` does once and gives what does it again, and the answer: it lies where each replay puts it, and where another graph's may write too."""

    def __call__(self, run: Callable[[], Any], pool: Any) -> tuple[Callable[[], None], Any]: ...


def on_cuda(run: Callable[[], Any], pool: Any) -> tuple[Callable[[], None], Any]:
    """Recorded by CUDA on a stream of its own, temporary memory from `pool`."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        answer = run()
    return graph.replay, answer


@final
class Pool:
    """Memory that recordings share. They write into each other's, so one runs at a time, and its answer is copied before the next one may."""

    def __init__(self, record: Recorder = on_cuda) -> None:
        self.record, self.lock = record, Lock()
        self.handle = torch.cuda.graph_pool_handle() if record is on_cuda else None


@final
@dataclass(frozen=True, slots=True)
class Recording:
    """What a graph was recorded from, and where it lies now."""

    graph: Graph
    example: tuple[Any, ...]
    name: str
    pool: Pool


def captured(graph: Graph, example: tuple[Any, ...], *, name: str, pool: Pool) -> Graph:
    """The same graph as a recording, sealed."""
    inputs = [tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors_of(example)]
    replay, answer = pool.record(partial(graph.run, *refilled(example, iter(inputs))), pool.handle)

    def call(tensors: Sequence[Tensor]) -> list[Tensor]:
        with pool.lock:
            for own, tensor in zip(inputs, tensors, strict=True):
                own.copy_(tensor, non_blocking=True)
            replay()
            return [tensor.clone() for tensor in tensors_of(answer)]

    return Graph(sealed(call, example, answer, name), graph.weight_bytes, recording=Recording(graph, example, name, pool))


def pooled(graphs: Mapping[tuple[str, int], Graph]) -> dict[tuple[str, int], Graph]:
    """Those that are recordings, by name and batch, recorded once more in one pool: the largest first, in whose memory the smaller ones find room."""
    found = [(key, graph.recording) for key, graph in sorted(graphs.items(), key=lambda item: -item[0][1]) if graph.recording is not None]
    if not found:
        return {}
    pool = Pool(found[0][1].pool.record)
    return {key: captured(known.graph, known.example, name=known.name, pool=pool) for key, known in found}


def check_cuda(example: tuple[Any, ...], name: str) -> None:
    """Raises EngineError where an input is anywhere else."""
    devices = sorted({str(tensor.device) for tensor in tensors_of(example) if tensor.device.type != "cuda"})
    if devices:
        raise EngineError(f"{name} on {', '.join(devices)}", wanted="a CUDA device", do="Move the network there, or choose another back-end.")
