"""Blocks left out in the middle: the ends stay, and the gaps are even."""

from __future__ import annotations

import itertools

import pytest

from apportion.methods.depth.skip import Skip


@pytest.mark.parametrize("blocks", [2, 4, 7, 12, 24])
def test_the_ends_stay_and_the_gaps_are_even(blocks):
    for count, order in enumerate(Skip().orders(blocks), start=1):
        gaps = [after - before for before, after in itertools.pairwise(order)]
        assert len(order) == count and order[0] == 0
        assert count == 1 or (order[-1] == blocks - 1 and max(gaps) - min(gaps) <= 2)


def test_half_of_the_gaps_of_a_fine_example():
    assert Skip().orders(5) == ((0,), (0, 4), (0, 2, 4), (0, 1, 3, 4), (0, 1, 2, 3, 4))
