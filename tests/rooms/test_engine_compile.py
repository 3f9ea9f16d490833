"""One whole graph or an error, and no second one, ever."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from apportion.engine.compile import build, serving
from apportion.errors import EngineError


class Power(nn.Module):
    def __init__(self, times: int = 2) -> None:
        super().__init__()
        self.times, self.linear = times, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = self.linear(x)
        return x


class Breaks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x + 1


class DependsOnValues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class Stubborn(nn.Module):
    @torch.compiler.disable
    def inner(self, x: Tensor) -> Tensor:
        return x + 1

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def unique_graphs() -> int:
    return counters["stats"]["unique_graphs"]


def test_far_more_modules_of_one_class_than_the_compiler_keeps_by_itself():
    torch._dynamo.reset()
    x, modules = torch.randn(2, 4), [Power(1 + n % 2) for n in range(14)]
    before = unique_graphs()
    graphs = [build(module, (x,), backend="eager", name=f"power {n}") for n, module in enumerate(modules)]
    with serving():
        for graph, module in zip(graphs, modules, strict=True):
            assert torch.equal(graph(x), module(x))
    assert unique_graphs() - before == 14


@pytest.mark.parametrize("module", [Breaks(), DependsOnValues(), Stubborn()])
def test_a_module_that_is_not_one_graph_is_refused_by_name(module):
    with pytest.raises(EngineError, match="rung 3"):
        build(module, (torch.ones(2, 4),), backend="eager", name="rung 3")


def test_a_compiler_that_is_switched_off_is_refused():
    with torch.compiler.set_stance("force_eager"), pytest.raises(EngineError, match="0 graphs"):
        build(Power(), (torch.ones(2, 4),), backend="eager", name="a")


def test_an_unknown_backend_is_refused():
    with pytest.raises(EngineError, match="inductor"):
        build(Power(), (torch.ones(2, 4),), backend="magic", name="a")


def test_a_sealed_graph_refuses_every_other_call_and_stays_usable():
    x = torch.ones(2, 4)
    graph = build(Power(), (x,), backend="eager", name="a")
    before = unique_graphs()
    with serving():
        wanted = graph(x)
        for other in (torch.ones(3, 4), torch.ones(4, 2).t(), torch.ones(2, 4, requires_grad=True)):
            with pytest.raises(EngineError, match="not built for"):
                graph(other)
        with torch._dynamo.config.patch(suppress_errors=True), pytest.raises(EngineError):
            graph(torch.ones(5, 4))
    with pytest.raises(EngineError):
        graph(x)  # with gradients
    with serving():
        assert torch.equal(graph(x), wanted)
    assert unique_graphs() - before <= 5  # traces that were thrown away; none was compiled


def test_serving_is_the_same_state_in_inference_mode_and_in_any_thread():
    x = torch.ones(2, 4)
    graph = build(Power(), (x,), backend="eager", name="a")
    answers: list[Tensor] = []

    def call() -> None:
        with torch.inference_mode(), serving():
            answers.append(graph(x))

    call()
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert len(answers) == 2 and torch.equal(*answers)


def test_the_graph_runs_in_eval_mode():
    module = nn.Sequential(nn.Dropout(0.9), nn.Linear(4, 4)).train()
    x = torch.ones(2, 4)
    graph = build(module, (x,), backend="eager", name="a")
    with serving():
        torch.testing.assert_close(graph(x), module[1](x))
