"""Attention to a fixed point: one run is the dense mixer, what has settled is settled, more is run for a finer tolerance, and groups run what still moves."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from apportion.errors import PlanError
from apportion.measure.macs import executed_macs
from apportion.methods.mixer import fixed_point
from apportion.methods.mixer.fixed_point import FixedPoint, grouped, moved
from apportion.network import put, sort_by_importance
from apportion.vocab import Choice, Tokens
from tests.conftest import DIM, HEADS, images, rows, tiny, tokens_of

caught = pytest.raises(AssertionError)
C = DIM // HEADS


def iterated(iterations: int = 30, *, tolerance: float = 1e-4, scale: float = 0.5, flavour: str = "class_token") -> FixedPoint:
    """In float64; products of queries and keys are `scale` of what a small network has, so that z settles."""
    part = copy.deepcopy(tiny(flavour).blocks[0].mixer)
    part.qkv.weight.view(HEADS, 3, C, DIM)[:, :2] *= scale
    made = FixedPoint.from_dense(part, iterations=iterations, tolerance=tolerance).double().requires_grad_(False)
    return made


def given(batch: int, n: int, *, seed: int = 0) -> Tokens:
    tokens = tokens_of(batch, n, seed=seed)
    factor = torch.linspace(0.2, 1.2, batch)[:, None, None]
    return tokens._replace(x=(tokens.x * factor).double(), size=tokens.size.double())


def once(mixer: FixedPoint, z: Tensor, x: Tensor, *, keep: bool = True) -> Tensor:
    """x + f(z) by the definition, head by head; without `keep`, f(z) alone."""
    query_key, value = mixer.qkv.weight[: 2 * DIM], mixer.qkv.weight[2 * DIM :]
    b, v = mixer.qkv.bias[: 2 * DIM], x @ value.T + mixer.qkv.bias[2 * DIM :]
    out = []
    for head in range(HEADS):
        q, k = (z @ query_key[2 * C * head : 2 * C * (head + 1)].T + b[2 * C * head : 2 * C * (head + 1)]).split(C, -1)
        out.append((mixer.temperature[head] * q @ k.transpose(1, 2) / C**0.5).softmax(-1) @ v[..., C * head : C * (head + 1)])
    return torch.cat(out, -1) @ mixer.proj.weight.T + mixer.proj.bias + (x if keep else 0)


def by_loop(mixer: FixedPoint, tokens: Tokens) -> tuple[Tensor, list[int]]:
    """The branch and the number of runs, one sample at a time."""
    out, counts = [], []
    for x in tokens.x[:, None]:
        z = x
        for count in range(1, mixer.iterations + 1):
            new = once(mixer, z, x)
            if (new - z).norm(dim=-1).div(z.norm(dim=-1)).max() <= mixer.tolerance:
                break
            z = new if count < mixer.iterations else z
        out.append(once(mixer, z, x) - x)
        counts.append(count)
    return torch.cat(out), counts


@pytest.mark.parametrize("flavour", ["class_token", "qk_norm", "clip"])
def test_one_run_is_the_dense_mixer(flavour):
    dense, tokens = tiny(flavour).blocks[0].mixer, tokens_of(3, 9)
    mixer = FixedPoint.from_dense(dense).requires_grad_(False)
    assert not torch.allclose(mixer(tokens, HEADS).out, dense(tokens, HEADS).out, atol=1e-3)
    mixer.iterations = 1
    for found, wanted in zip(mixer(tokens, HEADS), dense(tokens, HEADS), strict=True):
        assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    x = tokens.x.clone().requires_grad_()
    ours, theirs = (torch.autograd.grad(each(tokens._replace(x=x), HEADS).out.square().sum(), x)[0] for each in (mixer, dense))
    assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def check_loop(run: Callable[[FixedPoint, Tokens], Tensor]) -> None:
    tokens, notes = given(5, 9), {}
    for iterations, tolerance in ((30, 1e-4), (3, 1e-4), (30, 0.0), (2, 10.0)):
        mixer = iterated(iterations, tolerance=tolerance)
        wanted, counts = by_loop(mixer, tokens)
        assert_close(run(mixer, tokens), wanted, rtol=1e-9, atol=1e-9)
        for sample in range(5):
            assert_close(run(mixer, rows(tokens, [sample])), wanted[sample, None], rtol=1e-9, atol=1e-9)
        mixer(tokens, HEADS, notes)
        assert notes["iterations"].pop().tolist() == counts
        if (iterations, tolerance) == (30, 1e-4):
            assert len(set(counts)) > 1 and max(counts) < 30


def test_it_is_the_naive_loop_and_a_sample_is_alone_as_in_company():
    check_loop(lambda mixer, tokens: mixer(tokens, HEADS).out)


def test_groups_are_the_naive_loop():
    check_loop(grouped)


def test_a_batch_that_settles_together_is_caught(monkeypatch):
    monkeypatch.setattr(fixed_point, "moved", lambda z, new, size: moved(z, new, size).amax().expand(len(z)))
    with caught:
        check_loop(lambda mixer, tokens: mixer(tokens, HEADS).out)


def test_what_has_settled_is_a_fixed_point_wherever_it_began():
    mixer, tokens = iterated(), given(4, 9)
    z = tokens.x + mixer(tokens, HEADS).out
    assert moved(z, once(mixer, z, tokens.x), tokens.size).max() <= mixer.tolerance
    other = torch.zeros_like(z)
    for _ in range(60):
        other = once(mixer, other, tokens.x)
    assert moved(z, other, tokens.size).max() <= 10 * mixer.tolerance


def test_a_finer_tolerance_runs_more_and_samples_differ():
    tokens, counts = given(6, 9), []
    for tolerance in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5):
        notes: dict[str, list[Tensor]] = {}
        iterated(tolerance=tolerance)(tokens, HEADS, notes)
        counts.append(notes["iterations"][0])
    assert all((finer >= coarser).all() for coarser, finer in itertools.pairwise(counts))
    assert (counts[-1] > counts[0]).all() and counts[2].std() > 0


def test_groups_cost_what_still_moves_and_a_graph_costs_everything():
    mixer, tokens = iterated(12), given(5, 9)
    _, counts = by_loop(mixer, tokens)
    assert executed_macs(lambda: grouped(mixer, tokens)) == sum(mixer.grouped_macs(9, count) for count in counts)
    assert executed_macs(lambda: mixer(tokens, HEADS)) == 5 * mixer.macs(9, HEADS) == 5 * mixer.grouped_macs(9, 12) and max(counts) < 12


def test_padding_neither_moves_nor_counts():
    mixer, tokens = iterated(), given(3, 9)
    junk = 1e-3 * torch.randn(3, 4, DIM, generator=torch.Generator().manual_seed(5), dtype=torch.float64)  # it would move far for its length
    padded = Tokens(torch.cat((tokens.x, junk), 1), torch.cat((tokens.size, torch.zeros(3, 4)), 1), torch.arange(14).clamp_max(12).expand(3, 14), 1)
    for run in (lambda each: mixer(each, HEADS).out, lambda each: grouped(mixer, each)):
        assert_close(run(padded)[:, :9], run(tokens), rtol=1e-9, atol=1e-9)


def test_the_input_in_the_sum_keeps_tokens_apart():
    def alike(z: Tensor) -> float:
        unit = F.normalize(z, dim=-1)
        return ((unit @ unit.transpose(1, 2)).sum((1, 2)) - 9).div(72).mean().item()

    mixer, tokens = iterated(20, tolerance=0.0), given(4, 9)
    assert alike(tokens.x + mixer(tokens, HEADS).out) <= 0.9
    z = tokens.x
    for _ in range(20):
        z = once(mixer, z, tokens.x, keep=False)
    assert alike(z) > 0.99


def test_the_gradient_of_the_last_run_points_where_that_of_all_runs_does():
    mixer, tokens = iterated(50, tolerance=1e-8), given(4, 9)
    along = torch.randn(4, 9, DIM, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mixer.requires_grad_(True)
    learnt, x = list(mixer.parameters()), tokens.x.clone().requires_grad_()
    ours = torch.autograd.grad((mixer(tokens._replace(x=x), HEADS).out * along).sum(), [*learnt, x])
    z = x
    for _ in range(50):
        z = once(mixer, z, x)
    whole = torch.autograd.grad(((z - x) * along).sum(), [*learnt, x])
    assert len(learnt) == 5
    for found, wanted in zip(ours, whole, strict=True):
        assert F.cosine_similarity(found.flatten(), wanted.flatten(), dim=0) >= 0.95


def test_a_network_takes_it_and_can_be_sorted():
    network, inputs = tiny("class_token", Choice("mixer", "fixed_point")).double().requires_grad_(False), images(2, dtype=torch.float64)
    for block in network.blocks:
        block.mixer.temperature.copy_(torch.linspace(0.5, 1.5, HEADS))
    before = network(inputs, network.space.full)
    assert executed_macs(lambda: network(inputs[:1], network.space.full)) == network.macs(network.space.full)
    sort_by_importance(network, [inputs])
    assert_close(network(inputs, network.space.full), before, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_it_is_one_graph():
    mixer, tokens = iterated(5), given(2, 9)
    torch.compiler.reset()
    run = torch.compile(lambda each: mixer(each, HEADS).out, fullgraph=True, backend="eager", dynamic=False)
    assert_close(run(tokens), mixer(tokens, HEADS).out, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", [{"iterations": 1}, {"tolerance": -1.0}, {"tolerance": float("nan")}])
def test_what_changes_nothing_is_refused(options):
    with pytest.raises(PlanError):
        FixedPoint.from_dense(tiny().blocks[0].mixer, **options)


def test_a_mixer_with_positions_and_one_that_is_not_plain_are_refused():
    network = tiny("class_token", Choice("mixer", "head_prefix"))
    with pytest.raises(PlanError, match="HeadPrefix"):
        put(network, Choice("mixer", "fixed_point"))
    for name, value in (("rotary", 100.0), ("window", 3), ("relative", torch.zeros(4, HEADS))):
        part = tiny().blocks[0].mixer
        setattr(part, name, value)
        with pytest.raises(PlanError):
            FixedPoint.from_dense(part)
