"""Layer normalisation against its definition."""

from __future__ import annotations

from torch.testing import assert_close

from apportion.methods.norm.layernorm import LayerNorm
from tests.conftest import DIM, shake, tokens_of


def test_mean_zero_variance_one_then_gain_and_offset():
    norm, x = shake(LayerNorm(DIM, eps=1e-6)), 5 + 3 * tokens_of(2, 3).x
    plain = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    assert_close(norm(x), plain * norm.weight + norm.bias)
