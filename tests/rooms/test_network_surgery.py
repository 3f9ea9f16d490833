"""Putting methods in: what is reported, what is offered afterwards, and that an error leaves the network whole."""

from __future__ import annotations

import pytest

from apportion.errors import NoEffect, PlanError
from apportion.methods.ffn.matformer import MatFormer
from apportion.network import Change, put
from apportion.vocab import Choice
from tests.conftest import DEPTH, HEADS, HIDDEN, PLAN, assert_same_state, images, state_of, tiny


def test_every_change_is_reported():
    network = tiny()
    assert put(network, Choice("ffn", "matformer")) == tuple(Change(f"blocks.{i}.ffn", "DenseFFN", "MatFormer") for i in range(DEPTH))
    assert put(network, Choice("depth", "first")) == (Change("network.depth", "Every", "First"),)
    changes = put(network, Choice("residual", "layerscale", blocks=(2,)))
    assert [change.where for change in changes] == ["blocks.2.residual1", "blocks.2.residual2"]


def test_what_is_put_in_is_what_can_be_asked_for():
    network = tiny()
    assert not network.space.reduces and not network.space.skips and network.space.width == (HIDDEN,) and network.space.heads == (HEADS,)
    for choice in PLAN:
        put(network, choice)
    space = network.space
    assert space.reduces and space.skips and space.width == (8, 16, 32, 64) and space.heads == (1, 2, 3, 4) and len(space.orders) == DEPTH
    assert network.macs(space.path(tokens=space.merging(3), heads=2, width=16)) < network.macs(space.full) == tiny().macs(tiny().space.full)


def test_one_reducer_takes_the_place_of_another():
    network = tiny("class_token", *PLAN)
    path = network.space.path(tokens=network.space.merging(4))
    merged = network(images(2), path)
    put(network, Choice("reducer", "evit"))
    assert not merged.equal(network(images(2), path))


def test_an_error_in_one_block_leaves_all_of_them_as_they_were():
    network = tiny()
    put(network, Choice("ffn", "matformer", blocks=(DEPTH - 1,)))
    before = state_of(network)
    with pytest.raises(NoEffect, match=f"blocks.{DEPTH - 1}"):
        put(network, Choice("ffn", "matformer"))
    assert_same_state(before, state_of(network))


def test_a_method_that_cannot_be_built_leaves_the_network_as_it_was(monkeypatch):
    network, built = tiny(), []

    def second_fails(cls, part):
        built.append(part)
        if len(built) == 2:
            raise PlanError("a part it cannot take", wanted="another", do="Choose one.")
        return cls(part)

    monkeypatch.setattr(MatFormer, "from_dense", classmethod(second_fails))
    before = state_of(network)
    with pytest.raises(PlanError):
        put(network, Choice("ffn", "matformer"))
    assert len(built) == 2
    assert_same_state(before, state_of(network))
