"""What every depth rule keeps to."""

from __future__ import annotations

import pytest

from apportion.methods import names
from tests.conftest import fitted

every = pytest.mark.parametrize("name", names("depth"))


@every
@pytest.mark.parametrize("blocks", [1, 2, 3, 12, 25])
def test_orders_are_in_range_ascending_and_end_with_all_of_them_once(name, blocks):
    depth, _ = fitted("depth", name)
    orders = depth.orders(blocks)
    assert orders[-1] == tuple(range(blocks))
    for order in orders:
        assert order and all(0 <= block < blocks for block in order) and list(order) == sorted(set(order))


@every
@pytest.mark.parametrize("blocks", [1, 2, 3, 12, 25])
def test_each_number_of_blocks_is_offered_at_most_once_fewest_first(name, blocks):
    counts = [len(order) for order in fitted("depth", name)[0].orders(blocks)]
    assert counts == sorted(set(counts))


@every
def test_it_says_whether_it_skips(name):
    depth, _ = fitted("depth", name)
    assert depth.skips == (len(depth.orders(6)) > 1)
