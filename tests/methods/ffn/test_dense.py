"""The plain FFN against its definition, one unit at a time."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.testing import assert_close

from apportion.methods import find
from tests.conftest import HIDDEN, fitted, shake, tokens_of


def test_it_is_the_sum_over_hidden_units():
    ffn, _ = fitted("ffn", "dense")
    x, w = tokens_of(1, 1).x[0, 0].double(), {name: value.double() for name, value in ffn.state_dict().items()}
    total = w["down.bias"].clone()
    for unit in range(HIDDEN):
        z = float(w["up.weight"][unit] @ x + w["up.bias"][unit])
        total += w["down.weight"][:, unit] * z * 0.5 * (1 + math.erf(z / math.sqrt(2)))
    assert_close(ffn(x[None, None].float(), HIDDEN)[0, 0].double(), total, rtol=1e-4, atol=1e-5)


def test_by_itself_it_offers_the_full_width_only():
    assert fitted("ffn", "dense")[0].choices == (HIDDEN,)
    assert torch.equal(fitted("ffn", "dense")[0].contribution().strength, fitted("ffn", "dense")[1].down.strength())


def test_gate_and_norm_follow_the_order_of_units():
    torch.manual_seed(0)
    linear, norm = find("weight", "dense"), shake(find("norm", "nested")(HIDDEN, eps=1e-6))
    ffn = find("ffn", "dense")(up=linear(32, HIDDEN), down=linear(HIDDEN, 32), act=nn.SiLU(), hidden=HIDDEN, gate=linear(32, HIDDEN), norm=norm)
    ffn.requires_grad_(False)
    x, order = tokens_of(2, 3).x, torch.randperm(HIDDEN)
    before, hidden = ffn(x, HIDDEN), nn.functional.silu(ffn.up(x)) * ffn.gate(x)
    plain = nn.functional.layer_norm(hidden, (HIDDEN,), norm.weight, norm.bias, 1e-6)
    assert_close(before, ffn.down(plain), rtol=1e-4, atol=1e-5)
    ffn.permute(order)
    assert_close(ffn(x, HIDDEN), before, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ffn(x, HIDDEN // 2), before, atol=1e-2)
