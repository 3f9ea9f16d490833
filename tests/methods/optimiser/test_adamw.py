"""AdamW against the paper's algorithm, written out."""

from __future__ import annotations

import torch
from torch import nn
from torch.testing import assert_close

from apportion.methods.optimiser.adamw import AdamW

RATE, DECAY, BETA1, BETA2, EPS = 0.1, 0.3, 0.9, 0.999, 1e-8


def test_ten_steps_are_those_of_the_algorithm():
    generator = torch.Generator().manual_seed(0)
    weight, bias = nn.Parameter(torch.randn(4, 3, generator=generator)), nn.Parameter(torch.randn(4, generator=generator))
    position = nn.Parameter(torch.randn(5, 3, generator=generator))
    named = {"layer.weight": weight, "layer.bias": bias, "position": position}
    values = {name: parameter.detach().clone() for name, parameter in named.items()}
    first, second = ({name: torch.zeros_like(value) for name, value in values.items()} for _ in range(2))
    optimiser = AdamW(named.items(), learning_rate=RATE, weight_decay=DECAY)
    for t in range(1, 11):
        for name, parameter in named.items():
            parameter.grad = gradient = torch.randn(parameter.shape, generator=generator)
            first[name] = BETA1 * first[name] + (1 - BETA1) * gradient
            second[name] = BETA2 * second[name] + (1 - BETA2) * gradient**2
            step = first[name] / (1 - BETA1**t) / ((second[name] / (1 - BETA2**t)).sqrt() + EPS)
            values[name] = values[name] - RATE * step - (RATE * DECAY * values[name] if name == "layer.weight" else 0)
        optimiser.step()
    for name, parameter in named.items():
        assert_close(parameter.detach(), values[name], rtol=1e-4, atol=1e-5)
