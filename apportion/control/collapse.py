"""Whether a policy still adapts: how varied its choices are, and a watch that ends a training in which they no longer depend on the input."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from apportion.errors import ControlError

LEAST_BITS = 0.01
PATIENCE = 150  # updates


class Collapse(NamedTuple):
    """How varied the choices are. The rule is deterministic, so the marginal entropy is also the information a choice carries about its input."""

    entropy_bits: float
    rungs_used: int
    largest_share: float


def collapse(choice: Tensor, *, rungs: int) -> Collapse:
    """The figures that show a policy which has stopped adapting. Shapes: choice (n,)."""
    share = torch.bincount(choice, minlength=rungs).double() / len(choice)
    return Collapse(_entropy(share).item(), int((share > 0).sum()), share.max().item())


def information(chance: Tensor) -> float:
    """Mutual information between input and action in bits: entropy of the mean choice less the mean entropy of a choice. Shapes: (n, k), rows of sum 1."""
    chance = chance.double()
    return (_entropy(chance.mean(0)) - _entropy(chance).mean()).item()


def _entropy(share: Tensor) -> Tensor:
    return -(share * share.clamp_min(1e-12).log2()).sum(-1)


class Watch:
    """Counts the updates since choices last told anything of their inputs, and raises ControlError after `patience` of them.

    A policy that always takes one path, or that draws at random without looking, carries 0 bits; the budget can be kept by both, so neither loss nor cost
    shows it; with a budget term alone training ends there (Wójcik et al. 2023, arXiv 2312.10193, section 3.3). Compare with the static hull as well: a policy
    may vary and still be worth nothing.
    """

    def __init__(self, *, patience: int = PATIENCE, least_bits: float = LEAST_BITS) -> None:
        self.patience, self.least_bits, self.blind = patience, least_bits, 0

    def see(self, bits: float, *, updates: int = 1) -> None:
        """`bits`: the most that choices told of their inputs at any budget, after `updates` more updates."""
        self.blind = 0 if bits >= self.least_bits else self.blind + updates
        if self.blind >= self.patience:
            raise ControlError(
                f"a policy whose choices tell {bits:.4f} bits of the input, for {self.blind} updates: it has collapsed to a static one",
                wanted=f"at least {self.least_bits} bits at some budget",
                do="Start again with more entropy or a lower rate; if it collapses again the signal tells nothing, so serve the best static path.",
            )
