"""What every adapter keeps to. (Times one, below: the counter refuses a call in which nothing runs.)"""

from __future__ import annotations

import pytest
import torch

from apportion.measure.macs import executed_macs
from apportion.methods import names
from tests.conftest import assert_same_state, fitted, state_of, tokens_of

every = pytest.mark.parametrize("name", names("adapter"))


@every
def test_before_it_is_taught_the_branch_passes(name):
    x, branch = tokens_of(2, 9).x, tokens_of(2, 9, seed=1).x
    assert torch.equal(fitted("adapter", name)[0](x, branch), branch)


@every
def test_multiply_adds_are_those_that_run(name):
    adapter, _ = fitted("adapter", name)
    for n in (9, 16):
        x = tokens_of(1, n).x
        assert executed_macs(lambda x=x: adapter(x, x) * 1) == adapter.macs(n)


@every
def test_it_writes_no_attribute(name):
    adapter, x = fitted("adapter", name)[0], tokens_of(2, 9).x
    before = state_of(adapter)
    adapter(x, x)
    assert_same_state(before, state_of(adapter))
