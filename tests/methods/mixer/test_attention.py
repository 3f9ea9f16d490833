"""Attention: how the rows of its matrices lie, and q/k norm."""

from __future__ import annotations

import torch
from torch import nn
from torch.testing import assert_close

from tests.conftest import DIM, HEADS, tiny, tokens_of


def test_it_equals_the_stock_module_with_rows_regrouped_by_head():
    ours, stock, c = tiny().blocks[0].mixer, nn.MultiheadAttention(DIM, HEADS, batch_first=True).requires_grad_(False), DIM // HEADS
    for name, theirs in (("weight", stock.in_proj_weight), ("bias", stock.in_proj_bias)):
        rows = getattr(ours.qkv, name).view(HEADS, 3, c, -1).transpose(0, 1).reshape(3 * DIM, -1)
        theirs.copy_(rows.view_as(theirs))
    stock.out_proj.weight.copy_(ours.proj.weight)
    stock.out_proj.bias.copy_(ours.proj.bias)
    tokens = tokens_of(2, 9)
    assert_close(ours(tokens, HEADS).out, stock(tokens.x, tokens.x, tokens.x, need_weights=False)[0], rtol=1e-4, atol=1e-5)


def test_query_and_key_are_normed_and_the_value_is_not():
    mixer, tokens = tiny("qk_norm").blocks[0].mixer, tokens_of(2, 9)
    mixer.query_norm, mixer.key_norm = (nn.LayerNorm(DIM // HEADS, elementwise_affine=False) for _ in range(2))
    before = mixer(tokens, HEADS)
    mixer.qkv.weight.view(HEADS, 3, DIM // HEADS, DIM)[:, :2] *= 100
    after = mixer(tokens, HEADS)
    assert_close(after.out, before.out, rtol=1e-3, atol=1e-3)
    mixer.qkv.weight.view(HEADS, 3, DIM // HEADS, DIM)[:, 2] *= 100
    assert not torch.allclose(mixer(tokens, HEADS).out, before.out, atol=0.1)
