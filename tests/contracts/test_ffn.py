"""What every FFN keeps to. One whose card says exact equals the plain one at full, and at a smaller width the plain one with the other units masked."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from apportion.measure.macs import executed_macs
from apportion.methods import find, names
from tests.conftest import DIM, HIDDEN, assert_same_state, fitted, state_of, tokens_of

every = pytest.mark.parametrize("name", names("ffn"))
exact = pytest.mark.parametrize("name", [name for name in names("ffn") if find("ffn", name).card.exact])


def masked(dense, x: torch.Tensor, width: int) -> torch.Tensor:
    """All hidden units are computed and those past `width` are set to zero."""
    return dense.down(dense.act(dense.up(x)) * (torch.arange(HIDDEN) < width))


@exact
def test_a_slice_is_the_plain_one_masked(name):
    ffn, dense = fitted("ffn", name)
    x = tokens_of(2, 9).x
    assert ffn.choices == tuple(sorted(ffn.choices)) and ffn.choices[-1] == HIDDEN
    for width in ffn.choices:
        assert_close(ffn(x, width), masked(dense, x, width), rtol=1e-4, atol=1e-6)
    # To the rounding of float64: a method may group tokens into products of its own, whose sums run in another order.
    assert_close(ffn.double()(x.double(), HIDDEN), dense.double()(x.double(), HIDDEN), rtol=1e-13, atol=1e-13)


@every
def test_each_token_is_by_itself(name):
    ffn, _ = fitted("ffn", name)
    x = tokens_of(3, 9).x
    for width in ffn.choices:
        assert_close(ffn(x[1:2, 4:5], width), ffn(x, width)[1:2, 4:5], rtol=1e-4, atol=1e-6)


@every
def test_multiply_adds_are_those_that_run_and_follow_the_width(name):
    ffn, _ = fitted("ffn", name)
    for width in ffn.choices:
        assert executed_macs(lambda w=width: ffn(tokens_of(1, 9).x, w)) == ffn.macs(9, width)
        assert ffn.macs(9, width) * HIDDEN == ffn.macs(9, HIDDEN) * width


@every
def test_units_in_another_order_give_the_same_output(name):
    ffn, _ = fitted("ffn", name)
    x, order = tokens_of(2, 9).x, torch.randperm(HIDDEN, generator=torch.Generator().manual_seed(1))
    before, importance = ffn(x, HIDDEN), ffn.contribution()
    smaller = ffn(x, ffn.choices[0])
    assert len(importance.strength) == importance.unit * HIDDEN
    ffn.permute(order)
    assert_close(ffn(x, HIDDEN), before, rtol=1e-4, atol=1e-6)
    assert_close(ffn.contribution().strength, importance.strength.view(HIDDEN, -1)[order].flatten())
    assert len(ffn.choices) == 1 or not torch.allclose(ffn(x, ffn.choices[0]), smaller, atol=1e-4)


@every
def test_shape_gradient_and_no_attribute(name):
    ffn, _ = fitted("ffn", name)
    x = tokens_of(2, 9).x.requires_grad_()
    before = state_of(ffn)
    out = ffn(x, ffn.choices[0])
    assert_same_state(before, state_of(ffn))
    out.square().sum().backward()
    assert out.shape == (2, 9, DIM) and x.grad is not None and (x.grad.abs().sum(-1) > 0).all()
