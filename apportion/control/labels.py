"""From a table of how good answers are to how much compute each sample needs, and what each rung earns on it."""

from __future__ import annotations

import torch
from torch import Tensor

from apportion.errors import ControlError
from apportion.vocab import Outcomes

FEWEST_ROWS = 40  # below this an inner split leaves nothing to stop by
ALIKE = 0.01  # quality that nobody misses, where it has more values than right and wrong


def acceptable(quality: Tensor) -> Tensor:
    """Where a rung loses nothing: it is right, or the full path is wrong as well; graded quality may fall by ALIKE. (n, k) -> (n, k) bool."""
    return quality.float() >= quality[:, -1:].float() - ALIKE


def stable_correct(quality: Tensor) -> tuple[Tensor, Tensor]:
    """The cheapest rung from which on no rung loses anything against the full path, and whether the full path is any good.

    Asking for all dearer rungs removes lucky hits. Where the full path is worth nothing every rung qualifies: the answer is rung 0, since more
    compute does not help, and `solvable` is False. Shapes: (n, k) -> rung (n,) int64, solvable (n,) bool. Cost: O(n k).
    """
    stable = acceptable(quality).flip(1).int().cummin(1).values.flip(1)
    return stable.argmax(1), quality[:, -1] > 0


def task_reward(quality: Tensor, *, penalty: float) -> Tensor:
    """What each rung earns on each sample: its quality, less `penalty` times what it loses against the full path; divided by 1 + penalty.

    Right is thus worth 1, wrong 0, and wrong where the full path is right -penalty; the division makes a step from avoidable error to right worth
    exactly 1, the scale of a probability. Shapes: (n, k) -> (n, k).
    """
    quality = quality.float()
    return (quality - penalty * (quality[:, -1:] - quality).clamp_min(0)) / (1.0 + penalty)


def folds(rows: int, parts: int, *, seed: int) -> tuple[Tensor, ...]:
    """Row numbers shuffled by `seed` and cut into `parts` of nearly equal size."""
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).tensor_split(parts)


def check_table(outcomes: Outcomes) -> None:
    """Raises ControlError where nothing can be learned: too few rows or rungs, one cost for all, a signal that is not finite (names the row)."""
    rows, rungs = outcomes.quality.shape
    if rows < FEWEST_ROWS or rungs < 2:
        raise ControlError(
            f"a table of {rows} samples and {rungs} rungs",
            wanted=f"at least {FEWEST_ROWS} samples and 2 rungs",
            do="Measure outcomes on more data, or let more paths into the ladder.",
        )
    if not outcomes.cost[0] < outcomes.cost[-1]:
        raise ControlError(f"{rungs} rungs that all cost {outcomes.cost[0].item():.4g}", wanted="a rung cheaper than the last", do="Add a cheaper path.")
    broken = (~outcomes.signal.isfinite()).any(1).nonzero()
    if len(broken):
        row = int(broken[0])
        raise ControlError(f"a signal that is not finite in row {row}", wanted="finite numbers", do="Look at this sample and at the glance's dtype.")
