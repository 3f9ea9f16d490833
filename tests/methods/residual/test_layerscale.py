"""LayerScale: a factor for each channel of the branch."""

from __future__ import annotations

import torch

from apportion.methods.residual.layerscale import LayerScale
from tests.conftest import DIM, tokens_of


def test_each_channel_has_its_factor():
    residual, x, branch = LayerScale(DIM, initial=0.5), tokens_of(2, 3).x, tokens_of(2, 3, seed=1).x
    assert torch.equal(residual(x, branch), x + 0.5 * branch)
    with torch.no_grad():
        residual.scale[3] = 0
    assert torch.equal(residual(x, branch)[..., 3], x[..., 3])


def test_the_factors_learn():
    residual = LayerScale(DIM)
    residual(tokens_of(2, 3).x, tokens_of(2, 3, seed=1).x).square().sum().backward()
    assert residual.scale.grad is not None and (residual.scale.grad != 0).all()
