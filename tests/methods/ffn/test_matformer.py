"""Nested widths: what the paper claims of slices, mixes, cost and the joint gradient."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch.testing import assert_close

from apportion.vocab import Choice
from tests.conftest import DEPTH, DIM, HIDDEN, fitted, images, tiny, tokens_of

WIDTHS = (HIDDEN // 8, HIDDEN // 4, HIDDEN // 2, HIDDEN)
uniform = [(width,) * DEPTH for width in WIDTHS]
mixes = [tuple(random.Random(seed).choices(WIDTHS, k=DEPTH)) for seed in range(8)]


def nested():
    return tiny("class_token", Choice("ffn", "matformer"))


@pytest.mark.parametrize("widths", [*uniform, *mixes], ids=str)
def test_a_slice_of_the_network_is_the_network_masked(widths):
    network, whole = nested(), tiny()
    for block, width in zip(whole.blocks, widths, strict=True):
        block.ffn.down.register_forward_pre_hook(lambda module, args, width=width: (args[0] * (torch.arange(HIDDEN) < width),), with_kwargs=False)
    masked = whole(images(2), whole.space.full)
    assert_close(network(images(2), network.space.path(width=widths)), masked, rtol=1e-5, atol=1e-5)


def test_each_width_is_the_start_of_the_next():
    ffn, x = fitted("ffn", "matformer")[0], tokens_of(1, 3).x
    assert ffn.choices == WIDTHS
    for small, large in itertools.pairwise(WIDTHS):
        between = ffn(x, large) - ffn(x, small)
        hidden = ffn.part.act(ffn.part.up(x))[..., small:large]
        assert_close(between, hidden @ ffn.part.down.weight[:, small:large].T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("hidden", "wanted"), [(64, (8, 16, 32, 64)), (1536, (192, 384, 768, 1536)), (3, (1, 3)), (1, (1,))])
def test_widths_are_an_eighth_a_quarter_a_half_and_all(hidden, wanted):
    ffn = fitted("ffn", "matformer")[0]
    ffn.part.choices = (hidden,)
    assert type(ffn).from_dense(ffn.part).choices == wanted


def test_cost_is_proportional_to_the_width():
    network = nested()
    space = network.space
    fixed = network.macs(space.path(width=WIDTHS[0])) - DEPTH * 2 * space.tokens * DIM * WIDTHS[0]
    for widths in (*uniform, *mixes):
        assert network.macs(space.path(width=widths)) == fixed + 2 * space.tokens * DIM * sum(widths)


def test_the_joint_gradient_is_the_sum_of_the_single_ones():
    network = nested().requires_grad_(True)
    parameters = [parameter for parameter in network.blocks.parameters() if parameter.ndim > 1]

    def gradient(*widths):
        loss = torch.stack([network(images(2), network.space.path(width=width)).square().mean() for width in widths]).sum()
        return torch.autograd.grad(loss, parameters)

    singles = [gradient(width) for width in WIDTHS]
    for joint, *parts in zip(gradient(*WIDTHS), *singles, strict=True):
        assert_close(joint, torch.stack(parts).sum(0), rtol=1e-4, atol=1e-5)


def test_units_outside_a_slice_receive_no_gradient():
    ffn = fitted("ffn", "matformer")[0].requires_grad_(True)
    ffn(tokens_of(2, 3).x, WIDTHS[1]).square().sum().backward()
    up, down = ffn.part.up.weight.grad, ffn.part.down.weight.grad
    assert not up[WIDTHS[1] :].any() and not down[:, WIDTHS[1] :].any() and (up[: WIDTHS[1]] != 0).any(1).all()
