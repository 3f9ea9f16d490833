"""No norm is no norm."""

from __future__ import annotations

from apportion.methods.norm.identity import NoNorm
from tests.conftest import tokens_of


def test_nothing_happens():
    x = tokens_of(2, 3).x
    assert NoNorm()(x) is x
