"""The first n blocks: what was computed up to an exit is the start of every deeper path."""

from __future__ import annotations

import itertools

import torch

from apportion.methods.depth.first import First
from apportion.vocab import Choice
from tests.conftest import images, tiny


def test_a_smaller_depth_is_a_prefix_of_a_larger():
    orders = First().orders(5)
    assert orders[0] == (0,) and len(orders) == 5
    assert all(deeper[: len(shallow)] == shallow for shallow, deeper in itertools.pairwise(orders))


def test_leaving_after_n_blocks_is_the_head_on_the_features_there():
    network, notes = tiny("class_token", Choice("depth", "first")), {}
    network(images(2), network.space.full, notes)
    for n, order in enumerate(network.space.orders, start=1):
        path = network.space.path(blocks=order)
        there = network.norm(notes["feature"][n - 1])[:, 0]
        assert torch.equal(network(images(2), path), network.head.project(there))
