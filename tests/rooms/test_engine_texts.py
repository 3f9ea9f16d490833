"""Texts by length: each goes to the shortest graph that holds it, and its answer is nobody else's business. On toy modules."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from apportion.engine import Build, Engine, Lengths, build, cut, lengths, plain, used
from apportion.errors import EngineError
from apportion.vocab import Tokens

PAD, WORDS, DIM = 3, 20, 8


class Decide(nn.Module):
    """Rung 1 for texts whose first word is odd; padding is a token of size 0, put last."""

    def __init__(self) -> None:
        super().__init__()
        self.word = nn.Embedding(WORDS, DIM)

    def forward(self, inputs: Tensor, budget: Tensor, cap: Tensor) -> tuple[Tokens, Tensor]:
        b, n = inputs.shape
        rung = torch.minimum(inputs[:, 0] % 2, cap.clamp(max=1)).long()
        return Tokens(self.word(inputs), (inputs != PAD).float(), torch.arange(n + 1).expand(b, n + 1), 0), rung


class Rung(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(DIM, 2)

    def forward(self, state: Tokens) -> Tensor:
        return self.head((state.x * state.size[..., None]).sum(1) / state.size.sum(1, keepdim=True))


class Padded(Rung):
    """The planted fault: padding counts."""

    def forward(self, state: Tokens) -> Tensor:
        return self.head(state.x.mean(1))


def made(rung: type[Rung] = Rung, sizes: tuple[int, ...] = (4, 8), buckets: tuple[int, ...] = (1, 4), make: Build = build) -> Lengths:
    torch.manual_seed(0)
    decide, rungs = Decide(), [rung(), rung()]
    engines = {
        n: Engine(
            decide=decide,
            rungs=rungs,
            gmacs=torch.tensor([1.0, 2.0]) * n,
            buckets=buckets,
            backend="eager",
            input_shape=(n,),
            dtype=torch.int64,
            fill=0,
            make=make,
        )
        for n in sizes
    }
    return Lengths(engines, padding=PAD)


@pytest.fixture(scope="module")
def warm() -> Lengths:
    engine, heard = made(), list[str]()
    assert engine.wanted == 2 * 2 * 3 == engine.warm(heard.append) == len(set(heard)) and heard[-1].startswith("8 tokens, graph 6 of 6")
    return engine


def texts(count: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, WORDS, (count, 8), generator=generator)
    ids[torch.arange(8) >= torch.randint(1, 9, (count, 1), generator=generator)] = PAD
    return ids


def naive(engine: Lengths, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Each text by itself, without any padding."""
    some = engine._engines[8]
    logits, rungs = [], []
    for row in ids:
        state, rung = some._table.modules["decide"](row[row != PAD][None], torch.tensor(1.0), torch.tensor(9.0))
        logits.append(some._table.modules[f"rung {int(rung)}"](state))
        rungs.append(int(rung))
    return torch.cat(logits), torch.tensor(rungs)


@torch.no_grad()
def test_every_text_is_answered_as_alone_in_order_and_pays_for_its_own_length(warm: Lengths) -> None:
    ids = texts(23)
    answer, (logits, rungs) = warm(ids, budget=1.0), naive(warm, ids)
    assert torch.equal(answer.path, rungs) and torch.equal(warm.decided(ids, budget=1.0), rungs) and len(rungs.unique()) == 2
    torch.testing.assert_close(answer.logits, logits, rtol=0, atol=1e-6)
    bucket = torch.where((ids != PAD).sum(1) <= 4, 4, 8)
    assert torch.equal(answer.cost, bucket * (1.0 + rungs)) and len(bucket.unique()) == 2
    order = torch.randperm(23, generator=torch.Generator().manual_seed(1))
    for same in (warm(ids[order], budget=1.0), warm(cut(ids, 30, PAD)[order], budget=1.0)):
        torch.testing.assert_close(same.logits, logits[order], rtol=0, atol=1e-6)
    assert warm.forced(ids, 1).path.tolist() == [1] * 23


@torch.no_grad()
def test_the_law_of_padding_catches_a_module_that_counts_it() -> None:
    engine, ids = made(Padded, sizes=(8,), buckets=(4,)), texts(4)
    engine.warm()
    assert (engine(ids, budget=1.0).logits - naive(engine, ids)[0]).abs().max() > 1e-3


def test_each_length_has_its_own_cap(warm: Lengths) -> None:
    ids = torch.tensor([[5, PAD, PAD, PAD, PAD, PAD], [5, 6, 7, 8, 9, 10]])
    assert warm(ids, budget=1.0, cap=[0.0, 1.0]).path.tolist() == [0, 1] and warm(ids, budget=1.0, cap=[1.0, 0.0]).path.tolist() == [1, 0]


def test_what_is_no_text_or_too_long_is_refused(warm: Lengths) -> None:
    for wrong in (torch.zeros(2, 4), torch.zeros(2, 3, 4, dtype=torch.int64), torch.zeros(2, 0, dtype=torch.int64)):
        with pytest.raises(EngineError, match="inputs of shape"):
            warm(wrong, budget=1.0)
    with pytest.raises(EngineError, match="9 tokens at row 1"):
        warm(torch.tensor([[5, *[PAD] * 8], [5] * 9]), budget=1.0)
    with pytest.raises(EngineError, match="no text"):
        warm(texts(1)[:0], budget=1.0)
    with pytest.raises(EngineError, match="ascending"):
        Lengths({}, padding=0)


def test_lengths_double_and_end_at_the_longest() -> None:
    assert [lengths(n) for n in (5, 32, 33, 64, 512)] == [(5,), (32,), (32, 33), (32, 64), (32, 64, 128, 256, 512)]


def test_cut_and_used_undo_each_other() -> None:
    ids = torch.tensor([[5, PAD, 6, PAD, PAD], [PAD, PAD, PAD, PAD, PAD]])
    assert used(ids, PAD).tolist() == [3, 1]
    pair = torch.stack((ids, torch.ones_like(ids)), 1)
    assert used(pair, PAD).tolist() == [3, 1]
    assert cut(ids, 3, PAD)[0].tolist() == [5, PAD, 6] and cut(pair, 6, PAD)[0].tolist() == [[5, PAD, 6, PAD, PAD, PAD], [1, 1, 1, 1, 1, 0]]


def test_lengths_and_groups_that_came_are_counted() -> None:
    engine = made(make=plain)
    engine.warm()
    ids = texts(23)
    engine.forced(ids, 0)
    assert not engine.tokens and not engine.traffic
    engine(ids, budget=1.0)
    assert engine.tokens == Counter(used(ids, PAD).tolist())
    short = int((used(ids, PAD) <= 4).sum())
    assert engine.traffic[short] >= 1 and engine.traffic[23 - short] >= 1 and sum(size * often for size, often in engine.traffic.items()) == 2 * 23
