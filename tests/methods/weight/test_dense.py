"""A plain matrix: its slices are views, so that a narrower product copies nothing."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from apportion.methods.weight.dense import DenseWeight


def test_at_full_it_is_the_stock_product():
    weight, x = DenseWeight(12, 8), torch.randn(3, 12)
    assert torch.equal(weight(x), F.linear(x, weight.weight, weight.bias))


def test_what_is_cut_away_is_not_read():
    weight, x = DenseWeight(12, 8).requires_grad_(False), torch.randn(3, 6)
    weight.weight[4:], weight.weight[:, 6:] = torch.nan, torch.nan
    assert weight(x, out=4, inp=6).isfinite().all() and weight(x, inp=6)[:, 4:].isnan().all()
