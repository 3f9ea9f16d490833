"""Pooling by a learned query: the cases that can be worked out by hand."""

from __future__ import annotations

import torch
from torch import nn
from torch.testing import assert_close

from apportion.methods.head.attention_pool import AttentionPool
from tests.conftest import DIM, HEADS, HIDDEN, shake, tokens_of


def pool():
    torch.manual_seed(0)
    parts = {"norm": nn.Identity(), "project": nn.Identity(), "act": nn.GELU(), "pool_norm": nn.LayerNorm(DIM)}
    return shake(AttentionPool(**parts, macs_per_token=0, dim=DIM, heads=HEADS, hidden=HIDDEN)).requires_grad_(False)


def test_a_query_that_asks_for_nothing_takes_the_mean():
    head, x = pool(), tokens_of(2, 7).x
    head.query.weight.zero_()
    head.query.bias.zero_()
    read = head.proj(head.key_value(x)[..., DIM:].mean(1))
    assert_close(head(tokens_of(2, 7)), read + head.down(head.act(head.up(head.pool_norm(read)))), rtol=1e-4, atol=1e-5)


def test_the_order_of_tokens_is_nothing_to_it():
    head, tokens = pool(), tokens_of(2, 7)
    assert_close(head(tokens._replace(x=tokens.x.flip(1))), head(tokens), rtol=1e-4, atol=1e-5)
