"""Run times other than torch's: the same answers as eager, or an error that names what is wrong."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils import _pytree as pytree

from apportion.engine import COARSE, Engine, build, serving
from apportion.engine.compile import RUNTIMES
from apportion.engine.exported import Flat, Loaded, capture, digest
from apportion.engine.table import Table
from apportion.errors import EngineError, NoEffect
from apportion.network import Architecture, Network, put
from apportion.vocab import Choice
from tests.conftest import PLAN, images, shake, tiny
from tests.rooms.test_engine_engine import Decide, Rung, samples

pytest.importorskip("openvino")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
EXACT = [name for name in RUNTIMES if name not in COARSE]  # what rounds is held in tests/test_checkpoints.py
both = pytest.mark.parametrize("backend", [name for name in EXACT if name != "aotinductor"])  # which runs torch's own code, and takes long to build


class State(NamedTuple):
    x: Tensor
    place: Tensor
    prefix: int


class Toy(nn.Module):
    """A state in and out, with a number that is no tensor, a tensor that only passes through, and a scalar."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(4, 4), scale

    def forward(self, state: State, budget: Tensor) -> tuple[State, Tensor]:
        x = self.linear(state.x)[:, state.prefix :] * self.scale
        return State(x, state.place, state.prefix), (x.sum((1, 2)) > budget).long()


class Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.read, self.unread = nn.Linear(2, 2), nn.Linear(9, 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(x)


class Ties(nn.Module):
    """What token merging is made of, on few whole numbers, so that most are equal."""

    def forward(self, x: Tensor, rows: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        best, partner = x.max(-1)
        down, up = best.argsort(dim=-1, descending=True, stable=True), x[:, 0].sort(dim=-1, stable=True)
        place = torch.zeros_like(down).scatter(1, down, partner)
        return best, partner, down, up.values, up.indices, place, place.gather(1, partner), rows.index_add(0, index, rows.flip(0)), x.argmax(-1)


class Unread(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvalsh(x @ x.transpose(-1, -2))


def toy_inputs(*, seed: int = 0) -> tuple[State, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return State(torch.randn(2, 3, 4, generator=generator), torch.randint(9, (2, 3), generator=generator), 1), torch.tensor(0.5)


def equal(found: Any, wanted: Any) -> None:
    """Indices exactly, values to 1e-4 of the largest, everything else the same."""
    ours, theirs = pytree.tree_flatten(found), pytree.tree_flatten(wanted)
    assert ours[1] == theirs[1]
    for mine, other in zip(ours[0], theirs[0], strict=True):
        if isinstance(other, Tensor):
            assert_close(mine, other, rtol=0, atol=1e-4 * float(other.abs().max()) if other.is_floating_point() else 0)
        else:
            assert mine == other


@pytest.fixture(scope="module", params=EXACT)
def toy(request, tmp_path_factory):
    """A toy, its graph, the back-end's name and the folder in which it is kept."""
    torch.manual_seed(0)
    module, cache = Toy(), tmp_path_factory.mktemp(request.param)
    return module, build(module, toy_inputs(), backend=request.param, name="toy", cache=cache), request.param, cache


@pytest.mark.slow
def test_a_state_goes_in_and_comes_out_as_it_is(toy):
    module, graph, *_ = toy
    with serving():
        for seed in range(3):
            inputs = toy_inputs(seed=seed)
            before = inputs[0].x.clone()
            found = graph(*inputs)
            equal(found, module(*inputs))
            assert isinstance(found[0], State) and found[0].prefix == 1 and torch.equal(inputs[0].x, before)


@pytest.mark.slow
def test_shapes_are_fixed(toy):
    *_, backend, cache = toy
    if backend == "openvino":
        assert all("<dim>-1</dim>" not in file.read_text() for file in cache.glob("*.xml")) and list(cache.glob("*.xml"))


@pytest.mark.slow
def test_an_answer_outlives_the_next_call(toy):
    module, graph, *_ = toy
    with serving():
        first = graph(*toy_inputs(seed=1))
        graph(*toy_inputs(seed=2))
        equal(first, module(*toy_inputs(seed=1)))


@pytest.mark.slow
def test_any_other_call_is_refused(toy):
    _, graph, *_ = toy
    state, budget = toy_inputs()
    others = [
        (state._replace(x=state.x[:1], place=state.place[:1]), budget),
        (state._replace(x=state.x.double()), budget),
        (state._replace(prefix=2), budget),
        (state, 0.5),
        (tuple(state), budget),
    ]
    with serving():
        for other in others:
            with pytest.raises(EngineError, match="toy was not built for"):
                graph(*other)
    with pytest.raises(EngineError, match="not built for"):
        graph(state, budget)  # with gradients


@pytest.mark.slow
def test_the_form_in_memory_is_free(toy):
    module, graph, *_ = toy
    state, budget = toy_inputs()
    with serving():
        turned = state._replace(x=state.x.transpose(0, 2).contiguous().transpose(0, 2))
        equal(graph(turned, budget), module(state, budget))


@pytest.mark.slow
def test_the_weights_it_holds_are_counted(toy):
    _, graph, backend, _ = toy
    if backend == "aotinductor":
        assert graph.weight_bytes == 0
    else:
        assert 80 <= graph.weight_bytes < 20_000  # 20 numbers, and the file around them


@pytest.mark.slow
def test_a_second_start_converts_nothing_and_other_weights_are_converted(toy, monkeypatch):
    module, _, backend, cache = toy
    kept = sorted(cache.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(type(RUNTIMES[backend]()), "convert", lambda *_: pytest.fail("converted again"))
        graph = build(module, toy_inputs(), backend=backend, name="toy", cache=cache)
    with serving():
        equal(graph(*toy_inputs(seed=3)), module(*toy_inputs(seed=3)))
    assert sorted(cache.iterdir()) == kept
    flat, tensors = Flat(module, toy_inputs()), (toy_inputs()[0].x, toy_inputs()[0].place, toy_inputs()[1])
    runtime = RUNTIMES[backend]()
    one = digest(capture(flat, tensors, "toy"), runtime)
    with torch.no_grad():
        module.linear.weight[0, 0] += 1e-3
        other = digest(capture(flat, tensors, "toy"), runtime)
        module.linear.weight[0, 0] -= 1e-3
    scaled = Toy(scale=1.001)
    scaled.load_state_dict(module.state_dict())
    assert len({one, other, digest(capture(Flat(scaled, toy_inputs()), tensors, "toy"), runtime)}) == 3


@pytest.mark.slow
def test_a_converted_graph_that_is_another_function_is_refused(toy, monkeypatch):
    module, _, backend, cache = toy
    runtime = type(RUNTIMES[backend]())
    load = runtime.load

    def wrong(self, files, *, threads, weights):
        ((call, weight_bytes),) = load(self, files, threads=threads, weights=weights)
        return [Loaded(lambda tensors: [out * 1.1 if out.is_floating_point() else out for out in call(tensors)], weight_bytes)]

    monkeypatch.setattr(runtime, "load", wrong)
    with pytest.raises(EngineError, match=r"toy, whose converted graph .* away from eager"):
        build(module, toy_inputs(), backend=backend, name="toy", cache=cache)


@pytest.mark.slow
@both
def test_ties_are_broken_as_eager_breaks_them(backend):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 4, (3, 24, 24), generator=generator).float()
    example = (x, torch.randint(-9, 9, (60, 5), generator=generator).float(), torch.randint(0, 7, (60,), generator=generator))
    graph = build(Ties(), example, backend=backend, name="ties")
    with serving():
        for shift in range(3):
            inputs = (x.roll(shift, 1), *example[1:])
            for found, wanted in zip(graph(*inputs), Ties()(*inputs), strict=True):
                assert torch.equal(found, wanted)


@pytest.mark.slow
@both
@pytest.mark.parametrize("reduced", [False, True])
def test_as_many_tokens_as_heads(backend, reduced):
    torch.manual_seed(0)
    network = Network(Architecture(image_size=8, patch=4, dim=16, depth=2, heads=4, hidden=16, classes=3, class_token=False, pool="mean"))
    put(network, Choice("reducer", "tome"))
    shake(network.eval().requires_grad_(False))
    path = network.space.path(tokens=(4, 3)) if reduced else network.space.full
    x = torch.randn(2, 3, 8, 8)
    with serving():
        graph = build(network.at(path), (x,), backend=backend, name="square")
        assert_close(graph(2 * x), network(2 * x, path), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@both
def test_an_operator_that_does_not_convert_is_named(backend):
    with pytest.raises(EngineError, match=r"rung 3, of which aten\._?linalg_eig\w+ does not convert"):
        build(Unread(), (torch.randn(3, 3),), backend=backend, name="rung 3")


@both
def test_a_missing_package_names_the_extra(backend, monkeypatch):
    monkeypatch.setitem(sys.modules, backend, None)
    with pytest.raises(EngineError, match=r"apportion\[export\]"):
        build(nn.Linear(2, 2), (torch.ones(1, 2),), backend=backend, name="a")


@both
def test_other_types_are_refused(backend):
    with pytest.raises(EngineError, match=r"a in torch.float64 on cpu; wanted float32"):
        build(nn.Linear(2, 2).double(), (torch.ones(1, 2, dtype=torch.float64),), backend=backend, name="a")


def test_a_cache_that_nothing_uses_is_refused(tmp_path):
    with pytest.raises(NoEffect, match="cache for 'eager'"):
        build(nn.Linear(2, 2), (torch.ones(1, 2),), backend="eager", name="a", cache=tmp_path)


def test_torchs_own_graphs_count_the_weights_they_copy():
    assert build(nn.Linear(2, 2), (torch.ones(1, 2),), backend="eager", name="a").weight_bytes == 0


@pytest.mark.slow
def test_a_frozen_graph_counts_the_weights_that_it_reads():
    assert build(Half(), (torch.ones(1, 2),), backend="inductor", name="a").weight_bytes == 4 * (4 + 2)


def along(kind: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """A piece of a small network along one kind of path, and inputs for it."""
    network = tiny("class_token", *PLAN)
    space, inputs = network.space, images(3)
    if kind == "full":
        return network.at(space.full), (inputs,)
    if kind == "glance":
        return network.glance(1), (inputs,)
    path = {
        "merged": space.path(tokens=space.merging(3, start=1), heads=(4, 2, 2, 1)),
        "exit": space.path(blocks=(0, 1, 2), heads=(4, 2, 1), width=(64, 32, 8)),
    }[kind]
    return network.segment(1, len(path.steps), path), network.glance(1)(inputs)[:1]


@pytest.mark.slow
@both
@pytest.mark.parametrize("kind", ["full", "glance", "merged", "exit"])
def test_every_kind_of_path_agrees_with_eager(backend, kind):
    with serving():
        module, example = along(kind)
        graph = build(module, example, backend=backend, name=kind)
        equal(graph(*example), module(*example))


@pytest.mark.slow
@both
def test_an_engine_takes_a_back_end_by_name(backend):
    torch.manual_seed(0)
    parts: dict[str, Any] = {"decide": Decide(), "rungs": [Rung(1), Rung(2)], "gmacs": torch.tensor([1.0, 2.0]), "buckets": (4,), "input_shape": (5, 8)}
    ours, eager = Engine(**parts, backend=backend), Engine(**parts, backend="eager")
    assert ours.warm() == eager.warm() == 3
    found, wanted = ours(samples(9), budget=0.2, cap=1), eager(samples(9), budget=0.2, cap=1)
    assert len(set(wanted.path.tolist())) == 2
    equal(found, wanted)


@pytest.mark.slow
@both
def test_padded_texts_merge_as_eager_merges_them(backend):
    """A head for each token shows where every word went: run times once differed in how they divide negative numbers, and kept another count of each text."""
    torch.manual_seed(0)
    a = Architecture(0, 0, 16, 2, 2, 32, 4, words=2000, length=32, padding=1, positions=32, pool="every_token", task="token_classification", norm_first=False)
    network = Network(a).eval().requires_grad_(False)
    shake(network)
    put(network, Choice("reducer", "tome"))
    path = network.space.path(tokens=(32, 17))
    ids = torch.randint(2, 2000, (4, 32))
    for row, length in enumerate((32, 10, 25, 3)):
        ids[row, length:] = 1
    with serving():
        graph = build(network.at(path), (torch.full((4, 32), 5),), backend=backend, name="a text")
        assert_close(graph(ids), network(ids, path), rtol=1e-3, atol=1e-3)


def test_graphs_of_texts_are_built_on_texts_with_padding():
    table = Table({}, buckets=(1, 4), backend="eager", input_shape=(2, 9), dtype=torch.int64, fill=5, padding=1, make=build)
    blank = table.blank()
    assert blank.shape == (4, 2, 9) and blank[:, 0].tolist() == [[5] * 6 + [1] * 3] * 4 and bool((blank[:, 1] == 5).all())
