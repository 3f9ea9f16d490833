"""The laws of serving, where samples leave on the way: counted graphs, alone as in company, order kept, nobody lost. On toy modules."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from apportion.engine import Build, plain
from apportion.engine.compile import build
from apportion.engine.relay import Relay
from apportion.errors import EngineError
from apportion.vocab import Tokens

TOKENS, DIM, CLASSES, STATIONS = 5, 8, 3, 4
BUCKETS = (1, 4, 16)
GMACS = torch.tensor([1.0, 2.0, 3.0, 4.0])


class Station(nn.Module):
    """Sure where the first feature is small; what it holds of the sample is never mixed, so neighbours stay far apart."""

    def __init__(self, place: int, classes: int = CLASSES) -> None:
        super().__init__()
        self.place, self.layer, self.head = place, nn.Linear(DIM, DIM), nn.Linear(DIM, classes)

    def forward(self, given: Tensor | Tokens) -> tuple[Tokens, Tensor, Tensor]:
        tokens = given if isinstance(given, tuple) else Tokens(given, given.new_ones(given.shape[:2]), torch.arange(TOKENS).expand(len(given), -1), 1)
        first = tokens.x[:, 0, :1]
        x = tokens.x + self.layer(tokens.x).tanh()
        x = torch.cat((torch.cat((first[:, None], x[:, :1, 1:]), 2), x[:, 1:]), 1)
        return tokens._replace(x=x), self.head(x.mean(1)), (self.place + 1) / STATIONS - first[:, 0].abs()


def limits(budget: float, cap: float) -> list[float]:
    """With more budget a sample has to be surer."""
    return [place / STATIONS * (1 - 1 / budget) if budget else -math.inf for place in range(1, STATIONS)]


def relay(*, make: Build = build, buckets: tuple[int, ...] = BUCKETS, classes: int = CLASSES) -> Relay:
    torch.manual_seed(0)
    stations = [*(Station(place) for place in range(STATIONS - 1)), Station(STATIONS - 1, classes)]
    return Relay(stations=stations, limits=limits, gmacs=GMACS, buckets=buckets, backend="eager", input_shape=(TOKENS, DIM), make=make)


@pytest.fixture(scope="module")
def warm() -> Relay:
    made, heard = relay(), list[str]()
    before = counters["stats"]["unique_graphs"]
    assert made.warm(heard.append) == made.wanted == STATIONS * len(BUCKETS) == len(set(heard)) == counters["stats"]["unique_graphs"] - before
    return made


def samples(count: int, *, seed: int = 0) -> Tensor:
    return torch.randn(count, TOKENS, DIM, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def naive(made: Relay, inputs: Tensor, budget: float) -> tuple[Tensor, Tensor]:
    """Each sample by itself, station by station, through the modules as they are."""
    logits, path = [], []
    for one in inputs.split(1):
        given: Tensor | Tokens = one
        for place in range(STATIONS):
            given, said, sure = made._table.modules[f"station {place}"](given)
            if place == STATIONS - 1 or bool(sure[0] >= limits(budget, math.inf)[place]):
                break
        logits.append(said)
        path.append(place)
    return torch.cat(logits), torch.tensor(path)


@pytest.mark.parametrize("count", [1, 2, 5, 17, 50])
def test_alone_as_in_company_in_any_order(warm: Relay, count: int) -> None:
    inputs = samples(count, seed=count)
    logits, path = naive(warm, inputs, 0.6)
    for rows in (torch.arange(count), torch.randperm(count, generator=torch.Generator().manual_seed(2))):
        answer = warm(inputs[rows], budget=0.6)
        assert torch.equal(answer.path, path[rows]) and torch.equal(answer.cost, GMACS[path[rows]])
        torch.testing.assert_close(answer.logits, logits[rows], rtol=0, atol=1e-5)
        assert torch.equal(warm.decided(inputs[rows], budget=0.6), path[rows])
    assert count < 17 or len(set(path.tolist())) == STATIONS


def test_nothing_is_built_after_warming_whatever_the_batch(warm: Relay) -> None:
    before, pool = counters["stats"]["unique_graphs"], samples(60)
    for count in (1, 3, 16, 17, 33, 60):
        for budget in (0.05, 0.5, 1.0, 50.0):
            assert warm(pool[:count], budget=budget).logits.shape == (count, CLASSES)
    assert counters["stats"]["unique_graphs"] == before and warm.warm() == warm.wanted


def test_padding_and_operators_one_by_one_change_nothing(warm: Relay) -> None:
    inputs = samples(5)
    wanted = warm(inputs, budget=0.6)
    for other in (relay(buckets=(8,)), relay(make=plain)):
        other.warm()
        found = other(inputs, budget=0.6)
        assert torch.equal(found.path, wanted.path)
        torch.testing.assert_close(found.logits, wanted.logits, rtol=0, atol=1e-5)


def test_all_may_leave_at_once_or_nobody(warm: Relay) -> None:
    assert warm(samples(20), budget=0.0).path.tolist() == [0] * 20
    assert warm(samples(20), budget=1e9).path.tolist() == [STATIONS - 1] * 20


def test_who_is_never_sure_is_answered_at_the_end(warm: Relay) -> None:
    inputs = samples(5)
    whole = warm(inputs, budget=0.7)
    inputs[2, 0, 0] = math.nan  # what it is compared with stays false, also at the last station
    answer = warm(inputs, budget=0.7)
    others = torch.tensor([0, 1, 3, 4])
    assert answer.path[2] == STATIONS - 1 and answer.logits[2].isnan().all() and torch.equal(answer.path[others], whole.path[others])
    assert torch.allclose(answer.logits[others], whole.logits[others], atol=1e-6)


def test_a_forced_rung_is_taken_by_all(warm: Relay) -> None:
    inputs = samples(7)
    for rung in range(STATIONS):
        answer = warm.forced(inputs, rung)
        assert answer.path.tolist() == [rung] * 7
        chosen = naive(warm, inputs, 0.6)[1] == rung
        torch.testing.assert_close(answer.logits[chosen], warm(inputs, budget=0.6).logits[chosen], rtol=0, atol=1e-5)
    with pytest.raises(EngineError, match="rung 4"):
        warm.forced(inputs, STATIONS)


def test_every_answer_at_once_is_that_of_each_rung(warm: Relay) -> None:
    inputs = samples(21)
    every = warm.every(inputs)
    assert every.shape == (21, STATIONS, CLASSES)
    for rung in range(STATIONS):
        torch.testing.assert_close(every[:, rung], warm.forced(inputs, rung).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("wrong", [samples(2)[:, :4], samples(2).double(), samples(0), samples(2)[0]])
def test_wrong_inputs_are_refused_by_what_they_are(warm: Relay, wrong: Tensor) -> None:
    with pytest.raises(EngineError, match=r"wanted \(b, 5, 8\)"):
        warm(wrong, budget=0.5)


def test_what_makes_no_sense_is_refused(warm: Relay) -> None:
    with pytest.raises(EngineError, match=r"warm\(\)"):
        relay()(samples(1), budget=0.5)
    with pytest.raises(EngineError, match="nan"):
        warm(samples(1), budget=float("nan"))
    with pytest.raises(EngineError, match=r"\(3,\), \(4,\)"):
        relay(classes=4).warm()
    for stations, gmacs in (([Station(0)], GMACS[:1]), ([Station(0), Station(1)], GMACS)):
        with pytest.raises(EngineError, match="at least two"):
            Relay(stations=stations, limits=limits, gmacs=gmacs, input_shape=(TOKENS, DIM))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["inductor", "openvino", "onnxruntime"])
def test_every_back_end_sends_them_the_same_way(backend: str) -> None:
    pytest.importorskip(backend) if backend != "inductor" else torch._dynamo.reset()
    torch.manual_seed(0)
    stations = [Station(0), Station(1), Station(2)]

    def fewer(budget: float, cap: float) -> list[float]:
        return limits(budget, cap)[:2]

    made = Relay(stations=stations, limits=fewer, gmacs=GMACS[:3], buckets=(1, 4), backend=backend, input_shape=(TOKENS, DIM))  # pyright: ignore
    other = Relay(stations=stations, limits=fewer, gmacs=GMACS[:3], buckets=(1, 4), backend="eager", input_shape=(TOKENS, DIM), make=plain)
    assert made.warm() == 6 == other.warm()
    inputs = samples(23)
    found, wanted = made(inputs, budget=0.8), other(inputs, budget=0.8)
    assert torch.equal(found.path, wanted.path) and len(set(found.path.tolist())) == 3
    torch.testing.assert_close(found.logits, wanted.logits, rtol=0, atol=1e-4)


def test_calls_are_counted_by_who_comes_to_each_station() -> None:
    made, inputs = relay(make=plain), samples(23)
    made.warm()
    made.forced(inputs, 2)
    assert not made.traffic
    path = made(inputs, budget=1.0).path
    assert made.traffic == Counter(int((path >= place).sum()) for place in range(int(path.max()) + 1)) and len(path.unique()) > 1
