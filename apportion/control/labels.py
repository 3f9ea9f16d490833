"""From a table of right and wrong answers to how much compute each sample needs, and what each rung earns on it."""

from __future__ import annotations

import torch
from torch import Tensor

from apportion.errors import ControlError
from apportion.vocab import Outcomes

FEWEST_ROWS = 40  # below this an inner split leaves nothing to stop by


def stable_correct(ok: Tensor) -> tuple[Tensor, Tensor]:
    """The cheapest rung from which on every dearer rung is right too, and whether there is one.

    Asking for all dearer rungs removes lucky hits. Where the last rung is wrong no rung qualifies: the answer is rung 0, since more
    compute does not help, and `solvable` is False. Shapes: ok (n, k) bool -> rung (n,) int64, solvable (n,) bool. Cost: O(n k).
    """
    stable = ok.flip(1).int().cummin(1).values.flip(1)
    solvable = ok[:, -1].clone()
    return torch.where(solvable, stable.argmax(1), 0), solvable


def task_reward(correct: Tensor, *, penalty: float) -> Tensor:
    """What each rung earns on each sample: 1 if right, -penalty if wrong where the full path is right, else 0; divided by 1 + penalty.

    The division makes a step from avoidable error to right worth exactly 1, the scale of a probability. Shapes: (n, k) bool -> (n, k).
    """
    avoidable = ~correct & correct[:, -1:]
    return (correct.float() - penalty * avoidable.float()) / (1.0 + penalty)


def folds(rows: int, parts: int, *, seed: int) -> tuple[Tensor, ...]:
    """Row numbers shuffled by `seed` and cut into `parts` of nearly equal size."""
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).tensor_split(parts)


def check_table(outcomes: Outcomes) -> None:
    """Raises ControlError where nothing can be learned: too few rows or rungs, one cost for all, a signal that is not finite (names the row)."""
    rows, rungs = outcomes.correct.shape
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
