"""Graphs that would hold large weights many times run in one model that holds them once, and answer as they do by themselves."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import nn

from apportion.engine import Engine, build, serving
from apportion.engine import table as tables
from apportion.engine.exported import Stored, together
from apportion.errors import EngineError
from apportion.network import put
from apportion.vocab import Choice
from tests.conftest import shake, tiny

pytest.importorskip("openvino")
pytestmark = pytest.mark.slow
BUCKETS = (1, 4)


class Decide(nn.Module):
    def __init__(self, glance: nn.Module) -> None:
        super().__init__()
        self.glance = glance

    def forward(self, inputs, budget, cap):
        state = self.glance(inputs)[0]
        return state, (inputs.mean((1, 2, 3)) > 0).long() + (inputs[:, 0, 0, 0] > cap).long()


@pytest.fixture(scope="module")
def network():
    made = tiny("class_token")
    for choice in (Choice("reducer", "tome"), Choice("ffn", "matformer"), Choice("depth", "skip")):
        put(made, choice)
    shake(made)
    return made.eval().requires_grad_(False)


def engine(network, cache, buckets=BUCKETS) -> Engine:
    space = network.space
    paths = [space.path(blocks=(0, 1)), space.path(tokens=space.merging(3, start=1)), space.full]
    rungs = [network.segment(1, len(path.steps), path) for path in paths]
    parts = {"decide": Decide(network.glance(1)), "rungs": rungs, "gmacs": torch.tensor([1.0, 2.0, 3.0]), "buckets": buckets}
    return Engine(**parts, backend="openvino", input_shape=network.architecture.input_shape, make=partial(build, cache=cache))


@pytest.fixture(scope="module")
def both(network, tmp_path_factory):
    """The same engine with weights in every graph and with weights held once, and where their graphs are kept."""
    cache = tmp_path_factory.mktemp("graphs")
    apart, shared = engine(network, cache), engine(network, cache)
    assert apart.warm() == 8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "SPARE", 0)
        assert shared.warm() == 8
    return apart, shared, cache


def inputs(network, count, seed=0):
    return torch.randn(count, *network.architecture.input_shape, generator=torch.Generator().manual_seed(seed))


def same(found, wanted):
    assert torch.equal(found.path, wanted.path)
    torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-5, atol=1e-5)


def test_answers_are_those_of_graphs_by_themselves(network, both):
    apart, shared, _ = both
    x = inputs(network, 11)
    assert len(apart(x, budget=1.0).path.unique()) == 2
    same(shared(x, budget=1.0), apart(x, budget=1.0))
    for rung in range(3):
        for count in (1, 3, 4):
            same(shared.forced(x[:count], rung), apart.forced(x[:count], rung))


def test_answers_outlive_the_next_call(network, both):
    _, shared, _ = both
    first = shared.forced(inputs(network, 4), 2).logits
    before = first.clone()
    shared.forced(inputs(network, 4, seed=1), 2)
    assert torch.equal(first, before)


def test_weights_are_held_once(network, both):
    apart, shared, _ = both
    largest = max(tensor.nbytes for tensor in network.parameters())
    whole = sum(tensor.nbytes for tensor in network.parameters())
    assert largest > 4096 and 2.5 * shared.weight_bytes < apart.weight_bytes and shared.weight_bytes < 4 * whole  # small ones and pages around them count too


def test_in_several_threads(network, both):
    _, shared, _ = both
    x = inputs(network, 24)
    wanted = shared(x, budget=1.0).logits
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda k: shared(x[k : k + 3], budget=1.0).logits, range(0, 24, 3)))
    torch.testing.assert_close(torch.cat(found), wanted, rtol=1e-5, atol=1e-5)


def test_other_sizes_join_and_the_old_ones_go_on(network, both, monkeypatch):
    apart, shared, _ = both
    monkeypatch.setattr(tables, "SPARE", 0)
    more = shared.at((1, 2, 4))
    assert more.built == 8
    x = inputs(network, 7)
    before = shared(x, budget=1.0)
    assert more.warm() == 12
    same(more(x, budget=1.0), apart(x, budget=1.0))
    same(shared(x, budget=1.0), before)
    fewer = more.at((1,))
    assert fewer.warm() == fewer.built == 4
    same(fewer(x, budget=1.0), apart(x, budget=1.0))


def test_a_start_that_was_broken_off_goes_on(network, both, monkeypatch):
    apart, _, cache = both
    monkeypatch.setattr(tables, "SPARE", 0)
    it, heard = engine(network, cache), []

    def tell(text):
        heard.append(text)
        if len(heard) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        it.warm(tell)
    with pytest.raises(EngineError, match="of 8 graphs built"):
        it(inputs(network, 2), budget=1.0)
    assert it.warm(tell) == 8
    same(it(inputs(network, 9), budget=1.0), apart(inputs(network, 9), budget=1.0))


def test_what_could_not_be_joined_is_not_served(network, both, monkeypatch):
    apart, _, cache = both
    monkeypatch.setattr(tables, "SPARE", 0)
    it, x = engine(network, cache), inputs(network, 9)
    with monkeypatch.context() as patch:
        patch.setattr(tables, "together", lambda *_: (_ for _ in ()).throw(EngineError("a", wanted="b", do="c")))
        with pytest.raises(EngineError, match="found a"):
            it.warm()
        with pytest.raises(EngineError, match="8 of 8 graphs built"):
            it(x, budget=1.0)
    assert it.warm() == 8
    same(it(x, budget=1.0), apart(x, budget=1.0))


def test_what_answers_otherwise_than_by_itself_is_refused(network):
    module, x = network.at(network.space.full), inputs(network, 1)
    with serving():
        graph = build(module, (x,), backend="openvino", name="whole")
        with pytest.raises(EngineError, match="away from eager"):
            together([graph, graph], [((x,), module(x)), ((x,), 1.1 * module(x))])


def test_without_a_cache_the_file_goes_with_the_graph(network):
    graph = build(network.at(network.space.full), (inputs(network, 1),), backend="openvino", name="whole")
    assert isinstance(graph.stored, Stored)
    folder = graph.stored.file.parent
    assert folder.exists()
    del graph
    assert not folder.exists()
