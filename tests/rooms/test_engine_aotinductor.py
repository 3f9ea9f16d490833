"""torch's compiler ahead of time: no copy of a weight anywhere, and the next start compiles nothing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from apportion.engine import build, serving
from apportion.engine.aotinductor import AOTInductor
from apportion.engine.exported import together
from apportion.errors import EngineError
from tests.rooms.test_engine_backends import along, equal


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """A piece of a network that merges tokens, inputs for it, its graph, and the folder that keeps it."""
    cache = tmp_path_factory.mktemp("aotinductor")
    with serving():
        module, example = along("merged")
        return module, example, build(module, example, backend="aotinductor", name="merged", cache=cache), cache


@pytest.mark.slow
def test_a_path_that_merges_agrees_with_eager(merged):
    module, example, graph, _ = merged
    with serving():
        equal(graph(*example), module(*example))


@pytest.mark.slow
def test_the_graph_looks_into_the_modules_own_weights(merged):
    module, _, graph, cache = merged
    own = {tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    held = [tensor for tensor in graph.stored.weights.values() if tensor.numel() > 1]
    assert held and all(tensor.data_ptr() in own for tensor in held) and graph.weight_bytes == 0
    large = nn.Linear(1024, 1024).eval().requires_grad_(False)
    kept = build(large, (torch.ones(1, 1024),), backend="aotinductor", name="large", cache=cache)
    assert kept.stored.file.stat().st_size < large.weight.nbytes / 2  # code alone
    with serving():
        before = kept(torch.ones(1, 1024))
        large.weight *= 2
        assert_close(kept(torch.ones(1, 1024)) - large.bias, 2 * (before - large.bias))


@pytest.mark.slow
def test_graphs_loaded_together_answer_alike_in_many_threads(merged):
    module, example, graph, _ = merged
    with serving():
        wanted = module(*example)
        first, second = together([graph, graph], [(example, wanted)] * 2)

    def call(k: int) -> None:
        with serving():
            equal((first, second)[k % 2](*example), wanted)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(call, range(40)))


def test_code_is_made_for_so_many_threads():
    before = torch.get_num_threads()
    try:
        versions = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            versions.append(AOTInductor().version)
    finally:
        torch.set_num_threads(before)
    assert versions[0] != versions[1] and torch.__version__ in versions[0]


def test_other_types_are_refused():
    with pytest.raises(EngineError, match=r"a in torch.float64 on cpu; wanted float32"):
        build(nn.Linear(2, 2).double(), (torch.ones(1, 2, dtype=torch.float64),), backend="aotinductor", name="a")
