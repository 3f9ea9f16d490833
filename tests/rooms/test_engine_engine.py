"""The laws of serving: counted graphs, alone as in company, order kept, nothing silent. On toy modules."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from apportion.engine import plain
from apportion.engine.engine import Engine
from apportion.errors import EngineError
from apportion.vocab import Tokens

TOKENS, DIM, CLASSES, RUNGS = 5, 8, 3, 6
BUCKETS = (1, 4, 16)
GMACS = torch.tensor([0.5, 1.0, 1.5, 2.0, 2.5, 3.0], dtype=torch.float64)


class Decide(nn.Module):
    """Rung by the size of the first feature, where neighbours are far enough apart for rounding never to matter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(DIM, DIM)

    def forward(self, inputs: Tensor, budget: Tensor, cap: Tensor) -> tuple[Tokens, Tensor]:
        x = self.embed(inputs)
        rung = (inputs[:, 0, 0].abs() * budget * RUNGS).floor().clamp(max=RUNGS - 1)
        rung = torch.minimum(rung, cap).long()
        b, n, _ = x.shape
        return Tokens(x, torch.ones(b, n), torch.arange(n).expand(b, n), 1), rung


class Rung(nn.Module):
    def __init__(self, depth: int, classes: int = CLASSES) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(depth))
        self.head = nn.Linear(DIM, classes)

    def forward(self, state: Tokens) -> Tensor:
        x = state.x
        for layer in self.layers:
            attention = (x @ x.transpose(1, 2) / DIM + state.size.log().unsqueeze(1)).softmax(-1)
            x = x + layer(attention @ x).tanh()
        return self.head(x[:, 0] + x[:, state.prefix :].mean(1) + state.origin.sum(1, keepdim=True) * 0.01)


class LooksAround(Rung):
    """The planted fault: an answer that depends on the batch."""

    def forward(self, state: Tokens) -> Tensor:
        return super().forward(state._replace(x=state.x - state.x.mean(0, keepdim=True)))


class Breaks(Rung):
    def forward(self, state: Tokens) -> Tensor:
        torch._dynamo.graph_break()
        return super().forward(state)


def engine(*, rung: type[Rung] = Rung, buckets: tuple[int, ...] = BUCKETS, backend: str = "eager") -> Engine:
    torch.manual_seed(0)
    decide, rungs = Decide(), [rung(1 + k % 2) for k in range(RUNGS)]
    return Engine(decide=decide, rungs=rungs, gmacs=GMACS, buckets=buckets, backend=backend, input_shape=(TOKENS, DIM))


def samples(count: int, *, seed: int = 0) -> Tensor:
    return torch.randn(count, TOKENS, DIM, generator=torch.Generator().manual_seed(seed))


def unique_graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.fixture(scope="module")
def warming() -> tuple[Engine, list[str], int]:
    """An engine, what it said while it warmed, and how many graphs the compiler counted."""
    made, heard, before = engine(), [], unique_graphs()
    assert made.warm(heard.append) == made.wanted
    return made, heard, unique_graphs() - before


@pytest.fixture
def warm(warming) -> Engine:
    return warming[0]


@torch.no_grad()
def naive(made: Engine, inputs: Tensor, budget: float, cap: float = float("inf")) -> tuple[Tensor, Tensor]:
    """Each sample by itself through the modules as they are."""
    logits, path = [], []
    for one in inputs.split(1):
        state, rung = made._table.modules["decide"](one, torch.tensor(budget), torch.tensor(cap))
        logits.append(made._table.modules[f"rung {int(rung)}"](state))
        path.append(int(rung))
    return torch.cat(logits), torch.tensor(path)


def test_every_graph_is_built_once_and_named_while_it_is(warming):
    made, heard, graphs = warming
    assert graphs == made.wanted == (1 + RUNGS) * len(BUCKETS) == 21
    assert len(set(heard)) == len(heard) == 21 and "21 of 21: rung 5, batch 16" in heard[-1]
    before = unique_graphs()
    assert made.warm(heard.append) == 21 == len(heard) and unique_graphs() == before


def test_nothing_is_built_after_warming_whatever_the_batch(warm):
    before, generator = unique_graphs(), torch.Generator().manual_seed(1)
    pool = samples(60)
    for _ in range(200):
        count = int(torch.randint(1, 61, (), generator=generator))
        answer = warm(pool[torch.randint(0, 60, (count,), generator=generator)], budget=float(torch.rand((), generator=generator)) + 0.05)
        assert answer.logits.shape == (count, CLASSES)
    assert unique_graphs() == before


@pytest.mark.parametrize("count", [1, 2, 5, 17, 50])
def test_alone_as_in_company_in_any_order(warm, count):
    inputs = samples(count, seed=count)
    logits, path = naive(warm, inputs, 0.6)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(2))
    for rows in (torch.arange(count), order):
        answer = warm(inputs[rows], budget=0.6)
        assert torch.equal(answer.path, path[rows])
        torch.testing.assert_close(answer.logits, logits[rows], rtol=0, atol=1e-5)
    assert count < 17 or len(set(path.tolist())) >= 5  # many paths, or the law was hardly tried


def test_padding_changes_nothing(warm):
    inputs, padded = samples(5), engine(buckets=(8,))
    padded.warm()
    wanted, found = warm(inputs, budget=0.6), padded(inputs, budget=0.6)
    assert torch.equal(found.path, wanted.path)
    torch.testing.assert_close(found.logits, wanted.logits, rtol=0, atol=1e-5)


def test_the_law_of_company_catches_a_module_that_looks_around():
    made = engine(rung=LooksAround, buckets=(4,))
    made.warm()
    inputs = samples(40)
    assert (made(inputs, budget=0.6).logits - naive(made, inputs, 0.6)[0]).abs().max() > 1e-2


def test_budget_and_cap_reach_the_decision_and_cost_follows_the_path(warm):
    inputs = samples(40)
    low, high, capped = warm(inputs, budget=0.2), warm(inputs, budget=2.0), warm(inputs, budget=2.0, cap=2)
    assert low.path.float().mean() < high.path.float().mean() and int(capped.path.max()) == 2
    assert torch.equal(high.cost, GMACS[high.path]) and torch.equal(warm.decided(inputs, budget=2.0), high.path)


def test_a_forced_rung_is_taken_by_all(warm):
    inputs = samples(7)
    answer = warm.forced(inputs, 3)
    with torch.no_grad():
        wanted = warm._table.modules["rung 3"](warm._table.modules["decide"](inputs, torch.tensor(1.0), torch.tensor(9.0))[0])
    assert answer.path.tolist() == [3] * 7 and answer.cost.tolist() == [2.0] * 7
    torch.testing.assert_close(answer.logits, wanted, rtol=0, atol=1e-5)
    with pytest.raises(EngineError, match="rung 6"):
        warm.forced(inputs, 6)


@pytest.mark.parametrize("form", ["strided", "gradient", "inference"])
def test_the_form_of_the_inputs_is_no_business_of_the_caller(warm, form):
    inputs = samples(6)
    wanted = warm(inputs, budget=0.6)
    if form == "inference":
        with torch.inference_mode():
            found = warm(inputs.clone(), budget=0.6)
    else:
        found = warm(inputs.transpose(1, 2).contiguous().transpose(1, 2) if form == "strided" else inputs.requires_grad_(), budget=0.6)
    torch.testing.assert_close(found.logits, wanted.logits, rtol=0, atol=0)
    assert not found.logits.requires_grad and not found.logits.is_inference()


@pytest.mark.parametrize("wrong", [samples(2)[:, :4], samples(2).double(), samples(0), samples(2)[0], torch.zeros(())])
def test_wrong_inputs_are_refused_by_what_they_are(warm, wrong):
    with pytest.raises(EngineError, match=r"wanted \(b, 5, 8\)"):
        warm(wrong, budget=0.5)


def test_a_call_before_warming_says_what_to_do():
    with pytest.raises(EngineError, match=r"warm\(\)"):
        engine()(samples(1), budget=0.5)


def test_a_budget_that_is_not_a_number_is_refused(warm):
    with pytest.raises(EngineError, match="nan"):
        warm(samples(1), budget=float("nan"))


def test_a_decision_off_the_ladder_is_refused(warm):
    with pytest.raises(EngineError, match="rung -1 for sample 0"):
        warm(samples(2), budget=0.5, cap=-1)


def test_a_graph_break_fails_at_warming_and_names_the_rung():
    made = engine(rung=Breaks)
    with pytest.raises(EngineError, match="rung 0, batch 1"):
        made.warm()
    with pytest.raises(EngineError, match=r"warm\(\)"):
        made(samples(1), budget=0.5)


def test_rungs_with_different_heads_are_refused():
    made = Engine(decide=Decide(), rungs=[Rung(1), Rung(1, classes=4)], gmacs=GMACS[:2], buckets=(1,), backend="eager", input_shape=(TOKENS, DIM))
    with pytest.raises(EngineError, match=r"\(3,\), \(4,\)"):
        made.warm()


@pytest.mark.parametrize("wrong", [{"buckets": ()}, {"buckets": (8, 1)}, {"buckets": (0, 1)}, {"gmacs": GMACS[:2]}, {"rungs": []}])
def test_an_engine_that_makes_no_sense_is_refused(wrong):
    right = {"decide": Decide(), "rungs": [Rung(1)], "gmacs": GMACS[:1], "input_shape": (TOKENS, DIM)}
    with pytest.raises(EngineError):
        Engine(**{**right, **wrong})


def test_an_unknown_backend_is_refused_when_the_engine_is_made():
    with pytest.raises(EngineError, match="magic"):
        engine(backend="magic")


@pytest.mark.slow
def test_inductor_gives_the_same_answers_from_as_many_graphs():
    torch._dynamo.reset()
    torch.manual_seed(0)
    made = Engine(decide=Decide(), rungs=[Rung(1), Rung(2)], gmacs=GMACS[:2], buckets=(1, 4), backend="inductor", input_shape=(TOKENS, DIM))
    before = unique_graphs()
    assert made.warm() == 6 == unique_graphs() - before
    for count in (1, 3, 9, 30):
        inputs = samples(count, seed=count)
        logits, path = naive(made, inputs, 0.2, cap=1)
        answer = made(inputs, budget=0.2, cap=1)
        assert torch.equal(answer.path, path) and (count < 9 or len(set(path.tolist())) == 2)
        torch.testing.assert_close(answer.logits, logits, rtol=0, atol=1e-5)
    assert unique_graphs() - before == 6


def test_calls_are_counted_by_the_groups_they_bring_and_measurements_are_not() -> None:
    made, inputs = engine(), samples(23)
    made._table._make = plain
    made.warm()
    made.forced(inputs, 1)
    made.decided(inputs, budget=0.5)
    assert not made.traffic
    path = made(inputs, budget=0.5).path
    assert made.traffic == Counter([23, *path.unique(return_counts=True)[1].tolist()]) and len(path.unique()) > 1
    made.traffic.clear()  # a copy
    made(inputs[:1], budget=0.5)
    assert made.traffic[1] >= 2
