"""The plain FFN against its definition, one unit at a time."""

from __future__ import annotations

import math

import torch
from torch.testing import assert_close

from tests.conftest import HIDDEN, fitted, tokens_of


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
