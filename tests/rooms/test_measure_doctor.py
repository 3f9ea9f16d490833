"""Back-ends ranked on a tiny module: the real ones, and planted ones that are slow, wrong, missing or not whole."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn

from apportion.engine import build, serving
from apportion.errors import EngineError
from apportion.measure.doctor import rank_backends

torch.manual_seed(0)
MODULE = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4)).eval().requires_grad_(False)
X = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))


def slow(x: Tensor) -> Tensor:
    time.sleep(0.005)
    return MODULE(x)


def missing() -> Callable[..., Tensor]:
    raise EngineError("no package fast", wanted="the extra `fast`", do="Install it.")


def given(*calls: Callable[..., Tensor]) -> list[Callable[[], Callable[..., Tensor]]]:
    return [partial(lambda call: call, call) for call in calls]


@torch.no_grad()
def test_slow_wrong_and_missing_ones_come_last_with_the_reason() -> None:
    plain, lazy, wrong, broken, short = given(MODULE, slow, lambda x: MODULE(x) + 0.1, lambda x: MODULE(x) * float("nan"), lambda x: MODULE(x)[:1])
    found = rank_backends({"lazy": lazy, "wrong": wrong, "missing": missing, "broken": broken, "short": short, "plain": plain}, MODULE, (X,), repeats=5)
    assert [trial.backend for trial in found] == ["plain", "lazy", "wrong", "missing", "broken", "short"]
    assert [bool(trial.out) for trial in found] == [False, False, True, True, True, True]
    best, behind, off, absent, *nothing = found
    assert best.reason == "the fastest" and best.distance == 0
    assert behind.slower is not None and behind.slower.low > 1 and behind.reason.startswith(f"{behind.slower.value:.2f} of the fastest")
    assert "differ by" in off.reason and off.timing is None and off.distance == pytest.approx(0.1 / float(MODULE(X).abs().max()), rel=1e-4)
    assert "no package fast" in absent.reason and absent.distance is None
    assert all(trial.distance == float("inf") for trial in nothing)


@torch.no_grad()
def test_those_that_no_interval_tells_apart_keep_their_order() -> None:
    pause = lambda x: (time.sleep(0.002), MODULE(x))[1]  # noqa: E731
    one, two = given(pause, pause)
    for names in (("a", "b"), ("b", "a")):
        found = rank_backends(dict(zip(names, (one, two), strict=True)), MODULE, (X,), repeats=9)
        tied = all(trial.slower is not None and trial.slower.low <= 1 for trial in found)
        assert not tied or tuple(trial.backend for trial in found) == names


@torch.no_grad()
def test_none_left_is_an_error_that_names_all() -> None:
    (wrong,) = given(lambda x: -MODULE(x))
    with pytest.raises(EngineError, match=r"wrong: answers differ.*missing: .*no package"):
        rank_backends({"wrong": wrong, "missing": missing}, MODULE, (X,))
    with pytest.raises(EngineError, match="no back-end"):
        rank_backends({}, MODULE, (X,))


class Breaks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return MODULE(x)


@pytest.mark.slow
def test_the_real_ones_answer_as_the_module_or_say_why_not() -> None:
    builders = {name: partial(build, MODULE, (X,), backend=name, name=name) for name in ("eager", "inductor", "onnxruntime", "openvino")}
    with serving():
        found = rank_backends({**builders, "broken": partial(build, Breaks(), (X,), backend="eager", name="broken")}, MODULE, (X,), repeats=5)
    assert {trial.backend for trial in found} == {*builders, "broken"}
    for trial in found:
        installed = trial.backend in ("eager", "inductor", "broken") or find_spec(trial.backend) is not None
        assert (not trial.out and trial.distance is not None and trial.distance < 1e-5) is (installed and trial.backend != "broken"), trial
    assert "does not compile" in found[-1].out or find_spec("openvino") is None
