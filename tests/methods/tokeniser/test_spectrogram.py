"""Spectrograms in overlapping squares, against a plain loop, and what every tokeniser keeps to."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from apportion.errors import PathError
from apportion.measure.macs import executed_macs
from apportion.methods import find
from apportion.network import Architecture
from tests.conftest import assert_same_state, shake, state_of

FRAMES, BANDS, PATCH, DIM = 15, 11, 4, 8
steps = pytest.mark.parametrize("step", [(3, 2), (4, 5)])


def tokeniser_of(step):
    torch.manual_seed(0)
    return shake(find("tokeniser", "spectrogram")(frames=FRAMES, bands=BANDS, patch=PATCH, steps=step, dim=DIM, prefix=2)).requires_grad_(False)


def spectrograms(batch):
    return torch.randn(batch, FRAMES, BANDS, generator=torch.Generator().manual_seed(0))


@steps
def test_each_token_is_its_square_projected_plus_its_position(step):
    tokeniser, inputs = tokeniser_of(step), spectrograms(2)
    tokens, n = tokeniser(inputs, PATCH), 2
    for band in range(0, BANDS - PATCH + 1, step[0]):
        for frame in range(0, FRAMES - PATCH + 1, step[1]):
            square = inputs[:, frame : frame + PATCH, band : band + PATCH].transpose(1, 2).flatten(1)
            wanted = square @ tokeniser.project.weight.flatten(1).T + tokeniser.project.bias + tokeniser.position[n]
            assert_close(tokens.x[:, n], wanted, rtol=1e-4, atol=1e-5)
            n += 1
    a = Architecture(0, PATCH, DIM, 1, 1, 1, 0, frames=FRAMES, bands=BANDS, patch_steps=step, registers=1)
    assert tokens.x.shape == (2, n, DIM) and n == a.tokens and a.input_shape == (FRAMES, BANDS) and tokens.prefix == a.prefix == 2 and not tokens.reduced
    assert torch.equal(tokens.x[1, :2], tokeniser.first + tokeniser.position[:2])
    assert (tokens.size == 1).all() and torch.equal(tokens.origin, torch.arange(n).expand(2, n))


@steps
def test_gradient_company_and_multiply_adds(step):
    tokeniser, inputs = tokeniser_of(step), spectrograms(3).requires_grad_()
    tokens = tokeniser(inputs, PATCH)
    tokens.x.square().sum().backward()
    assert inputs.grad is not None and (inputs.grad[:, :4, :8] != 0).all()
    assert_close(tokeniser(inputs[1:2], PATCH).x, tokens.x[1:2], rtol=1e-4, atol=1e-5)
    assert executed_macs(lambda: tokeniser(spectrograms(1), PATCH)) == tokeniser.macs(PATCH)


@steps
def test_other_inputs_are_refused_and_nothing_is_written(step):
    tokeniser = tokeniser_of(step)
    before = state_of(tokeniser)
    tokeniser(spectrograms(2), PATCH)
    assert_same_state(before, state_of(tokeniser))
    for wrong in (spectrograms(1).transpose(1, 2), spectrograms(1)[:, None], spectrograms(1)[:, 1:]):
        with pytest.raises(PathError, match="15, 11"):
            tokeniser(wrong, PATCH)
    with pytest.raises(PathError, match="patch 0"):
        tokeniser(spectrograms(1), 0)
