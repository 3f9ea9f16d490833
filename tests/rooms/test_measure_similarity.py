"""Matching tokens greedily: against two loops, and what must not change it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from apportion.errors import DataError
from apportion.measure.similarity import likeness, linear_map, matching


def states(b: int, n: int, d: int, *, seed: int) -> Tensor:
    return torch.randn(b, n, d, generator=torch.Generator().manual_seed(seed)) + 0.5


def cosine(u: Tensor, v: Tensor) -> float:
    dot = sum(a * b for a, b in zip(u.tolist(), v.tolist(), strict=True))
    return dot / math.sqrt(sum(a * a for a in u.tolist()) * sum(b * b for b in v.tolist()))


def naive(candidate: list[Tensor], reference: list[Tensor]) -> tuple[float, float, float]:
    precision = sum(max(cosine(u, v) for v in reference) for u in candidate) / len(candidate)
    recall = sum(max(cosine(u, v) for u in candidate) for v in reference) / len(reference)
    return precision, recall, 2 * precision * recall / (precision + recall)


def test_it_is_what_two_loops_say_and_padding_is_left_out() -> None:
    a, b = states(4, 5, 8, seed=0), states(4, 7, 8, seed=1)
    size, others = torch.ones(4, 5), torch.ones(4, 7)
    size[1, 3:], size[2, 0], others[3, 4:] = 0, 0, 0  # at the end, in front, and of the other side
    size[0, 1] = 3.0  # stands for three, counts once
    found = matching(a, b, size=size, reference_size=others)
    for row in range(4):
        wanted = naive([u for u, s in zip(a[row], size[row], strict=True) if s], [v for v, s in zip(b[row], others[row], strict=True) if s])
        assert [part[row].item() for part in found] == pytest.approx(wanted, abs=1e-6)
    assert not torch.allclose(found.precision, found.recall)


def test_what_padding_holds_changes_nothing() -> None:
    a, b, size = states(3, 4, 8, seed=0), states(3, 4, 8, seed=1), torch.ones(3, 4)
    alone = matching(a, b, size=size, reference_size=size)
    wide = [torch.cat([x, 100 * other], 1) for x, other in ((a, b), (b, a))]  # padding that would be the likest of all
    more = torch.cat([size, torch.zeros(3, 4)], 1)
    for got, wanted in zip(matching(*wide, size=more, reference_size=more), alone, strict=True):
        torch.testing.assert_close(got, wanted)
    negative = matching(-states(1, 2, 8, seed=2).abs(), states(1, 2, 8, seed=3).abs(), size=torch.tensor([[1, 0]]))
    assert negative.precision.item() < 0 and negative.recall.item() < 0 and negative.f1.item() == 0


def test_the_same_tokens_match_fully_in_any_order_and_at_any_length() -> None:
    a = states(3, 6, 8, seed=0)
    for other in (a, a[:, torch.randperm(6, generator=torch.Generator().manual_seed(0))], 3 * a):
        for part in matching(a, other):
            torch.testing.assert_close(part, torch.ones(3))
    half = matching(a[:, :3], a)
    torch.testing.assert_close(half.precision, torch.ones(3))
    assert bool((half.recall < 1).all())


def test_a_curve_ends_at_one_and_each_point_is_a_matching() -> None:
    each, size = [states(2, 5, 8, seed=seed) for seed in range(3)], torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    curve = likeness(each, size)
    assert curve.shape == (2, 3)
    torch.testing.assert_close(curve[:, 2], torch.ones(2))
    torch.testing.assert_close(curve[:, 1], matching(each[1], each[2], size=size, reference_size=size).f1)
    turned = [torch.linalg.qr(states(1, 8, 8, seed=seed)[0]).Q for seed in (7, 8)]
    rotated = [each[2] @ turned[0], each[2] @ turned[1], each[2]]
    assert bool((likeness(rotated, size)[:, :2] < 0.95).all())
    torch.testing.assert_close(likeness(rotated, size, maps=[q.mT for q in turned]), torch.ones(2, 3))


def test_a_map_is_least_squares() -> None:
    x, y = states(1, 60, 6, seed=0)[0], states(1, 60, 4, seed=1)[0]
    torch.testing.assert_close(linear_map(x, y, ridge=0.0), torch.linalg.lstsq(x, y).solution, rtol=1e-3, atol=1e-5)
    held = linear_map(x, y, ridge=0.5)
    gradient = x.mT @ (x @ held - y) + 0.5 * x.square().sum(0).mean() * held
    assert gradient.abs().max() < 1e-3 < held.abs().max()


def test_what_does_not_fit_is_named() -> None:
    a = states(2, 3, 4, seed=0)
    with pytest.raises(DataError, match="sizes"):
        matching(a, a, size=torch.ones(2, 4))
    with pytest.raises(DataError, match="tokens"):
        matching(a, a[..., :2])
    with pytest.raises(DataError, match="row 1"):
        matching(a, a, size=torch.tensor([[1, 1, 1], [0, 0, 0]]))
