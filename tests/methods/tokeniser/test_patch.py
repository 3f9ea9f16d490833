"""Patch embedding against a plain loop over squares, and what stands in front."""

from __future__ import annotations

import torch
from torch.testing import assert_close

from tests.conftest import images, tiny


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
