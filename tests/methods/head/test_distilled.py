"""The distilled head: the mean of what two tokens say, and nothing of the others."""

from __future__ import annotations

from torch import nn
from torch.testing import assert_close

from apportion.methods import find
from tests.conftest import DIM, shake, tokens_of


def test_two_tokens_answer_and_no_other():
    head = shake(find("head", "distilled")(norm=nn.Identity(), project=nn.Linear(DIM, 5), macs_per_token=DIM * 5, dim=DIM)).requires_grad_(False)
    nn.init.normal_(head.project_distilled.weight)
    tokens = tokens_of(2, 9, prefix=2)
    wanted = 0.5 * head.project(tokens.x[:, 0]) + 0.5 * head.project_distilled(tokens.x[:, 1])
    assert_close(head(tokens), wanted)
    tokens.x[:, 2:] = 0
    assert_close(head(tokens), wanted)
    assert head.macs(9, 2) == 2 * DIM * 5
