"""What every head keeps to."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from apportion.measure.macs import executed_macs
from apportion.methods import find, names
from apportion.vocab import Tokens
from tests.conftest import DIM, HEADS, HIDDEN, assert_same_state, fitted, mixed_of, reducers, rows, shake, state_of, tokens_of

every = pytest.mark.parametrize("name", names("head"))


def head_of(name: str) -> nn.Module:
    """The head with those of a network's parts that it asks for by name."""
    torch.manual_seed(0)
    parts = {
        "norm": nn.LayerNorm(DIM),
        "project": nn.Linear(DIM, 5),
        "macs_per_token": DIM * 5,
        "dim": DIM,
        "heads": HEADS,
        "hidden": HIDDEN,
        "act": nn.GELU(),
        "pool_norm": nn.LayerNorm(DIM),
        "words": False,
    }
    method = find("head", name)
    return shake(method(**{key: parts[key] for key in inspect.signature(method).parameters})).requires_grad_(False)


def answers(name: str, rows: int, patches: int) -> tuple[int, ...]:
    """One for each sample, or one for each of its patches."""
    return (rows, patches, 5) if name == "every_token" else (rows, 5)


@every
def test_a_sample_does_not_depend_on_its_batch(name):
    head, tokens = head_of(name), tokens_of(4, 9)
    together = head(tokens)
    assert together.shape == answers(name, 4, 8)
    for order in ([3, 1, 0], [2]):
        assert_close(head(rows(tokens, order)), together[order], rtol=1e-4, atol=1e-5)


@every
@pytest.mark.parametrize("reducer", reducers())
def test_it_works_after_any_reducer(name, reducer):
    head, tokens = head_of(name), tokens_of(3, 17)
    out = head(fitted("reducer", reducer)[0](tokens, 9, mixed_of(tokens)))
    assert out.shape == answers(name, 3, 16) and out.isfinite().all()


@every
def test_a_merged_token_counts_as_the_tokens_it_stands_for(name):
    head, tokens, twice = head_of(name), tokens_of(2, 4), [0, 1, 1, 1, 2, 3, 3]
    whole = Tokens(tokens.x[:, twice], torch.ones(2, 7), torch.arange(7).expand(2, 7), 1)
    merged = Tokens(tokens.x, torch.tensor([1.0, 3, 1, 2]).expand(2, 4), torch.tensor(twice).expand(2, 7), 1)
    assert_close(head(merged), head(whole), rtol=1e-4, atol=1e-5)


@every
def test_multiply_adds_are_those_that_run(name):
    head = head_of(name)
    for n in (9, 17):
        assert executed_macs(lambda n=n: head(tokens_of(1, n))) == head.macs(n, 1)


@every
def test_gradient_and_no_attribute(name):
    head, tokens = head_of(name), tokens_of(2, 9)
    x, before = tokens.x.requires_grad_(), state_of(head)
    head(tokens._replace(x=x)).square().sum().backward()
    assert_same_state(before, state_of(head))
    assert x.grad is not None and x.grad.isfinite().all() and x.grad.abs().sum() > 0
