"""What every optimiser keeps to."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from apportion.methods import find, names

every = pytest.mark.parametrize("name", names("optimiser"))


def problem(name: str):
    """A matrix and an offset, both of which want to be a target; and the optimiser that moves them."""
    generator = torch.Generator().manual_seed(0)
    start, wanted = torch.randn(2, 4, 3, generator=generator)
    parameters = {"layer.weight": nn.Parameter(start.clone()), "layer.bias": nn.Parameter(start[0].clone())}
    optimiser = find("optimiser", name)(parameters.items(), learning_rate=0.05, weight_decay=0.0)

    def step() -> float:
        optimiser.zero_grad()
        loss = (parameters["layer.weight"] - wanted).square().sum() + (parameters["layer.bias"] - wanted[0]).square().sum()
        loss.backward()
        optimiser.step()
        return loss.item()

    return parameters, optimiser, step


@every
def test_it_minimises_a_quadratic(name):
    _, _, step = problem(name)
    losses = [step() for _ in range(300)]
    assert losses[-1] < 1e-3 * losses[0]


@every
def test_weight_decay_reaches_matrices_and_nothing_else(name):
    weight, bias = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3))
    optimiser = find("optimiser", name)([("layer.weight", weight), ("layer.bias", bias)], learning_rate=0.1, weight_decay=0.5)
    weight.grad, bias.grad = torch.zeros(3, 3), torch.zeros(3)
    optimiser.step()
    assert (weight < 1).all() and torch.equal(bias, torch.ones(3))


@every
def test_a_run_that_was_stored_goes_on_bit_for_bit(name):
    parameters, optimiser, step = problem(name)
    for _ in range(5):
        step()
    file = io.BytesIO()
    torch.save(optimiser.state_dict(), file)
    values = copy.deepcopy({key: value.data for key, value in parameters.items()})
    for _ in range(5):
        step()
    again, other, step = problem(name)
    for key, value in values.items():
        again[key].data.copy_(value)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    for _ in range(5):
        step()
    assert all(torch.equal(again[key], parameters[key]) for key in parameters)
