"""Waveforms: convolutions, norms and positions by definition, and what every tokeniser keeps to."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from apportion.errors import PathError
from apportion.measure.macs import executed_macs
from apportion.methods import find
from apportion.network import Architecture
from tests.conftest import assert_same_state, shake, state_of

SAMPLES, DIM, KERNELS, STEPS = 203, 8, (10, 3, 2), (5, 2, 2)
flavours = pytest.mark.parametrize(("layer_norms", "kernel"), [(False, 4), (True, 5)])


def tokeniser_of(layer_norms, kernel):
    torch.manual_seed(0)
    return shake(
        find("tokeniser", "wave")(
            samples=SAMPLES,
            dim=DIM,
            channels=(4, 6, 6),
            kernels=KERNELS,
            steps=STEPS,
            layer_norms=layer_norms,
            bias=layer_norms,
            act=nn.GELU(),
            position_kernel=kernel,
            position_groups=2,
            project_norm=nn.LayerNorm(6),
            norm=nn.LayerNorm(DIM) if kernel == 4 else nn.Identity(),
        )
    ).requires_grad_(False)


def waves(batch):
    return torch.randn(batch, SAMPLES, generator=torch.Generator().manual_seed(0))


def normed(x, over):
    return (x - x.mean(over, keepdim=True)) / (x.var(over, correction=0, keepdim=True) + 1e-5).sqrt()


@flavours
def test_it_is_what_its_weights_say(layer_norms, kernel):
    tokeniser, wave = tokeniser_of(layer_norms, kernel), waves(1)
    x = wave[0].double()[None]  # (channels, n)
    for i, (width, step) in enumerate(zip(KERNELS, STEPS, strict=True)):
        layer = tokeniser.layers[i].double()
        bias = 0 if layer.conv.bias is None else layer.conv.bias
        x = torch.stack([(layer.conv.weight * x[:, at : at + width]).sum((1, 2)) + bias for at in range(0, x.shape[1] - width + 1, step)], 1)
        if layer_norms or i == 0:
            x = normed(x, 0 if layer_norms else 1) * layer.norm.weight[:, None] + layer.norm.bias[:, None]
        x = nn.functional.gelu(x)
    last = tokeniser.double()
    x = last.project(last.project_norm(x.T))
    around, half = [], DIM // 2
    for i in range(len(x)):
        seen = [x[j] if 0 <= j < len(x) else torch.zeros_like(x[0]) for j in range(i - kernel // 2, i - kernel // 2 + kernel)]
        groups = [torch.stack(seen, 1)[:half], torch.stack(seen, 1)[half:]]
        around.append(torch.cat([(last.position.weight[k * half : (k + 1) * half] * groups[k]).sum((1, 2)) for k in (0, 1)]) + last.position.bias)
    wanted = last.norm(x + nn.functional.gelu(torch.stack(around)))
    assert_close(last(wave.double(), 0).x[0], wanted, rtol=1e-9, atol=1e-9)


@flavours
def test_as_many_tokens_as_the_architecture_says(layer_norms, kernel):
    a = Architecture(0, 0, DIM, 1, 1, 1, 0, samples=SAMPLES, wave_channels=(4, 6, 6), wave_kernels=KERNELS, wave_steps=STEPS, class_token=False)
    tokens = tokeniser_of(layer_norms, kernel)(waves(2), 0)
    assert tokens.x.shape == (2, a.tokens, DIM) and tokens.prefix == a.prefix == 0 and not tokens.reduced and a.input_shape == (SAMPLES,)
    assert (tokens.size == 1).all() and torch.equal(tokens.origin, torch.arange(a.tokens).expand(2, a.tokens))


@flavours
def test_gradient_company_and_multiply_adds(layer_norms, kernel):
    tokeniser, inputs = tokeniser_of(layer_norms, kernel), waves(3).requires_grad_()
    tokens = tokeniser(inputs, 0)
    tokens.x.square().sum().backward()
    assert inputs.grad is not None and (inputs.grad[:, :190] != 0).all()
    assert_close(tokeniser(inputs[1:2], 0).x, tokens.x[1:2], rtol=1e-4, atol=1e-5)
    assert executed_macs(lambda: tokeniser(waves(1), 0)) == tokeniser.macs(0)


@flavours
def test_other_inputs_are_refused_and_nothing_is_written(layer_norms, kernel):
    tokeniser = tokeniser_of(layer_norms, kernel)
    before = state_of(tokeniser)
    tokeniser(waves(2), 0)
    assert_same_state(before, state_of(tokeniser))
    for wrong in (waves(2)[:, 1:], waves(2)[:, None], waves(1)[0]):
        with pytest.raises(PathError, match="203"):
            tokeniser(wrong, 0)
    with pytest.raises(PathError, match="patch 4"):
        tokeniser(waves(1), 4)


def test_a_norm_over_time_sees_how_much_silence_follows():
    quiet = waves(1) * (torch.arange(SAMPLES) < 120)
    for layer_norms, same in ((False, False), (True, True)):
        tokeniser = tokeniser_of(layer_norms, 5)
        louder = quiet + waves(1) * (torch.arange(SAMPLES) >= 190)
        assert torch.allclose(tokeniser(quiet, 0).x[:, :2], tokeniser(louder, 0).x[:, :2], atol=1e-5) == same
