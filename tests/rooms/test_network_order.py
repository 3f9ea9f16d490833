"""Sorting by importance: the output stays, and what matters comes first."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from apportion.network import sort_by_importance
from tests.conftest import DIM, FLAVOURS, HEADS, HIDDEN, PLAN, assert_same_state, images, state_of, tiny


@pytest.mark.parametrize("flavour", list(FLAVOURS))
@pytest.mark.parametrize("choices", [(), PLAN], ids=["dense", "adapted"])
def test_the_output_stays(flavour, choices):
    network = tiny(flavour, *choices)
    before = network(images(3), network.space.full)
    weight = network.blocks[0].state_dict()
    old = {name: value.clone() for name, value in weight.items()}
    sort_by_importance(network, [images(4, seed=1), images(2, seed=2)])
    assert_close(network(images(3), network.space.full), before, rtol=1e-5, atol=1e-5)
    assert any(not torch.equal(old[name], value) for name, value in weight.items())


def test_a_unit_and_a_head_that_matter_come_first():
    network, unit, head, c = tiny("class_token", *PLAN), 37, 2, DIM // HEADS
    for block in network.blocks:
        block.ffn.part.down.weight[:, unit] *= 100
        block.mixer.part.proj.weight[:, head * c : (head + 1) * c] *= 100
    up = [block.ffn.part.up.weight[unit].clone() for block in network.blocks]
    qkv = [block.mixer.part.qkv.weight[head * 3 * c : (head + 1) * 3 * c].clone() for block in network.blocks]
    sort_by_importance(network, [images(4)])
    for block, row, rows in zip(network.blocks, up, qkv, strict=True):
        assert torch.equal(block.ffn.part.up.weight[0], row) and torch.equal(block.mixer.part.qkv.weight[: 3 * c], rows)


def test_a_unit_that_never_fires_comes_last_however_strong_its_weights():
    network, unit = tiny("class_token", *PLAN), 5
    ffn = network.blocks[1].ffn.part
    ffn.up.bias[unit], ffn.down.weight[:, unit] = -1e4, 1e3
    row = ffn.up.weight[unit].clone()
    sort_by_importance(network, [images(4)])
    assert torch.equal(ffn.up.weight[-1], row) and ffn.up.bias[-1] == -1e4


def test_importance_falls_along_the_order():
    network = tiny("class_token", *PLAN)
    sort_by_importance(network, [images(4)])
    ffn, seen = network.blocks[2].ffn, []
    handle = ffn.contribution().into.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    network(images(4), network.space.full)
    handle.remove()
    importance = seen[0].square().flatten(0, 1).sum(0) * ffn.contribution().strength
    assert len(importance) == HIDDEN and (importance[1:] <= importance[:-1] * (1 + 1e-5)).all()


def test_sorting_a_second_time_changes_nothing_and_leaves_no_hook():
    network = tiny("class_token", *PLAN)
    sort_by_importance(network, [images(4)])
    before = state_of(network)
    sort_by_importance(network, [images(4)])
    assert_same_state(before, state_of(network))


def test_hooks_are_taken_away_when_the_data_fail():
    network = tiny()
    with pytest.raises(ZeroDivisionError):
        sort_by_importance(network, (images(1 // i) for i in (1, 0)))
    assert not any(module._forward_pre_hooks for module in network.modules())
