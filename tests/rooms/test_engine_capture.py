"""Recordings in one pool of memory: on a CPU with a recorder that behaves as CUDA's does, at its worst; on a GPU with CUDA's own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from apportion.engine import Engine, build, serving
from apportion.engine.capture import Pool, captured, pooled
from apportion.engine.exported import refilled, tensors_of
from apportion.engine.graph import Graph
from apportion.errors import EngineError
from tests.conftest import PLAN, images, tiny
from tests.rooms.test_engine_backends import State, Toy, equal, toy_inputs
from tests.rooms.test_engine_engine import Decide, Rung, samples


class Shared:
    """A recorder on a CPU. Every replay overwrites what all others have answered: a pool in which nothing is where it was."""

    def __init__(self) -> None:
        self.answers: list[Tensor] = []
        self.sizes: list[int] = []

    def __call__(self, run: Callable[[], Any], pool: Any) -> tuple[Callable[[], None], Any]:
        found = tensors_of(run())
        own = [tensor.clone() for tensor in found]
        self.answers += own
        self.sizes.append(len(found[0]))

        def replay() -> None:
            for tensor in self.answers:
                tensor.fill_(-1 if tensor.dtype == torch.int64 else float("nan"))
            for place, tensor in zip(own, tensors_of(run()), strict=True):
                place.copy_(tensor)

        return replay, refilled(run(), iter(own))


def recorded(shared: Shared) -> Callable[..., Graph]:
    """`build`, as the back-end "cudagraphs" is made of it."""

    def make(module: nn.Module, example: tuple[Any, ...], /, *, backend: str, name: str) -> Graph:
        return captured(build(module, example, backend="eager", name=name), example, name=name, pool=Pool(shared))

    return make


def test_answers_outlive_what_other_recordings_do():
    shared, module, other = Shared(), Toy(), Toy(scale=2.0)
    pool = Pool(shared)
    with serving():
        one, two = (captured(build(it, toy_inputs(), backend="eager", name="a"), toy_inputs(), name="a", pool=pool) for it in (module, other))
        first, second = one(*toy_inputs(seed=1)), two(*toy_inputs(seed=2))
        equal(first, module(*toy_inputs(seed=1)))
        equal(second, other(*toy_inputs(seed=2)))
        assert isinstance(first[0], State)


def test_threads_take_turns():
    module = Toy()
    with serving():
        graph = captured(build(module, toy_inputs(), backend="eager", name="a"), toy_inputs(), name="a", pool=Pool(Shared()))

    def call(seed: int) -> None:
        with serving():
            equal(graph(*toy_inputs(seed=seed)), module(*toy_inputs(seed=seed)))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(call, range(60)))


def test_another_call_is_refused_and_inputs_are_not_touched():
    with serving():
        example = toy_inputs()
        graph = captured(build(Toy(), example, backend="eager", name="toy"), example, name="toy", pool=Pool(Shared()))
        state, budget = toy_inputs(seed=1)
        before = state.x.clone()
        graph(state, budget)
        assert torch.equal(state.x, before) and torch.equal(example[0].x, toy_inputs()[0].x)
        with pytest.raises(EngineError, match="toy was not built for"):
            graph(state._replace(x=state.x[:1], place=state.place[:1]), budget)


def test_an_engine_records_into_one_pool_the_largest_first():
    torch.manual_seed(0)
    shared = Shared()
    parts: dict[str, Any] = {"decide": Decide(), "rungs": [Rung(1), Rung(2)], "gmacs": torch.tensor([1.0, 2.0]), "buckets": (2, 8), "input_shape": (5, 8)}
    ours, eager = Engine(**parts, backend="eager", make=recorded(shared)), Engine(**parts, backend="eager")
    assert ours.warm() == eager.warm() == 6
    assert shared.sizes[6:] == sorted(shared.sizes[6:], reverse=True) and len(shared.sizes) == 12
    assert len({id(graph.recording.pool) for graph in ours._table._graphs.values()}) == 1
    for count in (9, 2, 8):
        equal(ours(samples(count), budget=0.2), eager(samples(count), budget=0.2))


def test_without_a_gpu_it_is_refused_before_anything_is_compiled():
    with pytest.raises(EngineError, match="rung 3 on cpu; wanted a CUDA device"):
        build(nn.Linear(2, 2), (torch.ones(1, 2),), backend="cudagraphs", name="rung 3")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_recordings_in_one_pool_answer_as_eager_does():
    network = tiny("class_token", *PLAN).cuda()
    paths = {"full": network.space.full, "short": network.space.path(blocks=range(2))}
    inputs = {size: images(size).cuda() for size in (1, 8)}
    with serving():
        alone = {(name, size): build(network.at(path), (x,), backend="cudagraphs", name=name) for name, path in paths.items() for size, x in inputs.items()}
        shared = pooled(alone)
        found = {key: graph(inputs[key[1]]) for key, graph in (*shared.items(), *reversed(shared.items()))}
        assert len(found) == 4
        for (name, size), logits in found.items():
            assert_close(logits, network(inputs[size], paths[name]), rtol=1e-3, atol=1e-3)
