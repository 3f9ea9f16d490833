"""Mixes of nested widths: against all that never narrow, at every budget."""

from __future__ import annotations

import itertools

import pytest

from apportion.errors import PlanError
from apportion.methods.mix import mix, mixes
from apportion.vocab import Choice
from tests.conftest import DIM, images, tiny

CHOICES = (8, 16, 32, 64)


def steepness(widths: tuple[int, ...]) -> int:
    """The largest change between neighbours, counted in choices."""
    return max(abs(CHOICES.index(after) - CHOICES.index(before)) for before, after in itertools.pairwise(widths))


@pytest.mark.parametrize("depth", [2, 4, 5])
def test_they_are_all_that_never_narrow_between_two_neighbouring_widths(depth):
    rising = [widths for widths in itertools.product(CHOICES, repeat=depth) if list(widths) == sorted(widths)]
    wanted = [widths for widths in rising if CHOICES.index(widths[-1]) - CHOICES.index(widths[0]) <= 1]
    assert list(mixes(CHOICES, depth)) == sorted(wanted, key=sum) and len(wanted) == 3 * depth + 1


def test_a_budget_is_held_and_none_that_is_as_even_comes_nearer():
    for units in range(32, 257):
        found = mix(CHOICES, 4, units)
        assert sum(found) <= units and steepness(found) <= 1
        assert all(sum(widths) <= sum(found) for widths in mixes(CHOICES, 4) if sum(widths) <= units)


def test_uniform_widths_are_among_them_and_one_choice_is_one_mix():
    assert all(mix(CHOICES, 4, 4 * width) == (width,) * 4 for width in CHOICES)
    assert mixes((64,), 3) == ((64, 64, 64),) and mixes(CHOICES, 1) == ((8,), (16,), (32,), (64,))


def test_too_little_is_refused():
    with pytest.raises(PlanError, match="at least 32"):
        mix(CHOICES, 4, 31)


def test_every_mix_is_a_path_and_units_are_multiply_adds():
    network = tiny("class_token", Choice("ffn", "matformer")).requires_grad_(False)
    space, costs = network.space, []
    for widths in mixes(space.width, space.depth):
        path = space.path(width=widths)
        assert network(images(1), path).isfinite().all()
        costs.append(network.macs(path) - 2 * space.tokens * DIM * sum(widths))
    assert len(set(costs)) == 1
