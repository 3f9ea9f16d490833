"""What every residual keeps to."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from apportion.methods import find, names
from tests.conftest import assert_same_state, fitted, shake, state_of, tokens_of

every = pytest.mark.parametrize("name", names("residual"))


@every
def test_a_branch_of_zeros_changes_nothing(name):
    residual, x = shake(fitted("residual", name)[0]), tokens_of(2, 9).x
    assert torch.equal(residual(x, torch.zeros_like(x)), x)


@every
def test_put_into_a_trained_network_it_is_the_plain_sum(name):
    residual, x, branch = fitted("residual", name)[0], tokens_of(2, 9).x, tokens_of(2, 9, seed=1).x
    if find("residual", name).card.exact:
        assert_close(residual(x, branch), x + branch)


@every
def test_each_token_is_by_itself_and_nothing_is_written(name):
    residual, x, branch = shake(fitted("residual", name)[0]), tokens_of(2, 9).x, tokens_of(2, 9, seed=1).x
    before = state_of(residual)
    assert_close(residual(x[1:, 4:5], branch[1:, 4:5]), residual(x, branch)[1:, 4:5])
    assert_same_state(before, state_of(residual))
