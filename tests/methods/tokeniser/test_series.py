"""Patches of series: each token by its definition, what is missing, what normalisation takes away, and what every tokeniser keeps to."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from apportion.errors import PathError, PlanError
from apportion.measure.macs import executed_macs
from apportion.methods import find
from apportion.methods.tokeniser.series import normalised
from apportion.network import Architecture, Network
from tests.conftest import assert_same_state, shake, state_of

POINTS, CHANNELS, DIM = 23, 3, 8
NAN = float("nan")
shapes = pytest.mark.parametrize(("patch", "stride", "prefix"), [(6, 3, 0), (4, 4, 2), (5, 1, 1), (23, 2, 0)])


def tokeniser_of(patch=6, stride=3, prefix=0):
    torch.manual_seed(0)
    made = find("tokeniser", "series")(points=POINTS, channels=CHANNELS, patch=patch, stride=stride, dim=DIM, prefix=prefix)
    return shake(made).requires_grad_(False)


def series(batch):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, CHANNELS, POINTS, generator=generator) * torch.tensor([1.0, 20, 0.3])[:, None] + torch.tensor([0.0, -70, 5])[:, None]


@shapes
def test_each_token_is_what_its_stretch_says(patch, stride, prefix):
    tokeniser, inputs = tokeniser_of(patch, stride, prefix), series(2)
    tokens = tokeniser(inputs, patch)
    a = Architecture(0, patch, DIM, 1, 1, 1, 0, channels=CHANNELS, points=POINTS, stride=stride, class_token=False, registers=prefix)
    assert tokens.x.shape == (2, a.tokens, DIM) and tokens.prefix == a.prefix == prefix and not tokens.reduced and a.input_shape == inputs.shape[1:]
    assert (tokens.size == 1).all() and torch.equal(tokens.origin, torch.arange(a.tokens).expand(2, a.tokens))
    for row in range(2):
        mean, variance = inputs[row].mean(1), inputs[row].var(1, correction=0)
        scaled = (inputs[row] - mean[:, None]) / (variance[:, None] + 1e-5).sqrt()
        scaled = torch.cat((scaled, scaled[:, -1:].repeat(1, stride)), 1)
        facts = torch.cat((mean.sign() * (1 + mean.abs()).log(), (1 + (variance + 1e-5).sqrt()).log()))
        level = tokeniser.level.weight @ facts
        wanted = [first + level for first in tokeniser.first]
        for place, start in enumerate(range(0, POINTS + stride - patch + 1, stride)):
            body = (tokeniser.project.weight * scaled[:, start : start + patch]).sum((1, 2)) + tokeniser.project.bias
            wanted.append(body + tokeniser.position[place] + level)
        assert len(wanted) == a.tokens
        assert_close(tokens.x[row], torch.stack(wanted), rtol=1e-4, atol=1e-4)


def test_what_is_missing_counts_for_nothing():
    inputs = series(3)
    inputs[0, 1, 4:7] = NAN  # a gap
    inputs[1, :, 15:] = NAN  # a shorter series
    inputs[2, 2] = NAN  # a channel with nothing in it
    x, mean, deviation = normalised(inputs)
    assert x.isfinite().all() and (x[inputs.isnan()] == 0).all() and (mean[2, 2], deviation[2, 2].square()) == (0, pytest.approx(1e-5))
    short, whole = normalised(inputs[1:2, :, :15]), (x[1:2, :, :15], mean[1:2], deviation[1:2])
    for ours, theirs in zip(whole, short, strict=True):
        assert_close(ours, theirs)
    kept = inputs[0, 1][~inputs[0, 1].isnan()]
    assert_close(mean[0, 1], kept.mean())
    assert_close(deviation[0, 1], (kept.var(correction=0) + 1e-5).sqrt())


def test_gaps_spoil_no_gradient_and_level_is_seen():
    tokeniser, inputs = tokeniser_of(prefix=1).requires_grad_(True), series(2)
    inputs[:, 0, :9] = NAN
    tokeniser(inputs, 6).x.square().sum().backward()
    assert all(value.grad is not None and value.grad.isfinite().all() and (value.grad != 0).any() for value in tokeniser.parameters())
    plain = tokeniser_of()
    assert (plain(inputs + 3, 6).x - plain(inputs, 6).x).abs().max() > 0.01  # a shift that normalisation takes away
    plain.level.weight.zero_()
    assert_close(plain(inputs * 4 + 3, 6).x, plain(inputs, 6).x, rtol=1e-3, atol=1e-3)


@shapes
def test_company_multiply_adds_and_nothing_written(patch, stride, prefix):
    tokeniser, inputs = tokeniser_of(patch, stride, prefix), series(3)
    before = state_of(tokeniser)
    assert_close(tokeniser(inputs[1:2], patch).x, tokeniser(inputs, patch).x[1:2], rtol=1e-4, atol=1e-4)
    assert executed_macs(lambda: tokeniser(inputs[:1], patch)) == tokeniser.macs(patch)
    assert_same_state(before, state_of(tokeniser))


def test_a_network_of_series_counts_what_runs():
    network = Network(Architecture(0, 6, 16, 2, 2, 32, 3, channels=CHANNELS, points=POINTS, stride=3, pool="mean", class_token=False)).eval()
    path = network.space.full
    assert executed_macs(lambda: network(series(1), path)) == network.macs(path) and network(series(5), path).shape == (5, 3)


def test_other_inputs_and_shapes_are_refused():
    tokeniser = tokeniser_of()
    for wrong in (series(2)[:, 1:], series(2)[..., 1:], series(1)[0]):
        with pytest.raises(PathError, match="3, 23"):
            tokeniser(wrong, 6)
    with pytest.raises(PathError, match="patch 4"):
        tokeniser(series(1), 4)
    for patch, stride in ((24, 3), (6, 7), (6, 0)):
        with pytest.raises(PlanError, match="patches of"):
            tokeniser_of(patch, stride)
