"""Splitting into buckets, grouping, padding and putting back, against brute force."""

from __future__ import annotations

from itertools import combinations_with_replacement

import pytest
import torch

from apportion.engine.buckets import CALL_ROWS, split
from apportion.engine.route import fill, group, join, some, take
from apportion.vocab import Tokens


def cheapest(count: int, buckets: tuple[int, ...], costs: tuple[float, ...]) -> float:
    """The least cost of any multiset of buckets that holds `count`, by trying them all."""
    price = dict(zip(buckets, costs, strict=True))
    most = -(-count // min(buckets))
    return min(sum(map(price.__getitem__, some)) for n in range(1, most + 1) for some in combinations_with_replacement(buckets, n) if sum(some) >= count)


@pytest.mark.parametrize("buckets, costs", [((1, 4, 6), (1.5, 4.5, 6.5)), ((2, 3, 7), (2.0, 2.5, 9.0)), ((1, 5), (3.0, 4.0)), ((4,), (1.0,))])
def test_split_is_the_cheapest_cover(buckets, costs):
    for count in range(1, 15):
        sizes = split(count, buckets, costs)
        assert sum(sizes) >= count and sizes == sorted(sizes, reverse=True)
        assert sum(costs[buckets.index(size)] for size in sizes) == pytest.approx(cheapest(count, buckets, costs))


def test_split_by_default_pads_only_where_calls_would_cost_more():
    assert split(41, (1, 8, 32)) == [32, 8, 1]
    assert split(2, (1, 8, 32)) == [1, 1]
    assert split(7, (1, 8, 32)) == [8]  # one row of padding for six calls less
    assert 8 + CALL_ROWS < 7 * (1 + CALL_ROWS)


def test_groups_hold_every_row_once_and_in_order():
    index = torch.randint(0, 5, (200,), generator=torch.Generator().manual_seed(0))
    groups = group(index)
    assert [rung for rung, _ in groups] == sorted(set(index.tolist()))
    for rung, rows in groups:
        assert rows == torch.nonzero(index == rung).flatten().tolist()


@pytest.mark.parametrize("count", [1, 3, 7, 40, 95])
def test_fill_keeps_the_order_and_pads_with_rows_of_the_same_group(count):
    rows = list(range(1000, 1000 + 3 * count, 3))
    pieces = fill(rows, (4, 16), among=1000)
    assert [row for piece, real, _ in pieces for row in piece[:real].tolist()] == rows
    assert all(len(piece) == size in (4, 16) and 1 <= real <= size and set(piece.tolist()) <= set(rows) for piece, real, size in pieces)


def test_all_rows_of_a_bucket_are_not_gathered():
    assert fill(range(16), (4, 16), among=16) == [(None, 16, 16)]
    assert [piece.rows.tolist() for piece in fill([0, 2, 3, 4], (4, 16), among=5)] == [[0, 2, 3, 4]]
    plain, turned = torch.randn(1, 4, 3), torch.randn(1, 3, 4).transpose(1, 2)
    assert some(plain, None) is plain and some(turned, None).stride() == plain.stride() and torch.equal(some(turned, None), turned)
    odd = torch.randn(2, 4, 3)[::2]  # contiguous by torch's own word, whose strides are not those of a graph's example
    assert odd.is_contiguous() and odd.stride() != plain.stride() == some(odd, None).stride()


def test_take_undoes_join_whatever_the_strides():
    x = torch.randn(6, 4, 3).transpose(1, 2)
    state = Tokens(x, torch.ones(1, 3).expand(6, 3), torch.arange(3).expand(6, 3), 1)
    half = [take(state, torch.tensor([4, 5])), take(state, torch.tensor([0]))]
    both = join(half, [2, 1])
    assert torch.equal(both.x, x[[4, 5, 0]]) and both.size.shape == both.origin.shape == (3, 3) and both.prefix == 1
    assert all(part.is_contiguous() for part in (*half[0][:3], *half[1][:3]))
    assert torch.equal(join(half, [1, 1]).x, x[[4, 0]]) and torch.equal(join(half[:1], [1]).x, x[[4]])
