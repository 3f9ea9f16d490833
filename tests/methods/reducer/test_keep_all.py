"""No reduction: the same object comes back, and fewer tokens are refused."""

from __future__ import annotations

import pytest

from apportion.errors import PathError
from apportion.methods.reducer.keep_all import KeepAll
from tests.conftest import mixed_of, tokens_of


def test_tokens_pass_and_fewer_are_refused():
    tokens = tokens_of(2, 7)
    assert KeepAll()(tokens, 7, mixed_of(tokens)) is tokens and KeepAll().macs(7, 7, 1, 4) == 0
    with pytest.raises(PathError, match="keep 6 of 7"):
        KeepAll()(tokens, 6, mixed_of(tokens))
