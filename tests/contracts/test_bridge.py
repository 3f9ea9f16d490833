"""What everything keeps to that stands for blocks which are left out."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from apportion.measure.macs import executed_macs
from apportion.methods import names
from apportion.network import Network, put
from apportion.vocab import Choice
from tests.conftest import assert_same_state, images, state_of, tiny, tokens_of

every = pytest.mark.parametrize("name", names("bridge"))
RUNS = "0-1 1-2 1-3 2-4 3-4"


def network_with(name: str) -> Network:
    network = tiny("class_token", Choice("depth", "skip"), Choice("ffn", "matformer"))
    if name != "none":
        put(network, Choice("bridge", name, options={"runs": RUNS}))
        for parameter in network.bridge.parameters():
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
        network.requires_grad_(False)
    return network


@every
def test_the_full_path_is_what_it_was_bit_for_bit(name):
    network = network_with(name)
    assert torch.equal(network(images(2), network.space.full), tiny()(images(2), tiny().space.full))


@every
def test_multiply_adds_are_those_that_run_on_every_way_of_leaving_out(name):
    network = network_with(name)
    for blocks in ((0,), (0, 1), (0, 3), (0, 1, 3), (1, 2, 3), (0, 2, 3), (2,)):
        path = network.space.path(blocks=blocks)
        assert executed_macs(lambda path=path: network(images(1), path)) == network.macs(path)
        start = network.tokeniser.macs(path.patch)
        assert start + sum(network.segment_macs(k, k + 1, path) for k in range(len(blocks))) == network.macs(path)
    glance = network.glance(2)
    first = network.tokeniser.macs(4) + network.segment_macs(0, 2, network.space.full)
    assert executed_macs(lambda: glance(images(1))) == first + glance.macs()


@every
def test_a_path_in_parts_is_the_path_as_a_whole(name):
    network = network_with(name)
    for blocks in ((0, 3), (0, 1), (0, 1, 3), (0, 2, 3)):
        path = network.space.path(blocks=blocks)
        wanted = network(images(2), path)
        assert torch.equal(network.at(path)(images(2)), wanted)
        for cut in range(1, len(blocks) + 1):
            start = network.run(network.tokeniser(images(2), 4), path.steps[:1], after=-1)
            middle = start if cut == 1 else network.segment(1, cut, path)(start)
            assert cut == len(blocks) or torch.allclose(network.segment(cut, len(blocks), path)(middle), wanted, atol=1e-5)
    exit_ = network.space.path(blocks=(0, 1))
    tokens, logits = network.station(0, 2)(images(2))
    assert torch.equal(logits, network(images(2), exit_))
    assert torch.equal(network.station(2, 4)(tokens)[1], network(images(2), network.space.full))  # what goes on is not mapped


@every
def test_it_writes_no_attribute_and_keeps_samples_apart(name):
    bridge, tokens = copy.deepcopy(network_with(name).bridge), tokens_of(3, 9)
    before = state_of(bridge)
    out = bridge(tokens, 1, 3)
    assert_same_state(before, state_of(bridge))
    alone = torch.cat([bridge(tokens._replace(x=tokens.x[k : k + 1], size=tokens.size[k : k + 1]), 1, 3).x for k in range(3)])
    torch.testing.assert_close(out.x, alone)
