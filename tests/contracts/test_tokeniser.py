"""What every tokeniser of images keeps to; those of texts and of sound have their own tests."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from apportion.errors import PathError
from apportion.measure.macs import executed_macs
from apportion.methods import find, names
from tests.conftest import DIM, assert_same_state, images, shake, state_of

every = pytest.mark.parametrize("name", [name for name in names("tokeniser") if "image_size" in inspect.signature(find("tokeniser", name)).parameters])
shapes = pytest.mark.parametrize(
    ("stem", "class_token", "registers", "position_prefix"), [("patch", True, 2, False), ("patch", False, 0, True), ("conv", True, 0, True)]
)
PATCH = 4


def tokeniser_of(name: str, stem: str, class_token: bool, registers: int, position_prefix: bool) -> nn.Module:
    """The tokeniser with those of a network's facts that it asks for by name."""
    torch.manual_seed(0)
    facts = {
        "image_size": 16,
        "channels": 3,
        "patch": PATCH,
        "dim": DIM,
        "class_token": class_token,
        "registers": registers,
        "position_prefix": position_prefix,
        "bias": True,
        "stem": stem,
        "norm": nn.Identity(),
    }
    method = find("tokeniser", name)
    return shake(method(**{key: facts[key] for key in inspect.signature(method).parameters})).requires_grad_(False)


@every
@shapes
def test_one_token_for_each_patch_after_the_prefix(name, stem, class_token, registers, position_prefix):
    tokens = tokeniser_of(name, stem, class_token, registers, position_prefix)(images(2), PATCH)
    n = 16 + class_token + registers
    assert tokens.x.shape == (2, n, DIM) and tokens.prefix == class_token + registers and not tokens.reduced
    assert (tokens.size == 1).all() and torch.equal(tokens.origin, torch.arange(n).expand(2, n))


@every
@shapes
def test_the_gradient_reaches_every_pixel(name, stem, class_token, registers, position_prefix):
    inputs = images(2).requires_grad_()
    tokeniser_of(name, stem, class_token, registers, position_prefix)(inputs, PATCH).x.square().sum().backward()
    assert inputs.grad is not None and (inputs.grad.abs().sum(1) > 0).all()


@every
@shapes
def test_a_sample_does_not_depend_on_its_batch(name, stem, class_token, registers, position_prefix):
    tokeniser, inputs = tokeniser_of(name, stem, class_token, registers, position_prefix), images(3)
    assert_close(tokeniser(inputs[1:2], PATCH).x, tokeniser(inputs, PATCH).x[1:2], rtol=1e-4, atol=1e-5)


@every
@shapes
def test_multiply_adds_are_those_that_run(name, stem, class_token, registers, position_prefix):
    tokeniser = tokeniser_of(name, stem, class_token, registers, position_prefix)
    assert executed_macs(lambda: tokeniser(images(1), PATCH)) == tokeniser.macs(PATCH)


@every
@shapes
def test_a_wrong_size_is_refused_and_nothing_is_written(name, stem, class_token, registers, position_prefix):
    tokeniser = tokeniser_of(name, stem, class_token, registers, position_prefix)
    before = state_of(tokeniser)
    tokeniser(images(2), PATCH)
    assert_same_state(before, state_of(tokeniser))
    with pytest.raises(PathError):
        tokeniser(torch.zeros(1, 3, 20, 16), PATCH)
    with pytest.raises(PathError):
        tokeniser(images(1), PATCH + 1)
