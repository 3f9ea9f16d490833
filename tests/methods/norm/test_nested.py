"""A norm of fewer channels is the plain norm of those alone."""

from __future__ import annotations

import torch
from torch import nn
from torch.testing import assert_close

from apportion.methods import find
from tests.conftest import DIM, shake, tokens_of


def test_a_slice_is_the_plain_norm_of_the_slice():
    norm, x = shake(find("norm", "nested")(DIM, eps=1e-6)).requires_grad_(False), tokens_of(2, 5).x
    for width in (DIM, DIM // 2, 3):
        plain = nn.LayerNorm(width, eps=1e-6).requires_grad_(False)
        plain.weight.copy_(norm.weight[:width])
        plain.bias.copy_(norm.bias[:width])
        assert_close(norm(x[..., :width]), plain(x[..., :width]))


def test_channels_in_another_order():
    norm, x = shake(find("norm", "nested")(DIM, eps=1e-6)), tokens_of(2, 5).x
    order = torch.randperm(DIM, generator=torch.Generator().manual_seed(0))
    before = norm(x)
    norm.permute(order)
    assert_close(norm(x[..., order]), before[..., order])
    assert find("norm", "nested")(DIM, eps=1e-6, bias=False).bias is None
