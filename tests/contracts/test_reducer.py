"""What every reducer keeps to."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from apportion.errors import ApportionError
from apportion.measure.macs import executed_macs
from apportion.methods import names
from apportion.vocab import Tokens
from tests.conftest import HEADS, assert_same_state, fitted, mixed_of, rows, state_of, tokens_of

every = pytest.mark.parametrize("name", names("reducer"))
PREFIXES = (1, 4)


def keeps(reducer, tokens: Tokens) -> list[int]:
    """All, one fewer, a quarter fewer, and the most that may go at once."""
    n, left = tokens.x.shape[1], tokens.x.shape[1] - tokens.prefix
    return [n, n - 1, n - left // 4, n - left // 2] if reducer.reduces else [n]


def cases(name: str, batch: int = 3, seed: int = 0):
    reducer, _ = fitted("reducer", name)
    for prefix in PREFIXES:
        for n in (20, 21):
            tokens = tokens_of(batch, n, prefix=prefix, seed=seed)
            for keep in keeps(reducer, tokens):
                yield reducer, tokens, mixed_of(tokens), keep


@every
def test_it_keeps_what_it_is_told_to_keep(name):
    for reducer, tokens, mixed, keep in cases(name):
        out = reducer(tokens, keep, mixed)
        assert out.x.shape == (3, keep, tokens.x.shape[2]) and out.size.shape == (3, keep) and out.origin.shape == tokens.origin.shape


@every
def test_it_leaves_the_prefix_alone(name):
    for reducer, tokens, mixed, keep in cases(name):
        out, prefix = reducer(tokens, keep, mixed), tokens.prefix
        assert out.prefix == prefix and torch.equal(out.x[:, :prefix], tokens.x[:, :prefix])
        assert (out.size[:, :prefix] == 1).all() and torch.equal(out.origin[:, :prefix], tokens.origin[:, :prefix])


@every
def test_at_full_nothing_is_touched(name):
    reducer, _ = fitted("reducer", name)
    tokens = tokens_of(3, 20)
    out = reducer(tokens, 20, mixed_of(tokens))
    assert all(torch.equal(a, b) for a, b in zip(out[:3], tokens[:3], strict=True))


@every
def test_origin_and_sizes_agree_and_mass_is_kept(name):
    for reducer, tokens, mixed, keep in cases(name):
        once = reducer(tokens, keep, mixed)
        for before, after in ((tokens, once), (once, reducer(once, keeps(reducer, once)[-1], mixed_of(once, seed=5)))):
            for sample in range(3):
                assert torch.equal(after.origin[sample].bincount(minlength=after.x.shape[1]), after.size[sample].long())
            assert_close((after.x * after.size[..., None]).sum(1), (before.x * before.size[..., None]).sum(1), rtol=1e-5, atol=1e-5)


@every
def test_each_survivor_is_the_mean_of_the_tokens_that_went_into_it(name):
    for reducer, tokens, mixed, keep in cases(name):
        out = reducer(tokens, keep, mixed)
        for sample in range(3):
            for place in range(keep):
                members = out.origin[sample] == place
                assert bool(members.any()) == bool(out.size[sample, place] > 0)
                if members.any():
                    assert_close(out.x[sample, place], tokens.x[sample, members].mean(0), rtol=1e-5, atol=1e-5)


@every
def test_a_sample_does_not_depend_on_its_batch(name):
    for reducer, tokens, mixed, keep in cases(name, batch=4):
        together = reducer(tokens, keep, mixed)
        for order in ([2, 0, 3, 1], [1, 1, 2], [0], [1], [2], [3]):
            apart = reducer(rows(tokens, order), keep, rows(mixed, order))
            assert torch.equal(apart.origin, together.origin[order])
            assert_close(apart.x, together.x[order], rtol=1e-5, atol=1e-6)


@every
def test_every_token_receives_a_gradient(name):
    for reducer, tokens, mixed, keep in cases(name):
        x = tokens.x.clone().requires_grad_()
        out = reducer(tokens._replace(x=x), keep, mixed)
        (out.x * torch.randn(out.x.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
        assert x.grad is not None and x.grad.isfinite().all() and (x.grad.abs().sum(-1) > 0).all()


@every
def test_it_compiles_whole(name):
    reducer, _ = fitted("reducer", name)
    tokens = tokens_of(2, 20)
    mixed, keep = mixed_of(tokens), keeps(reducer, tokens)[-1]
    out = torch.compile(lambda t, m: reducer(t, keep, m), fullgraph=True, backend="eager")(tokens, mixed)
    assert_close(out.x, reducer(tokens, keep, mixed).x)


@every
def test_it_writes_no_attribute(name):
    for reducer, tokens, mixed, keep in cases(name):
        before = state_of(reducer)
        reducer(tokens, keep, mixed)
        assert_same_state(before, state_of(reducer))


@every
def test_multiply_adds_are_those_that_run(name):
    for reducer, tokens, mixed, keep in cases(name, batch=1):
        n = tokens.x.shape[1]
        assert executed_macs(lambda r=reducer, t=tokens, k=keep, m=mixed: r(t, k, m).x * 1) == reducer.macs(n, keep, tokens.prefix, HEADS)


@every
def test_what_it_cannot_keep_it_refuses(name):
    reducer, _ = fitted("reducer", name)
    tokens = tokens_of(2, 20)
    if not reducer.reduces:
        with pytest.raises(ApportionError):
            reducer(tokens, 19, mixed_of(tokens))
