"""The mean of the tokens, without those in front, and unmoved by merging."""

from __future__ import annotations

from torch import nn
from torch.testing import assert_close

from apportion.methods.head.mean import Mean
from tests.conftest import DIM, fitted, mixed_of, tokens_of


def head():
    return Mean(norm=nn.Identity(), project=nn.Identity(), macs_per_token=0, dim=DIM)


def test_the_prefix_is_left_out():
    tokens = tokens_of(2, 7, prefix=3)
    assert_close(head()(tokens), tokens.x[:, 3:].mean(1))


def test_merging_does_not_move_it():
    tokens = tokens_of(2, 17)
    merged = fitted("reducer", "tome")[0](tokens, 9, mixed_of(tokens))
    assert_close(head()(merged), head()(tokens), rtol=1e-5, atol=1e-6)
