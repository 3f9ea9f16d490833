"""Halting: how likely it is that a sample, or each of its tokens, leaves at each exit, and the exits that it should have taken, from tables of losses alone.

Elbayad et al. 2020, "Depth-Adaptive Transformer", arXiv 1910.10073, section 3: the exit classifiers learn by cross-entropy where an oracle that has seen every
exit would leave; one price on compute trades loss for depth. Exits are in order of cost; the last one is full. Supervised exits only: where a policy
may also skip, or where prices are to be set afterwards, `sequential` is the better fit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW

from apportion.control.complexity import REACH
from apportion.control.labels import FEWEST_ROWS
from apportion.errors import ControlError


def oracle(loss: Tensor, cost: Tensor, *, price: float) -> Tensor:
    """The exit of least loss plus price times cost, the first of several: (..., k) and (k,) -> (...) int64.

    The loss is a negative log-likelihood, or 1 where the answer is wrong and 0 where it is right: the paper's two oracles, with cost 1, 2, ... k.
    """
    return (loss.double() + price * cost.double()).argmin(-1)


def smoothed(loss: Tensor, *, sigma: float, real: Tensor | None = None) -> Tensor:
    """Each token's losses (n, t, k) as a mean over its neighbours, weighted by exp(-distance^2 / sigma); padding, where `real` (n, t) is False, has no weight.

    Sums in the paper are not divided by their weights; means keep a price in nats for each token, also at the ends of a text. Sigma 0 leaves all as it is.
    """
    place = torch.arange(loss.shape[1], device=loss.device, dtype=loss.dtype)
    squares = (place[:, None] - place).square()
    kernel = (-squares / sigma).exp() if sigma else (squares == 0).to(loss)
    weight = kernel.expand(len(loss), -1, -1) if real is None else kernel * real[:, None, :]
    return weight @ loss / weight.sum(-1, keepdim=True).clamp_min(torch.finfo(loss.dtype).tiny)


def geometric(stop: Tensor) -> Tensor:
    """Log-chances of each exit from the logits of stopping at each exit but the last, where what is left goes: (..., k - 1) -> (..., k)."""
    on = F.pad(F.logsigmoid(-stop).cumsum(-1), (1, 0))
    return on + F.pad(F.logsigmoid(stop), (0, 1))


def halt(stop: Tensor, *, threshold: float = 0.5) -> Tensor:
    """The first exit whose chance of stopping passes the threshold, else the last: (..., k - 1) -> (...) int64. Nothing behind it need be known."""
    over = F.pad(stop.sigmoid() > threshold, (0, 1), value=True)
    return over.int().argmax(-1)


def exit_loss(log_chance: Tensor, wanted: Tensor, real: Tensor | None = None) -> Tensor:
    """Cross-entropy of the oracle's exits (...) under log-chances (..., k), (); mean over what is real."""
    missed = -log_chance.gather(-1, wanted[..., None])[..., 0]
    return missed.mean() if real is None else (missed * real).sum() / real.sum()


class Halting(nn.Module):
    """A linear stop classifier for each exit but the last, on what is seen there: signal (n, k - 1, f) -> logits of stopping (n, k - 1).

    `at` asks one exit by itself, which is how it is served. Cost: f multiply-adds for each exit reached.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, exits: int, features: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(exits - 1, features)), nn.Parameter(torch.zeros(exits - 1))
        self.register_buffer("mean", torch.zeros(exits - 1, features))
        self.register_buffer("std", torch.ones(exits - 1, features))

    @property
    def macs(self) -> int:
        """Multiply-adds per sample and exit, closed form."""
        return self.weight.shape[1]

    def forward(self, signal: Tensor) -> Tensor:
        return (((signal - self.mean) / self.std).clamp(-REACH, REACH) * self.weight).sum(-1) + self.bias

    def at(self, place: int, signal: Tensor) -> Tensor:
        """Logits of stopping at one exit, (n, f) -> (n,)."""
        return ((signal - self.mean[place]) / self.std[place]).clamp(-REACH, REACH) @ self.weight[place] + self.bias[place]


def fit_halting(signal: Tensor, loss: Tensor, cost: Tensor, *, price: float, steps: int = 300) -> Halting:
    """Stop classifiers that leave where the oracle at this price would: signal (n, k - 1, f), loss (n, k), cost (k,) ascending.

    The whole table at once, from zero: no seed. Raises ControlError for tables that do not fit together, are not finite, or are too small.
    """
    n, exits = loss.shape
    if signal.shape[:2] != (n, exits - 1) or cost.shape != (exits,) or exits < 2 or n < FEWEST_ROWS or bool((cost.diff() < 0).any()):
        raise ControlError(
            f"signals {tuple(signal.shape)} and costs {tuple(cost.shape)} for {n} samples and {exits} exits",
            wanted=f"a signal at every exit but the last, costs in order, at least 2 exits and {FEWEST_ROWS} samples",
            do="Measure all exits on the same samples.",
        )
    broken = (~(signal.flatten(1).isfinite().all(1) & loss.isfinite().all(1))).nonzero()
    if len(broken):
        raise ControlError(f"a signal or loss that is not finite in row {int(broken[0])}", wanted="finite numbers", do="Look at this sample.")
    halting = Halting(exits, signal.shape[2])
    halting.mean.copy_(signal.mean(0))
    halting.std.copy_(signal.std(0).clamp_min(1e-6))
    wanted, optimiser = oracle(loss, cost, price=price), AdamW(halting.parameters(), lr=0.05, weight_decay=0.01)
    for _ in range(steps):
        optimiser.zero_grad()
        exit_loss(geometric(halting(signal)), wanted).backward()
        optimiser.step()
    return halting.requires_grad_(False)
