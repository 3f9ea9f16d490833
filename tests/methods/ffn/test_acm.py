"""Learners that add up: every way of running them is the definition, costs are those that run, and the gate feels the task."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from apportion.errors import PlanError
from apportion.measure.macs import executed_macs
from apportion.methods import find, ops
from apportion.methods.ffn import acm
from apportion.network import Network, sort_by_importance
from apportion.train.acm import PerToken
from apportion.vocab import Choice
from tests.conftest import DEPTH, DIM, HIDDEN, fitted, images, tiny, tokens_of

N, UNIT = 4, HIDDEN // 4
caught = pytest.raises(AssertionError)


def gated(*, seed: int = 0, scale: float = 1.0) -> acm.AdaptiveComputation:
    """Learners of a shaken FFN with a gate that has opinions."""
    part = copy.deepcopy(tiny().blocks[0].ffn)
    torch.manual_seed(seed)
    ffn = acm.AdaptiveComputation.from_dense(part, dim=DIM, gate=8).requires_grad_(False)
    nn.init.normal_(ffn.gate.last.weight, std=scale)
    return ffn


def network(flavour: str = "class_token") -> Network:
    made = tiny(flavour, Choice("ffn", "acm", options={"gate": 8})).requires_grad_(False)
    torch.manual_seed(1)
    for block in made.blocks:
        nn.init.normal_(block.ffn.gate.last.weight)
    return made


def all_choices(ffn: acm.AdaptiveComputation, x: Tensor) -> Tensor:
    """h_0, ..., h_N by the definition, learner by learner: (b, n, N + 1, d)."""
    up, down = ffn.part.up, ffn.part.down
    h = [down.bias.expand_as(x)]
    for i in range(N):
        units = slice(i * UNIT, (i + 1) * UNIT)
        h.append(h[-1] + F.gelu(x @ up.weight[units].T + up.bias[units]) @ down.weight[:, units].T)
    return torch.stack(h, 2)


def gathered(ffn: acm.AdaptiveComputation, x: Tensor, counts: Tensor) -> Tensor:
    return all_choices(ffn, x).gather(2, counts[..., None, None].expand(-1, -1, 1, x.shape[-1])).squeeze(2)


def by_rank(ffn: acm.AdaptiveComputation, x: Tensor, k: int) -> Tensor:
    """Each sample's tokens in order of the number that they are expected to need; the last of them get the most."""
    wanted, out = (ffn.gate(x, k).softmax(-1) @ torch.arange(N + 1.0)), torch.zeros(x.shape[:2], dtype=torch.int64)
    dealt = [count for count, size in enumerate(ops.sizes(x.shape[1], k, N)) for _ in range(size)]
    for row, order in zip(out, wanted.argsort(dim=-1, stable=True), strict=True):
        for token, count in zip(order.tolist(), dealt, strict=True):
            row[token] = count
    return out


def check_grouped(run) -> None:
    ffn, x = gated(), tokens_of(3, 9).x
    generator = torch.Generator().manual_seed(2)
    for counts in (torch.randint(0, N + 1, (3, 9), generator=generator), torch.zeros(3, 9).long(), torch.full((3, 9), N), torch.arange(27).view(3, 9) % 2 * N):
        flat = counts.flatten()
        found = run(ffn.part, x, flat.argsort(stable=True), flat.bincount(minlength=N + 1).tolist())
        assert_close(found, gathered(ffn, x, counts), rtol=1e-5, atol=1e-5)


def test_groups_are_a_gather_from_all_choices():
    check_grouped(acm.grouped)


def test_groups_catch_a_highest_learner_that_is_never_run():
    def exclusive(part, x, rows, counts):
        return acm.grouped(part, x, rows, [counts[0] + counts[1], *counts[2:], 0])

    with caught:
        check_grouped(exclusive)


@pytest.mark.parametrize("k", range(1, N))
def test_both_rules_are_a_gather_from_all_choices_alone_as_in_company(k):
    for seed in range(3):
        ffn, x = gated(seed=seed, scale=3.0), tokens_of(4, 9, seed=seed).x
        free = ffn.gate(x, k).argmax(-1)
        assert len(free.unique()) > 2
        for run, counts in ((ffn, by_rank(ffn, x, k)), (PerToken(ffn), free)):
            out = run(x, k * UNIT)
            assert_close(out, gathered(ffn, x, counts), rtol=1e-5, atol=1e-5)
            alone = torch.cat([run(one[None], k * UNIT) for one in x])
            company = run(torch.cat((30 * x.flip(0), x)), k * UNIT)[4:]
            assert_close(alone, out, rtol=1e-5, atol=1e-5)
            assert_close(company, out, rtol=1e-5, atol=1e-5)


def test_sizes_have_the_mean_of_the_budget():
    assert ops.sizes(9, 1, 4) == [3, 3, 3, 0, 0] and ops.sizes(197, 2, 4) == [0, 66, 66, 65, 0] and ops.sizes(1, 3, 4) == [0, 0, 0, 1, 0]
    for tokens, learners in itertools.product(range(1, 40), (2, 3, 4, 8)):
        for k in range(1, learners):
            found = ops.sizes(tokens, k, learners)
            assert sum(found) == tokens and k * tokens - sum(count * size for count, size in enumerate(found)) == (tokens % 3 == 2)
            assert max(found[k - 1 : k + 2]) - min(found[k - 1 : k + 2]) <= 1
            assert all(less <= more for less, more in zip(found, ops.sizes(tokens + 1, k, learners), strict=True))


@pytest.mark.parametrize("k", range(1, N))
def test_padding_changes_nothing_and_takes_what_is_left(k):
    ffn, generator = gated(scale=3.0), torch.Generator().manual_seed(0)
    for n in (9, 10, 11):
        x, size = tokens_of(n, n, seed=n).x, torch.ones(n, n).tril()  # one word, two words, ..., in rows of one length
        size = torch.stack([row[torch.randperm(n, generator=generator)] for row in size])
        out = ffn(x, k * UNIT, None, size)
        for row, real in enumerate(size > 0):
            assert_close(out[row][real], ffn(x[row : row + 1, real], k * UNIT)[0], rtol=1e-5, atol=1e-5)
        assert executed_macs(lambda x=x, size=size: ffn(x[:1], k * UNIT, None, size[:1])) == ffn.macs(n, k * UNIT)
        taught = copy.deepcopy(ffn).eval().requires_grad_(True)
        assert_close(taught(x, k * UNIT, None, size)[size > 0], out[size > 0], rtol=1e-5, atol=1e-5)


def test_before_teaching_full_is_the_dense_network_and_no_budget_prefers_a_token():
    dense = tiny().double()
    made = network().double()
    assert_close(made(images(3).double(), made.space.full), dense(images(3).double(), dense.space.full), rtol=1e-9, atol=1e-9)
    sort_by_importance(made, [images(3).double()])
    assert_close(made(images(3).double(), made.space.full), dense(images(3).double(), dense.space.full), rtol=1e-9, atol=1e-9)
    fresh, x = tiny("class_token", Choice("ffn", "acm", options={"gate": 8})).blocks[0].ffn, tokens_of(2, 9).x
    for k in range(1, N):
        assert (fresh.gate(x, k).argmax(-1) == k).all()


@pytest.mark.parametrize("k", range(1, N))
def test_multiply_adds_are_those_that_run(k):
    ffn, x = gated(scale=3.0), tokens_of(2, 9).x
    gate = 9 * (DIM * 8 + 8 * (N + 1))
    assert ffn.macs(9, k * UNIT) == 9 * k * 2 * DIM * UNIT + gate == executed_macs(lambda: ffn(x[:1], k * UNIT))
    spent = ffn.gate(x, k).argmax(-1).sum().item()
    assert executed_macs(lambda: PerToken(ffn)(x, k * UNIT)) == spent * 2 * DIM * UNIT + 2 * gate
    assert ffn.macs(9, HIDDEN) == executed_macs(lambda: ffn(x[:1], HIDDEN)) == 9 * 2 * DIM * HIDDEN


def test_a_network_of_them_keeps_to_its_count_and_is_alone_as_in_company():
    made, inputs = network("registers"), images(3)
    for widths in ((UNIT,) * DEPTH, (2 * UNIT, HIDDEN, UNIT, 3 * UNIT)):
        path = made.space.path(width=widths)
        assert executed_macs(lambda path=path: made(inputs[:1], path)) == made.macs(path)
        assert_close(torch.cat([made(one[None], path) for one in inputs]), made(inputs, path), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", ["served", "per token"])
def test_what_trains_is_what_runs_and_the_gate_feels_the_task(rule):
    ffn, x = gated(), tokens_of(3, 9).x
    run = ffn if rule == "served" else PerToken(ffn)
    for k in range(1, N):
        ran = run(x, k * UNIT)
        ffn.requires_grad_(True)
        notes: dict[str, list[Tensor]] = {}
        soft = run(x, k * UNIT, notes)
        assert_close(soft, ran, rtol=1e-5, atol=1e-5)
        along = torch.randn(soft.shape, generator=torch.Generator().manual_seed(k))
        (logits,) = notes["gate"]
        found = torch.autograd.grad((soft * along).sum(), logits)[0]
        leaf = logits.detach().requires_grad_()  # by the definition: sum over k of p_k h_k
        value = (leaf.softmax(-1)[..., None] * all_choices(ffn, x).detach()).sum(2)
        assert_close(found, torch.autograd.grad((value * along).sum(), leaf)[0], rtol=1e-4, atol=1e-5)
        assert (found.abs().sum(-1) > 0).all()
        ffn.requires_grad_(False)


def test_the_gate_feels_nothing_where_it_is_not_multiplied_in(monkeypatch):
    monkeypatch.setattr(acm, "straight_through", lambda logits, counts: F.one_hot(counts, N + 1) + 0 * logits)
    with caught:
        test_what_trains_is_what_runs_and_the_gate_feels_the_task("served")


def test_noise_belongs_to_training():
    ffn, x = gated(), tokens_of(2, 9).x
    assert not ffn.training and not ffn.gate.training  # as the part that it was made of
    assert torch.equal(ffn(x, UNIT), ffn(x, UNIT))
    ffn.train()
    assert not torch.allclose(ffn(x, UNIT), ffn(x, UNIT))
    assert torch.equal(ffn(x, HIDDEN), ffn(x, HIDDEN))


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 2])
def test_every_budget_is_one_graph(k):
    ffn, x = gated(), tokens_of(2, 9).x
    torch.compiler.reset()
    assert_close(torch.compile(ffn, fullgraph=True, backend="eager", dynamic=False)(x, k * UNIT), ffn(x, k * UNIT), rtol=1e-5, atol=1e-5)


def test_gated_hidden_units_are_learners_too():
    def linear(*shape: int) -> nn.Module:
        return find("weight", "dense")(*shape)

    torch.manual_seed(0)
    part = find("ffn", "dense")(up=linear(8, 16), gate=linear(8, 16), down=linear(16, 8), act=nn.SiLU(), hidden=16)
    ffn, x = acm.AdaptiveComputation.from_dense(part, dim=8, gate=4), torch.randn(2, 5, 8)
    counts = torch.randint(0, N + 1, (2, 5))
    h = torch.stack([part(x, 4 * k) for k in range(N + 1)], 2).gather(2, counts[..., None, None].expand(-1, -1, 1, 8)).squeeze(2)
    assert_close(acm.weighed(part, x, F.one_hot(counts, N + 1).float()), h, rtol=1e-5, atol=1e-6)
    assert ffn.macs(5, 8) == 3 * 8 * 4 * (5 * 2 - 1) + ffn.gate.macs(5) == executed_macs(lambda: ffn.eval().requires_grad_(False)(x[:1], 8))


@pytest.mark.parametrize("options", [{"learners": 1}, {"learners": 5}, {"gate": -1}])
def test_shares_that_are_not_whole_are_refused(options):
    with pytest.raises(PlanError, match="equal shares"):
        acm.AdaptiveComputation.from_dense(tiny().blocks[0].ffn, dim=DIM, **options)


def test_what_is_no_sum_of_units_is_refused():
    with pytest.raises(PlanError, match="MatFormer"):
        acm.AdaptiveComputation.from_dense(fitted("ffn", "matformer")[0], dim=DIM)
    normed = tiny().blocks[0].ffn
    normed.norm = nn.LayerNorm(HIDDEN)
    with pytest.raises(PlanError, match="norm"):
        acm.AdaptiveComputation.from_dense(normed, dim=DIM)
