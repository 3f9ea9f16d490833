"""Which paths to try, and which of those to serve."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import product

import torch
from torch import Tensor

from apportion.control.labels import stable_correct
from apportion.errors import ControlError
from apportion.methods.mix import mix
from apportion.vocab import Control, Path, Space

Blocks = tuple[int, ...]


def candidates(space: Space, glance: int) -> list[Path]:
    """A coarse family of paths, full last: every axis alone from mild to strong, and the milder choices of all axes combined.

    All share the first `glance` blocks at full, where the decision is made. A space that names its paths (`Space.family`) has these, of any other there are
    about 40 to 120 where depth, tokens and width are all adaptable, fewer where they are not. Raises PathError through the space, ControlError for a glance
    that is not inside the network.
    """
    if not 0 <= glance < space.depth:
        raise ControlError(f"a glance of {glance} blocks", wanted=f"0 to {space.depth - 1}", do="Decide before the last block.")
    if own := space.family():
        shared = space.full.steps[:glance]
        return [*(path for path in own if path.steps[:glance] == shared and path != space.full), space.full]
    depths, tokens, sizes = _depths(space, glance), _tokens(space, glance), _sizes(space)
    every = tuple(range(space.depth))
    shorter = [min(depths, key=lambda order, part=part: abs(len(order) - part * space.depth)) for part in (0.75, 0.5) if depths]
    full_size = (space.heads[-1], space.width[-1])

    def build(blocks: Blocks, schedule: tuple[int, ...], size: tuple[int, int]) -> Path:
        heads, width = ((whole,) * min(glance, len(blocks)) + (small,) * (len(blocks) - glance) for small, whole in zip(size, full_size, strict=True))
        return space.path(blocks=blocks, tokens=schedule[: len(blocks)], heads=heads, width=width)

    alone = (
        [build(blocks, tokens[0], full_size) for blocks in depths]
        + [build(every, schedule, full_size) for schedule in tokens]
        + [build(every, tokens[0], size) for size in sizes]
    )
    blended = [space.path(width=(space.width[-1],) * glance + widths) for widths in _blends(space, glance)]
    mixed = [build(*choice) for choice in product([every, *shorter], tokens[:4], [full_size, *sizes[:2]])]
    return [*(path for path in dict.fromkeys(alone + blended + mixed) if path != space.full), space.full]


def exits(space: Space, glance: int) -> list[Path]:
    """The beginnings of the full path from the glance on, full last: what checkpoints can serve. Raises ControlError where blocks cannot be left out."""
    if not space.skips:
        raise ControlError(
            "a network whose blocks all run", wanted="one that may leave some out", do='Put a depth method into the plan: Choice("depth", "skip").'
        )
    return [space.path(blocks=range(depth)) for depth in range(max(glance, 1), space.depth + 1)]


def entries(space: Space, glance: int) -> list[Path]:
    """Full, and full but for the tokens that enter, a dozen numbers of them at most, full last. Raises ControlError where fewer cannot."""
    if not space.entering:
        raise ControlError("a tokeniser that always makes all tokens", wanted="one that can make fewer", do="Use the method `apt`.")
    last = len(space.entering) - 1
    return [*(space.path(entering=space.entering[place]) for place in sorted({round(last * part / 11) for part in range(12)})), space.full]


def offered(space: Space, control: Control, glance: int) -> list[Path]:
    """What a way of control chooses from."""
    return {"glance": candidates, "checkpoints": exits, "entry": entries}[control](space, glance)


def _share(count: int, part: float) -> int:
    return max(1, round(count * part))


def _depths(space: Space, glance: int) -> list[Blocks]:
    """Blocks that run, shorter than full: what the depth method offers, one run of the middle left out, every second block, and early exits."""
    if not space.skips:
        return []
    every, first = tuple(range(space.depth)), max(glance, 1)
    inner = every[first:-1]
    runs = []
    for part in (0.125, 0.25, 0.5):
        gone = min(_share(space.depth, part), len(inner))
        start = first + (len(inner) - gone) // 2
        runs.append(every[:start] + every[start + gone :])
    second = every[:first] + inner[1::2] + every[-1:]
    exits = [every[:kept] for kept in range(first, space.depth, math.ceil(space.depth / 12))]
    offered = [order for order in space.orders if order[:first] == every[:first]]
    return [order for order in dict.fromkeys([*offered, *runs, second, *exits]) if order != every]


def _tokens(space: Space, glance: int) -> list[tuple[int, ...]]:
    """No reduction; merging at a constant rate, down to a share of the tokens; then halving at once, and halving twice."""
    dense = (space.tokens,) * space.depth
    movable = space.tokens - space.prefix
    if not space.reduces or movable < 2:
        return [dense]
    rates = [math.ceil(movable * gone / (space.depth - glance)) for gone in (0.4, 0.65, 0.9, 0.2)]
    steady = [space.merging(rate, start=glance, depth=space.depth) for rate in rates]
    half, quarter = (space.prefix + math.ceil(movable / parts) for parts in (2, 4))
    late = glance + (space.depth - glance) // 2

    def steps(*drops: tuple[int, int]) -> tuple[int, ...]:
        return tuple(min([space.tokens, *(left for start, left in drops if step >= start)]) for step in range(space.depth))

    return list(dict.fromkeys([dense, *steady, steps((glance, half)), steps((late, half)), steps((glance, half), (late, quarter))]))


def _sizes(space: Space) -> list[tuple[int, int]]:
    """(heads, width): the feed-forward narrowed to about a half, three quarters and a quarter, then heads, then both halved."""

    def near(choices: tuple[int, ...], part: float) -> int:
        return min(choices, key=lambda choice: abs(choice - part * choices[-1]))

    heads, width = space.heads[-1], space.width[-1]
    narrowed = [(heads, near(space.width, part)) for part in (0.5, 0.75, 0.25)]
    fewer = [(near(space.heads, part), width) for part in (0.5, 0.75)]
    both = (near(space.heads, 0.5), near(space.width, 0.5))
    return [size for size in dict.fromkeys([*narrowed, *fewer, both]) if size != (heads, width)]


def _blends(space: Space, glance: int) -> list[tuple[int, ...]]:
    """Widths that differ from block to block (mix'n'match): rising, as networks nested in training want them, and falling, as others do."""
    steps = space.depth - glance
    if len(space.width) < 2:
        return []
    rising = [mix(space.width, steps, round(part * steps * space.width[-1])) for part in (0.6, 0.75)]
    return [widths for blend in rising for widths in (blend, blend[::-1])]


def choose_rungs(accuracy: Tensor, cost: Tensor, limit: int, *, gap: float = 0.04, floor: float = 0.5, quality: Tensor | None = None) -> list[int]:
    """Which paths to serve: Pareto-optimal in cost and accuracy, `gap` of the full cost apart, at most `limit`, cheapest first, full last.

    Always in: the last (full) and the cheapest that gets at least `floor` of the full path's accuracy. The others are added greedily:
    with the table `quality` (n, k), whichever lowers the mean cost of the stable-correct oracle most, over samples the full path
    gets right; without, whichever raises the accuracy of the best single path over all budgets most. Paths dearer than full are out.
    Shapes: accuracy (k,), cost (k,) -> indices. Raises ControlError for a limit below 2. Cost: limit x k oracles.
    """
    if limit < 2:
        raise ControlError(f"a ladder of at most {limit} rungs", wanted="at least 2", do="Raise the number of rungs.")
    last = len(cost) - 1
    share = (cost / cost[last]).tolist()
    right = accuracy.tolist()
    useful = [index for index in _pareto(share, right) if share[index] <= 1 - gap and right[index] >= floor * right[last]]
    value = _staircase(share, right) if quality is None else _oracle_saving(torch.tensor(share), quality)
    chosen, reached = [*useful[:1], last], 0.0
    while len(chosen) < limit:
        apart = [index for index in useful if all(abs(share[index] - share[other]) >= gap for other in chosen)]
        grown = [sorted([*chosen, index], key=share.__getitem__) for index in apart]
        best = max(grown, key=value, default=chosen)
        reached = value(chosen)
        if best is chosen or value(best) <= reached:
            break
        chosen = best
    return chosen


def _pareto(cost: list[float], accuracy: list[float]) -> list[int]:
    """Indices that no other beats on both, cheapest first."""
    kept, best = [], -math.inf
    for index in sorted(range(len(cost)), key=lambda index: (cost[index], -accuracy[index])):
        if accuracy[index] > best:
            kept.append(index)
            best = accuracy[index]
    return kept


def _staircase(cost: list[float], accuracy: list[float]) -> Callable[[list[int]], float]:
    """Accuracy of the best single rung, integrated over budgets from the cheapest rung to the full path."""

    def area(rungs: Iterable[int]) -> float:
        total, best, before = 0.0, 0.0, 0.0
        for rung in rungs:
            total, best, before = total + best * (cost[rung] - before), max(best, accuracy[rung]), cost[rung]
        return total

    return area


def _oracle_saving(cost: Tensor, quality: Tensor) -> Callable[[list[int]], float]:
    """Minus the mean cost of the stable-correct oracle; samples that the full path gets wrong would all count as the cheapest, so they are left out."""
    solvable = quality[quality[:, -1] > 0]

    def saving(rungs: list[int]) -> float:
        index = torch.tensor(rungs)
        return -cost[index][stable_correct(solvable[:, index])[0]].double().mean().item()

    return saving
