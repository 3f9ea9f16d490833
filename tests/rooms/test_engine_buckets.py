"""Buckets from traffic, against every set there is, tried one by one."""

from __future__ import annotations

import math
import random
from itertools import combinations

import pytest

from apportion.engine.buckets import CALL_ROWS, choose, choose_lengths, expected, lengths, split
from apportion.errors import EngineError


def cost_of_groups(traffic: dict[int, int], buckets: tuple[int, ...], costs: dict[int, float]) -> float:
    prices = [costs[size] for size in buckets]
    return sum(often * sum(costs[size] for size in split(group, buckets, prices)) for group, often in traffic.items())


def cost_of_texts(tokens: dict[int, int], some: tuple[int, ...], costs: dict[int, float]) -> float:
    return sum(often * costs[min(size for size in some if size >= n)] for n, often in tokens.items())


def histogram(largest: int, seed: int) -> dict[int, int]:
    draw = random.Random(seed)
    return {size: draw.randint(1, 9) for size in draw.sample(range(1, largest + 1), draw.randint(1, largest - 1))}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("at_most", [1, 2, 3])
def test_no_set_of_buckets_costs_less(seed: int, at_most: int) -> None:
    traffic, draw = histogram(11, seed), random.Random(seed)
    plain = {size: size + CALL_ROWS for size in range(1, max(traffic) + 1)}
    uneven = {size: draw.uniform(0.5, 2.0) * size + 1 for size in range(1, 14)}
    for costs, given in ((plain, None), (uneven, uneven)):
        chosen = choose(traffic, at_most=at_most, costs=given)
        best = min(cost_of_groups(traffic, some, costs) for count in range(1, at_most + 1) for some in combinations(costs, count))
        assert len(chosen) <= at_most and cost_of_groups(traffic, chosen, costs) == pytest.approx(best, rel=1e-12)
        assert expected(traffic, chosen, given) == pytest.approx(best / sum(traffic.values()), rel=1e-12)


@pytest.mark.parametrize("largest", [5, 33, 100])
def test_three_chosen_never_cost_more_than_one_eight_and_thirty_two(largest: int) -> None:
    for seed in range(3):
        traffic = histogram(largest, seed)
        ours, usual = expected(traffic, choose(traffic, at_most=3)), expected(traffic, (1, 8, 32))
        assert ours <= usual * (1 + 1e-12)
    assert expected({20: 1}, choose({20: 1}, at_most=3)) < expected({20: 1}, (1, 8, 32)) - 1


def test_sizes_that_no_group_uses_are_not_built() -> None:
    assert choose({7: 3}, at_most=3) == (7,)
    assert choose({7: 3, 12: 0}, at_most=1) == (7,)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("at_most", [1, 2, 4])
def test_no_set_of_lengths_costs_less(seed: int, at_most: int) -> None:
    tokens, draw = histogram(10, seed), random.Random(seed)
    plain = {size: float(size) for size in range(1, 13)}
    falling = {size: draw.uniform(0.5, 2.0) * size for size in range(1, 13)}  # a longer graph may be the quicker one
    for costs, given in ((plain, None), (falling, falling)):
        chosen = choose_lengths(tokens, at_most=at_most, longest=12, costs=given)
        every = [(*some, 12) for count in range(at_most) for some in combinations(range(1, 12), count)]
        assert chosen[-1] == 12 and len(chosen) <= at_most and list(chosen) == sorted(set(chosen))
        assert cost_of_texts(tokens, chosen, costs) == pytest.approx(min(cost_of_texts(tokens, some, costs) for some in every), rel=1e-12)


def test_lengths_chosen_never_cost_more_than_doubled_ones() -> None:
    for seed in range(4):
        tokens = histogram(200, seed)
        usual, costs = lengths(200), {size: float(size) for size in range(1, 201)}
        assert cost_of_texts(tokens, choose_lengths(tokens, at_most=len(usual), longest=200), costs) < cost_of_texts(tokens, usual, costs)
    assert choose_lengths({3: 1, 5: 2}, at_most=9, longest=5) == (3, 5)


def test_what_makes_no_sense_is_refused() -> None:
    for traffic, at_most in (({}, 1), ({0: 1}, 1), ({3: -1}, 1), ({3: 0}, 1), ({3: math.inf}, 1), ({3: 1}, 0)):
        with pytest.raises(EngineError, match="traffic of"):
            choose(traffic, at_most=at_most)
    with pytest.raises(EngineError, match="costs"):
        choose({3: 1}, at_most=1, costs={3: 0.0})
    with pytest.raises(EngineError, match="sets of 9"):
        choose({256: 1}, at_most=9)
    with pytest.raises(EngineError, match="13 tokens"):
        choose_lengths({13: 1}, at_most=1, longest=12)
    with pytest.raises(EngineError, match="up to 8"):
        choose_lengths({3: 1}, at_most=1, longest=12, costs={8: 1.0})
