"""No adapter costs nothing."""

from __future__ import annotations

from apportion.methods.adapter.none import NoAdapter


def test_it_has_nothing_to_learn_and_nothing_to_count():
    assert not list(NoAdapter().parameters()) and NoAdapter().macs(100) == 0
