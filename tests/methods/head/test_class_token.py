"""The answer is read from the first token and from no other."""

from __future__ import annotations

import torch
from torch import nn

from apportion.methods.head.class_token import ClassToken
from tests.conftest import DIM, tokens_of


def test_only_the_first_token_is_read():
    head, tokens = ClassToken(norm=nn.Identity(), project=nn.Identity(), macs_per_token=0, dim=DIM), tokens_of(2, 7, prefix=3)
    assert torch.equal(head(tokens), tokens.x[:, 0])
