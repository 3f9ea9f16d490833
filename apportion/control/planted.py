"""A made-up population whose best controller is known: what everything that decides is tested on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from apportion.errors import ControlError
from apportion.vocab import Outcomes

COSTS = (0.2, 0.4, 0.7, 1.0)


class Planted(NamedTuple):
    """A table and the truth behind it; a rung is acceptable where it is right, or the full path is wrong as well."""

    outcomes: Outcomes
    difficulty: Tensor  # (n,) standard normal; the first feature of the signal is a noisy view of it
    right: Tensor  # (n, k) chance that the rung is right, given the difficulty
    right_seen: Tensor  # (n, k) the same, given the signal
    acceptable_seen: Tensor  # (n, k) chance that the rung is acceptable, given the signal: what the best controller weighs


def planted(
    rows: int,
    *,
    costs: Sequence[float] = COSTS,
    noise: float = 0.5,
    nuisance: int = 4,
    unsolvable: float = 0.1,
    lucky: float = 0.02,
    seed: int,
) -> Planted:
    """Draw samples that need one rung each, as many for every rung, the hardest share `unsolvable` none.

    Difficulty is z ~ N(0, 1). Rung j of k suffices where z <= t_j, t_j the quantile (1 - unsolvable) j / k; where it does not, a rung
    below the full one is right all the same with chance `lucky`. The signal holds the view z + noise * e and `nuisance` features that
    say nothing, so z given the signal is N(view / (1 + noise^2), noise^2 / (1 + noise^2)) and every chance has a closed form.
    Without noise and luck the signal tells all, and a controller can reach the oracle. There are two answers to choose from: rungs that
    are both wrong agree, and loss is -log((1 + margin) / 2) where right, -log((1 - margin) / 2) where wrong. The margin is the larger of
    two uniform draws where right, the smaller where wrong, hence P(right | margin m, z) = p m / (p m + (1 - p) (1 - m)), p = P(right | z).

    Shapes: signal (n, 1 + nuisance). The truth is float64. Raises ControlError on costs that do not rise to 1, or shares outside [0, 1).
    """
    _check(costs, noise, unsolvable, lucky)
    rungs, generator = len(costs), torch.Generator().manual_seed(seed)
    share = (1 - unsolvable) * torch.arange(1, rungs + 1, dtype=torch.float64) / rungs
    threshold = torch.special.ndtri(share)
    luck = torch.full((rungs,), lucky, dtype=torch.float64)
    luck[-1] = 0  # unsolvable means that the full path is wrong

    difficulty = torch.randn(rows, dtype=torch.float64, generator=generator)
    view = difficulty + noise * torch.randn(rows, dtype=torch.float64, generator=generator)
    signal = torch.cat([view[:, None], torch.randn(rows, nuisance, dtype=torch.float64, generator=generator)], 1)
    suffices = difficulty[:, None] <= threshold
    correct = suffices | (torch.rand(rows, rungs, dtype=torch.float64, generator=generator) < luck)
    draws = torch.rand(2, rows, rungs, dtype=torch.float64, generator=generator)
    margin = torch.where(correct, draws.amax(0), draws.amin(0))
    loss = -torch.log((1 + torch.where(correct, margin, -margin)) / 2)

    # The floor stands for a view without noise, where every chance below is 0 or 1.
    spread = max(noise / (1 + noise**2) ** 0.5, 1e-12)
    seen = torch.special.ndtr((threshold - view[:, None] / (1 + noise**2)) / spread)
    return Planted(
        Outcomes(signal.float(), correct, correct == correct[:, -1:], loss.float(), margin.float(), torch.tensor(costs)),
        difficulty,
        torch.where(suffices, 1.0, luck),
        seen + (1 - seen) * luck,
        1 - (1 - luck) * (seen[:, -1:] - seen),
    )


def _check(costs: Sequence[float], noise: float, unsolvable: float, lucky: float) -> None:
    if len(costs) < 2 or costs[0] <= 0 or costs[-1] != 1 or any(after <= before for before, after in pairwise(costs)):
        raise ControlError(f"costs {tuple(costs)}", wanted="two or more that rise to 1, the full path", do="Give costs as shares of the full path.")
    for name, value in (("unsolvable", unsolvable), ("lucky", lucky)):
        if not 0 <= value < 1:
            raise ControlError(f"{name} {value}", wanted="a share from 0 to below 1", do="Give a smaller share.")
    if not 0 <= noise < torch.inf:
        raise ControlError(f"noise {noise}", wanted="a standard deviation, 0 or more", do="For a signal that says nothing give a large one, such as 1e6.")
