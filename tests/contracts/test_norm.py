"""What every norm keeps to."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from apportion.methods import find, names
from tests.conftest import DIM, assert_same_state, state_of, tokens_of

every = pytest.mark.parametrize("name", names("norm"))


@every
def test_each_token_is_by_itself(name):
    norm, x = find("norm", name)(DIM, eps=1e-6), tokens_of(3, 9).x
    assert_close(norm(x[1:2, 4:5]), norm(x)[1:2, 4:5])


@every
@pytest.mark.parametrize("scale", [1e4, 1e-4, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_stays_finite_and_keeps_the_type(name, scale, dtype):
    norm = find("norm", name)(DIM, eps=1e-6).to(dtype)
    x = (tokens_of(2, 9).x * scale).to(dtype).requires_grad_()
    out = norm(x)
    out.float().square().sum().backward()
    assert out.dtype == dtype and out.shape == x.shape and out.isfinite().all() and x.grad is not None and x.grad.isfinite().all()


@every
def test_it_writes_no_attribute(name):
    norm = find("norm", name)(DIM, eps=1e-6)
    before = state_of(norm)
    norm(tokens_of(2, 9).x)
    assert_same_state(before, state_of(norm))
