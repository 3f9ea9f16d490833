"""Frames of a spectrogram: two convolutions by definition, sinusoids by definition, and what every tokeniser keeps to."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from apportion.errors import PathError
from apportion.measure.macs import executed_macs
from apportion.methods import find
from apportion.methods.tokeniser.frame import sinusoids
from apportion.network import Architecture
from tests.conftest import assert_same_state, shake, state_of

FRAMES, BANDS, DIM = 14, 5, 8


def tokeniser_of():
    torch.manual_seed(0)
    return shake(find("tokeniser", "frame")(frames=FRAMES, bands=BANDS, dim=DIM)).requires_grad_(False)


def spectrograms(batch):
    return torch.randn(batch, BANDS, FRAMES, generator=torch.Generator().manual_seed(0))


def test_it_is_what_its_weights_say():
    tokeniser, inputs = tokeniser_of(), spectrograms(2)
    tokens = tokeniser(inputs, 0)

    def convolved(x, conv, step):
        around = F.pad(x, (1, 1))
        return F.gelu(torch.stack([(conv.weight * around[:, None, :, at : at + 3]).sum((2, 3)) + conv.bias for at in range(0, FRAMES, step)], 2))

    wanted = convolved(convolved(inputs, tokeniser.first, 1), tokeniser.second, 2).transpose(1, 2)
    for place in range(7):
        for pair in range(4):
            angle = place * 10000 ** (-pair / 3)
            wanted[:, place, pair] += math.sin(angle)
            wanted[:, place, pair + 4] += math.cos(angle)
    assert_close(tokens.x, wanted, rtol=1e-4, atol=1e-5)
    a = Architecture(0, 0, DIM, 1, 1, 1, 0, frames=FRAMES, bands=BANDS, class_token=False)
    assert tokens.x.shape == (2, a.tokens, DIM) and a.input_shape == (BANDS, FRAMES) and tokens.prefix == a.prefix == 0 and not tokens.reduced
    assert (tokens.size == 1).all() and torch.equal(tokens.origin, torch.arange(7).expand(2, 7))


def test_positions_are_kept_but_not_taught():
    tokeniser = tokeniser_of()
    assert "position" in tokeniser.state_dict() and "position" not in dict(tokeniser.named_parameters())
    assert torch.equal(tokeniser.position, sinusoids(7, DIM))


def test_gradient_company_and_multiply_adds():
    tokeniser, inputs = tokeniser_of(), spectrograms(3).requires_grad_()
    tokens = tokeniser(inputs, 0)
    tokens.x.square().sum().backward()
    assert inputs.grad is not None and (inputs.grad != 0).all()
    assert_close(tokeniser(inputs[1:2], 0).x, tokens.x[1:2], rtol=1e-4, atol=1e-5)
    assert executed_macs(lambda: tokeniser(spectrograms(1), 0)) == tokeniser.macs(0)


def test_other_inputs_are_refused_and_nothing_is_written():
    tokeniser = tokeniser_of()
    before = state_of(tokeniser)
    tokeniser(spectrograms(2), 0)
    assert_same_state(before, state_of(tokeniser))
    for wrong in (spectrograms(1).transpose(1, 2), spectrograms(1)[:, None], spectrograms(1)[..., 1:]):
        with pytest.raises(PathError, match="5, 14"):
            tokeniser(wrong, 0)
    with pytest.raises(PathError, match="patch 4"):
        tokeniser(spectrograms(1), 4)
