"""Experts: copies of the FFN are the FFN, each token is by itself, slots are dealt as by the naive loop, and experts that are taught divide the work."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from apportion.errors import PlanError
from apportion.measure.macs import executed_macs
from apportion.methods import find
from apportion.methods.ffn import switch
from apportion.methods.ffn.switch import BALANCE, Switch, balance, placed, slots_of
from apportion.network import sort_by_importance
from apportion.vocab import Choice
from tests.conftest import DIM, HIDDEN, images, tiny, tokens_of

caught = pytest.raises(AssertionError)


def experts(count: int = 4, *, seed: int = 0, scaled: bool = False, capacity: float = 1.25) -> Switch:
    """Experts that differ, and a router that has opinions."""
    torch.manual_seed(seed)
    made = Switch.from_dense(copy.deepcopy(tiny().blocks[0].ffn), dim=DIM, experts=count, scaled=scaled, capacity=capacity).requires_grad_(False)
    for parameter in made.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape))
    return made


def loop(ffn: Switch, x: Tensor, *, slots: int | None = None) -> Tensor:
    """One token at a time; with `slots`, what comes after the last slot of its expert gets nothing."""
    out = torch.zeros_like(x)
    for sample in range(len(x)):
        used = [0] * len(ffn.experts)
        for place, token in enumerate(x[sample]):
            chance = (ffn.router.weight @ token).softmax(0)
            expert = int(chance.argmax())
            used[expert] += 1
            if slots is None or used[expert] <= slots:
                out[sample, place] = ffn.experts[expert](token[None], HIDDEN)[0] * (chance[expert] if ffn.scaled else 1)
    return out


@pytest.mark.parametrize("flavour", ["class_token", "post_norm"])
@pytest.mark.parametrize("count", [1, 5])
def test_copies_are_the_dense_network_sorted_or_not(flavour, count):
    dense, inputs = tiny(flavour).double(), images(3, dtype=torch.float64)
    network = tiny(flavour, Choice("ffn", "switch", options={"experts": count})).double()
    wanted = dense(inputs, dense.space.full)
    assert_close(network(inputs, network.space.full), wanted, rtol=1e-10, atol=1e-10)
    sort_by_importance(network, [inputs])
    assert_close(network(inputs, network.space.full), wanted, rtol=1e-10, atol=1e-10)
    first, *others = (each.state_dict() for each in network.blocks[0].ffn.experts)
    assert not torch.equal(first["up.weight"], dense.blocks[0].ffn.up.weight) and all(torch.equal(each[name], first[name]) for each in others for name in first)


def test_published_scaling_is_exact_for_one_expert_only():
    dense, x = tiny().blocks[0].ffn, tokens_of(2, 9).x
    for count in (1, 4):
        found = Switch.from_dense(copy.deepcopy(dense), dim=DIM, experts=count, scaled=True)(x, HIDDEN)
        assert torch.allclose(found, dense(x, HIDDEN), atol=1e-6) == (count == 1)


def check_serving() -> None:
    for seed in range(3):
        for scaled in (False, True):
            ffn, x = experts(seed=seed, scaled=scaled), tokens_of(3, 9, seed=seed).x
            wanted = loop(ffn, x)
            assert_close(ffn(x, HIDDEN), wanted, rtol=1e-5, atol=1e-5)
            assert_close(torch.cat([ffn(one[None], HIDDEN) for one in x]), wanted, rtol=1e-5, atol=1e-5)
            assert_close(ffn(torch.cat((x.flip(0), 30 * x, x)), HIDDEN)[6:], wanted, rtol=1e-5, atol=1e-5)
            assert torch.equal(ffn(x, HIDDEN), ffn(x, HIDDEN))


def test_serving_drops_nothing_and_a_token_is_alone_as_in_company():
    check_serving()


def test_serving_catches_slots(monkeypatch):
    monkeypatch.setattr(Switch, "_all", Switch._limited)
    with caught:
        check_serving()


def check_slots(dealt) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(250):
        tokens, count = (int(torch.randint(low, high, (), generator=generator)) for low, high in ((1, 20), (1, 6)))
        slots = int(torch.randint(1, tokens + 1, (), generator=generator))
        chosen = torch.randint(count, (4, tokens), generator=generator)
        found = dealt(chosen, count, slots)
        for row, seen in zip(chosen.tolist(), found.tolist(), strict=True):
            used = [0] * count
            for expert, place in zip(row, seen, strict=True):
                assert place == (expert * slots + used[expert] if used[expert] < slots else count * slots)
                used[expert] += 1


def test_slots_are_dealt_in_the_order_of_tokens():
    check_slots(placed)
    assert [slots_of(*each) for each in ((197, 4, 1.25), (9, 4, 1.25), (3, 4, 1.25), (16, 2, 2.0))] == [61, 4, 3, 16]


def test_slots_catch_a_count_that_includes_the_token():
    def inclusive(chosen: Tensor, count: int, slots: int) -> Tensor:
        mine = F.one_hot(chosen, count)
        before = (mine.cumsum(1) * mine).sum(-1)
        return torch.where(before < slots, chosen * slots + before, count * slots)

    with caught:
        check_slots(inclusive)


def by_matrices(ffn: Switch, x: Tensor, slots: int) -> Tensor:
    """Dispatch and combine as published, by products with a tensor (b, n, experts, slots) of 0 and 1."""
    expert = (x @ ffn.router.weight.T).argmax(-1)
    place = F.one_hot(placed(expert, len(ffn.experts), slots), len(ffn.experts) * slots + 1)[..., :-1].unflatten(-1, (-1, slots)).to(x)
    sent = torch.einsum("bnec,bnd->ebcd", place, x)
    done = torch.stack([each(group, HIDDEN) for each, group in zip(ffn.experts, sent, strict=True)])
    return torch.einsum("bnec,ebcd->bnd", place, done)


@pytest.mark.parametrize("capacity", [1.0, 1.25, 2.0])
def test_training_is_the_naive_loop_with_slots(capacity, monkeypatch):
    monkeypatch.setattr(switch, "JITTER", 0.0)
    for seed in range(3):
        ffn, x = experts(3, seed=seed, capacity=capacity).train(), tokens_of(3, 15, seed=seed).x
        slots = slots_of(15, 3, capacity)
        found, wanted = ffn(x, HIDDEN), loop(ffn, x, slots=slots)
        assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        assert_close(found, by_matrices(ffn, x, slots), rtol=1e-5, atol=1e-5)
        assert_close(torch.cat([ffn(one[None], HIDDEN) for one in x]), found, rtol=1e-5, atol=1e-5)
        if capacity == 1.0:
            assert (found == 0).all(-1).any()  # the residual alone is left of a dropped token


def test_with_a_slot_for_every_token_what_trains_is_what_serves(monkeypatch):
    monkeypatch.setattr(switch, "JITTER", 0.0)
    for scaled in (False, True):
        ffn, x = experts(scaled=scaled, capacity=4.0), tokens_of(3, 9).x
        assert_close(ffn.train()(x, HIDDEN), ffn.eval()(x, HIDDEN), rtol=1e-5, atol=1e-5)


def test_noise_belongs_to_training():
    ffn, x = experts(capacity=4.0), tokens_of(2, 9).x
    for training in (False, True):
        notes: dict[str, list[Tensor]] = {}
        ffn.train(training)(x, HIDDEN, notes)
        ratio = notes["router"][0] / (x @ ffn.router.weight.T)
        assert torch.allclose(ratio, torch.ones(()), atol=1e-4) != training


@pytest.mark.parametrize("scaled", [False, True])
def test_the_router_feels_the_task_as_if_p_were_multiplied_in(scaled):
    ffn, x = experts(scaled=scaled), tokens_of(2, 9).x
    along, values = torch.randn(2, 9, DIM, generator=torch.Generator().manual_seed(1)), ffn(x, HIDDEN)
    chance = (x @ ffn.router.weight.T).softmax(-1).amax(-1)
    if scaled:
        values = values / chance[..., None]
    ffn.router.requires_grad_(True)
    (found,) = torch.autograd.grad((ffn(x, HIDDEN) * along).sum(), ffn.router.weight)
    p = (x @ ffn.router.weight.T).softmax(-1).amax(-1)
    (wanted,) = torch.autograd.grad((p[..., None] * values * along).sum(), ffn.router.weight)
    assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_balance_is_one_where_all_are_alike_and_the_number_of_experts_where_one_gets_all():
    everyone = 30.0 * F.one_hot(torch.arange(24) % 4, 4).view(2, 12, 4)
    assert_close(balance(everyone), torch.tensor(1.0))
    assert_close(balance(30.0 * F.one_hot(torch.zeros(2, 12, dtype=torch.int64), 4)), torch.tensor(4.0))
    logits = torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    p, sent = logits.detach().softmax(-1).view(24, 4), logits.argmax(-1).flatten()
    assert_close(balance(logits).item(), sum(4 * (sent == e).float().mean().item() * p[:, e].mean().item() for e in range(4)))
    lower = logits.detach() - 0.1 * torch.autograd.grad(balance(logits), logits)[0]
    assert balance(lower) < balance(logits)


@pytest.mark.parametrize("count", [1, 4, 16])
def test_active_multiply_adds_do_not_grow_with_the_number_of_experts(count):
    ffn, dense, x = experts(count), tiny().blocks[0].ffn, tokens_of(1, 9).x
    assert ffn.macs(9, HIDDEN) == executed_macs(lambda: ffn(x, HIDDEN)) == dense.macs(9, HIDDEN) + 9 * DIM * count


def test_narrow_types_are_routed_in_float32():
    ffn, x = experts().bfloat16(), tokens_of(2, 9).x.bfloat16()
    notes: dict[str, list[Tensor]] = {}
    out = ffn(x, HIDDEN, notes)
    assert out.dtype == torch.bfloat16 and notes["router"][0].dtype == torch.float32
    assert_close(notes["router"][0], x.float() @ ffn.router.weight.float().T)


@pytest.mark.slow
def test_serving_is_eager_only_and_a_graph_is_refused():
    ffn, x = experts(), tokens_of(2, 9).x
    torch.compiler.reset()
    with pytest.raises(RuntimeError, match=r"(?i)data.dependent"):
        torch.compile(ffn, fullgraph=True, backend="eager", dynamic=False)(x, HIDDEN)


@pytest.mark.parametrize("options", [{"experts": 0}, {"capacity": 0.5}])
def test_what_cannot_hold_the_tokens_is_refused(options):
    with pytest.raises(PlanError):
        Switch.from_dense(tiny().blocks[0].ffn, dim=DIM, **options)


def taught(count: int, *, weight: float) -> tuple[float, float]:
    """Eight kinds of tokens, each with a map of its own: the error as a share of the variance, and the greatest load over the mean."""
    torch.manual_seed(0)
    kinds, maps = 3 * torch.randn(8, 16), torch.randn(8, 16, 16) / 4
    linear = find("weight", "dense")
    ffn: nn.Module = find("ffn", "dense")(up=linear(16, 16), down=linear(16, 16), act=nn.GELU(), hidden=16)
    if count:
        ffn = Switch.from_dense(ffn.train(), dim=16, experts=count)
    optimiser = torch.optim.Adam(ffn.parameters(), 1e-2)

    def batch() -> tuple[Tensor, Tensor]:
        kind, noise = torch.randint(8, (4, 64)), torch.randn(4, 64, 16)
        return kinds[kind] + noise, torch.einsum("bnij,bnj->bni", maps[kind], noise)

    for _ in range(400):
        x, y = batch()
        notes: dict[str, list[Tensor]] = {}
        loss = (ffn(x, 16, notes) - y).square().mean() + (weight * balance(notes["router"][0]) if count else 0)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    ffn.eval().requires_grad_(False)
    x, y = (torch.cat(each) for each in zip(*(batch() for _ in range(16)), strict=True))
    notes = {}
    error = (ffn(x, 16, notes) - y).square().mean() / y.var()
    load = notes["router"][0].argmax(-1).flatten().bincount(minlength=count).float() if count else torch.ones(1)
    return error.item(), (load.max() / load.mean()).item()


@pytest.mark.slow
def test_experts_divide_the_work_and_balance_spreads_it():
    dense, unbalanced, balanced = taught(0, weight=0), taught(8, weight=0.0), taught(8, weight=10 * BALANCE)  # more than published: the run is short
    assert max(unbalanced[0], balanced[0]) < 0.3 * dense[0] and balanced[1] < 1.15 < 1.8 < unbalanced[1]
