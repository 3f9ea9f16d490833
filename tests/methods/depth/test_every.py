"""All blocks, and no other choice."""

from __future__ import annotations

from apportion.methods.depth.every import Every


def test_there_is_one_order():
    assert Every().orders(3) == ((0, 1, 2),)
