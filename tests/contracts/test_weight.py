"""What every weight format keeps to: it is one matrix and one bias, whatever they are stored as."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from apportion.methods import find, names
from tests.conftest import assert_same_state, shake, state_of

every = pytest.mark.parametrize("name", names("weight"))
bias = pytest.mark.parametrize("bias", [True, False])
INP, OUT = 12, 8


def weight_of(name: str, bias: bool) -> nn.Module:
    torch.manual_seed(0)
    method, dense = find("weight", name), find("weight", "dense")(INP, OUT, bias=bias)
    return shake(dense if type(dense) is method else method.from_dense(dense)).requires_grad_(False)


def stored(weight) -> tuple[Tensor, Tensor]:
    """The matrix (out, inp) and the bias (out,) that it acts as."""
    bias = weight(torch.zeros(INP))
    return (weight(torch.eye(INP)) - bias).T, bias


@every
@bias
def test_every_slice_is_a_slice_of_its_own_matrix(name, bias):
    weight, x = weight_of(name, bias), torch.randn(3, 5, INP, generator=torch.Generator().manual_seed(1))
    matrix, offset = stored(weight)
    assert (weight.in_features, weight.out_features) == (INP, OUT) and bool(offset.any()) == bias
    for out in (None, 2, 4, OUT):
        for inp in (None, 4, 8, INP):
            given = x[..., :inp]
            assert_close(weight(given, out=out, inp=inp), given @ matrix[:out, :inp].T + offset[:out], rtol=1e-4, atol=1e-5)


@every
@bias
def test_it_can_be_put_into_another_order(name, bias):
    weight, x = weight_of(name, bias), torch.randn(3, INP, generator=torch.Generator().manual_seed(1))
    before, strength = weight(x), weight.strength()
    assert_close(strength, stored(weight)[0].square().sum(0), rtol=1e-4, atol=1e-5)
    out, inp = torch.randperm(OUT, generator=torch.Generator().manual_seed(2)), torch.randperm(INP, generator=torch.Generator().manual_seed(3))
    weight.permute(out=out, inp=inp)
    assert_close(weight(x[:, inp]), before[:, out], rtol=1e-4, atol=1e-5)
    assert_close(weight.strength(), strength[inp], rtol=1e-4, atol=1e-5)


@every
@bias
def test_it_can_be_stored_and_nothing_is_written(name, bias):
    weight, x = weight_of(name, bias), torch.randn(3, INP)
    before = state_of(weight)
    wanted = weight(x)
    assert_same_state(before, state_of(weight))
    other = shake(copy.deepcopy(weight), seed=9)
    other.load_state_dict(weight.state_dict())
    assert torch.equal(other(x), wanted)
