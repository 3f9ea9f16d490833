"""Tokens pass as they are, at no cost."""

from __future__ import annotations

from apportion.methods.bridge.none import NoBridge
from tests.conftest import tokens_of


def test_nothing_is_done_and_nothing_charged():
    tokens = tokens_of(2, 9)
    assert NoBridge()(tokens, 1, 3) is tokens and NoBridge().macs(9, 1, 3) == 0 and NoBridge().runs == ()
