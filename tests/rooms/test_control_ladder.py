"""Which paths are tried and served, against exhaustive search on small tables."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from apportion.control.labels import stable_correct
from apportion.control.ladder import candidates, choose_rungs
from apportion.errors import ControlError
from apportion.vocab import Ladder, Path, Space

SMALL = Space(patch=16, depth=12, tokens=197, prefix=1, heads=(3, 6), width=(384, 768, 1152, 1536), reduces=True, skips=True)


@pytest.mark.parametrize(
    ("space", "glance"),
    [
        (SMALL, 1),
        (SMALL, 3),
        (Space(4, 6, 65, 1, (1, 2, 4), (64, 128, 256), True, True), 1),
        (Space(16, 24, 577, 5, (8, 16), (1024, 2048, 4096), True, True), 2),
    ],
)
def test_family_is_coarse_unique_and_shares_the_glance(space: Space, glance: int) -> None:
    paths = candidates(space, glance)
    assert 40 <= len(paths) <= 120
    assert len(set(paths)) == len(paths) == len({path.name for path in paths})
    assert paths[-1] == space.full
    Ladder(tuple(paths), glance)
    assert space.path(blocks=range(glance)) in paths


def test_family_moves_only_along_axes_that_the_space_has() -> None:
    def varied(space: Space) -> set[str]:
        full = space.full
        steps = [(path.blocks, path.tokens, path.heads, path.width) for path in candidates(space, 1) if path != full]
        whole = (full.blocks, full.tokens, full.heads, full.width)
        return {name for step in steps for name, one, all_ in zip(("blocks", "tokens", "heads", "width"), step, whole, strict=True) if one != all_[: len(one)]}

    assert candidates(Space(4, 4, 17, 1, (4,), (64,), False, False), 1) == [Path(4, (0, 1, 2, 3), (17,) * 4, (4,) * 4, (64,) * 4)]
    assert varied(Space(4, 4, 17, 1, (4,), (16, 64), False, False)) == {"width"}
    assert varied(Space(4, 4, 17, 1, (4,), (64,), True, False)) == {"tokens"}
    assert varied(Space(4, 4, 17, 1, (2, 4), (64,), False, False)) == {"heads"}
    assert varied(Space(4, 4, 17, 1, (4,), (64,), False, True)) == {"blocks"}


def test_orders_of_the_depth_method_are_tried_where_they_share_the_glance() -> None:
    orders = ((0,), (0, 7), (0, 1, 6, 7), (0, 1, 2, 5, 6, 7), tuple(range(8)))
    space = Space(4, 8, 17, 1, (4,), (64,), False, True, orders)
    tried = {path.blocks for path in candidates(space, 2)}
    assert {(0, 1, 6, 7), (0, 1, 2, 5, 6, 7)} <= tried
    assert not tried & {(0,), (0, 7)}


def test_a_glance_outside_the_network_is_refused() -> None:
    with pytest.raises(ControlError, match="12 blocks"):
        candidates(SMALL, 12)


def test_rungs_are_pareto_optimal_apart_and_end_full() -> None:
    generator = torch.Generator().manual_seed(0)
    cost = torch.cat([torch.rand(60, generator=generator) * 1.1, torch.ones(1)])
    accuracy = torch.cat([(0.3 + 0.6 * cost[:-1] + 0.1 * torch.rand(60, generator=generator)).clamp_max(0.97), torch.tensor([0.96])])
    rungs = choose_rungs(accuracy, cost, 6)
    assert len(rungs) == 6 and rungs[-1] == 60
    assert all(bool((cost[choose_rungs(accuracy, cost, 20, gap=gap)].diff() >= gap).all()) for gap in (0.04, 0.1, 0.2))
    assert cost[choose_rungs(accuracy, cost, 20, gap=0.0)].diff().min() < 0.04
    for rung in rungs[:-1]:
        assert not any(cost[other] <= cost[rung] and accuracy[other] >= accuracy[rung] and other != rung for other in range(61))
    useful = [index for index in range(60) if accuracy[index] >= 0.5 * accuracy[-1] and cost[index] <= 0.96]
    assert rungs[0] == min(useful, key=lambda index: cost[index].item())


def test_useless_and_slower_paths_are_left_out() -> None:
    accuracy, cost = torch.tensor([0.1, 0.6, 0.95, 0.8, 0.9]), torch.tensor([0.1, 0.4, 1.2, 0.98, 1.0])
    assert choose_rungs(accuracy, cost, 5) == [1, 4]
    with pytest.raises(ControlError, match="at most 1"):
        choose_rungs(accuracy, cost, 1)


def test_with_a_table_the_next_rung_is_the_one_that_saves_the_oracle_most() -> None:
    generator = torch.Generator().manual_seed(1)
    need = torch.randint(0, 9, (400,), generator=generator)
    need[:250] = 3  # most samples need exactly path 3
    correct = torch.arange(9)[None] >= need[:, None]
    cost = torch.linspace(0.2, 1.0, 9)

    def spent(rungs: tuple[int, ...]) -> float:
        index = torch.tensor(rungs)
        return cost[index][stable_correct(correct[:, index])[0]].mean().item()

    accuracy = correct.double().mean(0)
    start = int((accuracy >= 0.5 * accuracy[-1]).int().argmax())
    assert start == 3
    best = min(((3, *middle, 8) for middle in combinations(range(4, 8), 1)), key=spent)
    assert choose_rungs(accuracy, cost, 3, quality=correct) == list(best)
    low = min(((0, *middle, 8) for middle in combinations(range(1, 8), 1)), key=spent)
    assert low == (0, 3, 8)
    assert choose_rungs(accuracy, cost, 3, floor=0.0, quality=correct) == list(low)
