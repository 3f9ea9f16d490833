"""Nested heads: which numbers are offered, and that a head left out is a head never computed."""

from __future__ import annotations

import pytest
import torch

from apportion.vocab import Choice
from tests.conftest import DIM, HEADS, fitted, images, tiny, tokens_of


@pytest.mark.parametrize(("heads", "wanted"), [(12, (3, 6, 9, 12)), (4, (1, 2, 3, 4)), (6, (1, 3, 4, 6)), (3, (1, 2, 3)), (1, (1,))])
def test_a_quarter_a_half_three_quarters_and_all(heads, wanted):
    mixer = fitted("mixer", "head_prefix")[0]
    mixer.part.choices = (heads,)
    assert type(mixer).from_dense(mixer.part).choices == wanted


def test_what_is_left_out_is_not_read():
    mixer, tokens, c = fitted("mixer", "head_prefix")[0], tokens_of(2, 9), DIM // HEADS
    wanted = mixer(tokens, 2).out
    mixer.part.qkv.weight[2 * 3 * c :] = torch.nan
    mixer.part.proj.weight[:, 2 * c :] = torch.nan
    assert torch.equal(mixer(tokens, 2).out, wanted) and mixer(tokens, HEADS).out.isnan().all()


def test_blocks_may_differ():
    network = tiny("class_token", Choice("mixer", "head_prefix"))
    mixed = network.space.path(heads=(1, 4, 2, 3))
    assert network.macs(network.space.path(heads=1)) < network.macs(mixed) < network.macs(network.space.full)
    assert network(images(2), mixed).shape == (2, 5)
