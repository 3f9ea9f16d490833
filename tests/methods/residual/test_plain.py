"""The sum."""

from __future__ import annotations

import torch

from apportion.methods.residual.plain import Plain
from tests.conftest import tokens_of


def test_it_is_the_sum():
    x, branch = tokens_of(2, 3).x, tokens_of(2, 3, seed=1).x
    assert torch.equal(Plain()(x, branch), x + branch) and not list(Plain().parameters())
