"""Inputs made to be dear: how far an adversary can drive up the compute of a controller, and whether the cap holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from apportion.errors import DataError, NoEffect, PlanError

Cost = Callable[[Tensor], Tensor]  # inputs (b, ...) -> expected cost (b,), differentiable
Bound = float | Tensor  # a tensor is broadcast over the inputs: channels that were normalised apart have bounds of their own


def relaxed_cost(worth: Tensor, price: Tensor, cost: Tensor, *, cap: float = torch.inf, temperature: float = 0.1) -> Tensor:
    """Expected cost of a choice drawn from softmax((worth - price * cost) / temperature) over the rungs within the cap: the soft form of the decision.

    As the temperature falls it becomes the cost of the rung that is served. Shapes: worth (b, k), price (), cost (k,) -> (b,).
    Raises PlanError where no rung is within the cap.
    """
    within = cost <= cap
    if not bool(within.any()):
        raise PlanError(f"a cap of {cap:.4g}", wanted=f"at least {cost.min().item():.4g}, the cheapest rung", do="Raise the cap.")
    chance = ((worth - price * cost) / temperature).masked_fill(~within, -torch.inf).softmax(-1)
    return (chance * cost).sum(-1)


def slow_down(cost: Cost, inputs: Tensor, *, radius: Bound, low: Bound = -torch.inf, high: Bound = torch.inf, steps: int = 20, seed: int | None = 0) -> Tensor:
    """Inputs within `radius` of these in every entry, and within low..high, that cost as much as projected gradient ascent can make them.

    Source: slow-down attacks, Haque et al. (ILFO, 2020) and Hong et al. (DeepSloth, 2021, arXiv 2010.02432); projected ascent along the gradient's sign after
    Madry et al. (2018, arXiv 1706.06083), the step going from half of the radius to nothing, from a random start (`seed`) or, with None, from the inputs.
    Each sample keeps its dearest point, the clean one included: never a cheaper one, as `cost` sees it.
    Raises NoEffect where the cost does not depend on the inputs. Cost: steps + 2 forward, `steps` backward passes.
    What it finds is a lower bound on what an adversary can do.
    """
    nearest, farthest = torch.maximum(inputs - radius, _full(low, inputs)), torch.minimum(inputs + radius, _full(high, inputs))
    now, best, dearest = inputs, inputs, cost(inputs).detach()
    if seed is not None:
        draw = torch.rand(inputs.shape, generator=torch.Generator().manual_seed(seed)).to(inputs)
        now = torch.lerp(nearest, farthest, draw)
    for step in range(steps):
        spent, slope = _slope(cost, now)
        best, dearest = _dearer(best, dearest, now, spent)
        now = (now + 0.5 * (1 - step / steps) * radius * slope.sign()).maximum(nearest).minimum(farthest)
    return _dearer(best, dearest, now, cost(now).detach())[0]


def slow_down_patch(cost: Cost, inputs: Tensor, *, side: int, low: float, high: float, steps: int = 50, seed: int = 0) -> Tensor:
    """One patch (c, side, side) that makes whatever it is pasted on dear: ascent on the mean cost of this batch, all values within low..high.

    Source: universal patches against adaptive vision transformers, Navaneet et al. (SlowFormer, 2024, arXiv 2310.02544). It sits in the upper left corner, see
    `paste`: judge it on inputs that it was not made on. The dearest patch met is returned. Raises DataError where it does not fit. Cost as `slow_down`.
    """
    draw = torch.rand(inputs.shape[1], side, side, generator=torch.Generator().manual_seed(seed)).to(inputs)
    now, dearest = low + (high - low) * draw, -torch.inf
    best = now
    for step in range(steps + 1):
        spent, slope = _slope(lambda patch: cost(paste(inputs, patch)), now)
        if spent.mean().item() > dearest:
            best, dearest = now, spent.mean().item()
        now = (now + 0.1 * (high - low) * (1 - step / (steps + 1)) * slope.sign()).clamp(low, high)
    return best


def paste(inputs: Tensor, patch: Tensor) -> Tensor:
    """The inputs (b, c, h, w) with the patch (c, s, s) over their upper left corner. Raises DataError where it does not fit."""
    channels, height, width = patch.shape
    if channels != inputs.shape[1] or height > inputs.shape[2] or width > inputs.shape[3]:
        raise DataError(f"a patch of {tuple(patch.shape)} on inputs of {tuple(inputs.shape[1:])}", wanted="one that fits", do="Give a smaller side.")
    here = torch.zeros(inputs.shape[2:], dtype=torch.bool, device=inputs.device)
    here[:height, :width] = True
    return torch.where(here, torch.nn.functional.pad(patch, (0, inputs.shape[3] - width, 0, inputs.shape[2] - height)), inputs)


def _full(bound: Bound, inputs: Tensor) -> Tensor:
    return torch.as_tensor(bound, dtype=inputs.dtype, device=inputs.device)


def _slope(cost: Cost, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Cost of each sample and the gradient of their sum, which holds every sample's own."""
    leaf = inputs.detach().requires_grad_()
    with torch.enable_grad():
        spent = cost(leaf)
        slope = torch.autograd.grad(spent.sum(), leaf, allow_unused=True)[0] if spent.requires_grad else None
    if slope is None:
        raise NoEffect("a cost that does not depend on the inputs", wanted="a differentiable one", do="Use the relaxed cost, without no_grad in it.")
    return spent.detach(), slope


def _dearer(best: Tensor, dearest: Tensor, now: Tensor, spent: Tensor) -> tuple[Tensor, Tensor]:
    more = spent > dearest
    return torch.where(more.view(-1, *[1] * (now.ndim - 1)), now, best), torch.where(more, spent, dearest)


@dataclass(frozen=True, slots=True)
class Inflation:
    """What an attack did to the served choices; costs are means, as shares of the full path."""

    before: float
    after: float
    at_cap: float  # share of attacked samples on the dearest rung within the cap
    over_cap: int  # samples beyond the cap, attacked or not: anything but 0 is a fault

    @property
    def ratio(self) -> float:
        """Compute after the attack for each unit before it."""
        return self.after / self.before


def inflation(before: Tensor, after: Tensor, cost: Tensor, *, cap: float = torch.inf) -> Inflation:
    """Weigh the served rungs of the same samples before and after an attack.

    Shapes: before (n,), after (n,), cost (k,) ascending, cap a share like the costs. Raises DataError where the samples do not pair up.
    """
    if before.shape != after.shape or before.ndim != 1 or not len(before):
        raise DataError(f"choices of {tuple(before.shape)} and {tuple(after.shape)}", wanted="the same samples twice", do="Attack all, then decide again.")
    clean, attacked = (cost[choice].double().mean().item() for choice in (before, after))
    # Compared in the type of the costs: a cap of 0.6 is below the double of a single-precision 0.6.
    over = cost > cap
    dearest = int((~over).sum()) - 1
    return Inflation(clean, attacked, (after == dearest).double().mean().item(), int(over[before].sum() + over[after].sum()))
