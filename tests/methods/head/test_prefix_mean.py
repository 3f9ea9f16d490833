"""The mean of the tokens in front: nothing behind them counts, and each of them counts alike."""

from __future__ import annotations

import torch
from torch import nn
from torch.testing import assert_close

from apportion.methods import find
from tests.conftest import DIM, tokens_of


def test_it_reads_the_tokens_in_front_alike_and_nothing_else():
    torch.manual_seed(0)
    head = find("head", "prefix_mean")(norm=nn.LayerNorm(DIM), project=nn.Linear(DIM, 5), macs_per_token=5 * DIM, dim=DIM).requires_grad_(False)
    tokens = tokens_of(3, 9, prefix=2)
    wanted = head.project(head.norm((tokens.x[:, 0] + tokens.x[:, 1]) / 2))
    assert_close(head(tokens), wanted)
    swapped = tokens._replace(x=tokens.x[:, [1, 0, *range(8, 1, -1)]] + (torch.arange(9) > 1)[:, None])
    assert_close(head(swapped), wanted)
