"""Patch embedding against a plain loop over squares, and what stands in front."""

from __future__ import annotations

import torch
from torch import nn
from torch.testing import assert_close

from apportion.methods import find
from tests.conftest import images, tiny

FACTS = {"image_size": 16, "channels": 3, "patch": 4, "dim": 32, "class_token": True, "registers": 0, "position_prefix": None, "bias": True, "stem": "patch"}


def test_each_token_is_its_square_projected_plus_its_position():
    tokeniser, inputs = tiny("mean").tokeniser, images(2)
    tokens = tokeniser(inputs, 4)
    for place in range(16):
        row, column = divmod(place, 4)
        square = inputs[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten(1)
        wanted = square @ tokeniser.project.weight.flatten(1).T + tokeniser.project.bias + tokeniser.position[place]
        assert_close(tokens.x[:, place], wanted, rtol=1e-4, atol=1e-5)


def test_what_stands_in_front_does_not_depend_on_the_image():
    with_positions, without = tiny("class_token").tokeniser, tiny("registers").tokeniser
    assert torch.equal(with_positions(images(2), 4).x[1, 0], with_positions.first[0] + with_positions.position[0])
    assert torch.equal(without(images(2), 4).x[1, :4], without.first) and without(images(2), 4).prefix == 4


def test_the_convolutional_stem_lands_on_the_same_grid():
    assert tiny("conv_stem").tokeniser.project(images(2)).shape[-2:] == (4, 4)


def test_without_learned_positions_a_token_is_its_square_alone():
    tokeniser, plain = tiny("registers").tokeniser, tiny("registers").tokeniser
    plain.position = None
    tokens = plain(images(2), 4)
    assert_close(tokens.x[:, 4:], tokeniser(images(2), 4).x[:, 4:] - tokeniser.position, rtol=1e-4, atol=1e-5)
    assert find("tokeniser", "patch")(**FACTS, norm=nn.Identity()).position is None
