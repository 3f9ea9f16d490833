"""Several experts in the place of one FFN, and a router that sends each token to one of them: more weights at the cost of one expert for each token.

Fedus et al. 2021, "Switch Transformers: Scaling to Trillion Parameter Models with Simple and Efficient Sparsity", arXiv 2101.03961, section 2. The expert is
the argmax of p = softmax(W x), without bias, in float32 at least. Experts start as copies of the trained FFN (Komatsuzaki et al. 2022, "Sparse Upcycling",
arXiv 2212.05055). In serving no token is dropped and each is by itself; groups follow the data, so that is eager only, no static graph. In training an
expert takes so many tokens of each sample, in their order, and the branch of the others is 0; add `BALANCE` times `balance` of each block, or one expert
gets everything. Cost: that of the FFN and d for each expert and token; memory: all experts. Not to make a network cheaper: it never is.
"""

from __future__ import annotations

import copy
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apportion.errors import PlanError
from apportion.methods import ops
from apportion.methods.slots import Contribution, FeedForward
from apportion.vocab import Card, Notes

BALANCE, JITTER, FEWEST = 1e-2, 1e-2, 4  # weight of `balance`, half the spread of the noise, slots of an expert at least: as published


class Switch(nn.Module):
    """`notes` receives "router" (b, n, experts), the logits.

    The branch is multiplied by 1 with the gradient of the expert's p; if `scaled`, by p itself, as published: for networks that are trained with it.
    """

    card = Card(
        "Switch Transformers",
        "Fedus et al. 2021",
        "2101.03961",
        None,
        exact=True,
        needs="training",
        changed="p counts in the gradient only, or copies of the FFN would answer p times what it did; a group is one sample; serving drops nothing",
    )

    def __init__(self, experts: list[nn.Module], dim: int, *, capacity: float, scaled: bool) -> None:
        super().__init__()
        self.experts, self.capacity, self.scaled = nn.ModuleList(experts), capacity, scaled
        self.choices: tuple[int, ...] = self._expert(0).choices
        self.router = nn.Linear(dim, len(experts), bias=False)
        std = (0.1 / dim) ** 0.5
        nn.init.trunc_normal_(self.router.weight, std=std, a=-2 * std, b=2 * std)

    @classmethod
    def from_dense(cls, part: nn.Module, *, dim: int, experts: int = 4, capacity: float = 1.25, scaled: bool = False) -> Self:
        """`capacity`: slots of the experts as a multiple of the tokens. Raises PlanError without an expert, and where the slots cannot hold the tokens."""
        if experts < 1 or capacity < 1:
            wanted = "at least 1 expert and a capacity of at least 1"
            raise PlanError(f"{experts} experts with a capacity of {capacity}", wanted=wanted, do="Correct the plan.")
        made = cls([copy.deepcopy(part) for _ in range(experts)], dim, capacity=capacity, scaled=scaled)
        made.router.to(next(part.parameters()).device)
        return made.train(all(module.training for module in part.modules()))  # a wrapper put on a moment ago does not know

    def forward(self, x: Tensor, width: int, notes: Notes | None = None, size: Tensor | None = None) -> Tensor:
        noisy = x * torch.empty_like(x).uniform_(1 - JITTER, 1 + JITTER) if self.training else x
        exact = torch.promote_types(x.dtype, torch.float32)
        logits = F.linear(noisy.to(exact), self.router.weight.to(exact))
        if notes is not None:
            notes.setdefault("router", []).append(logits)
        chance, expert = logits.softmax(-1).max(-1)
        out = self._limited(x, expert, width) if self.training else self._all(x, expert, width)
        if self.scaled:
            return out * chance[..., None].to(x)
        return out * (1 + (chance - chance.detach()))[..., None].to(x) if chance.requires_grad else out

    def _expert(self, index: int) -> FeedForward:
        return self.experts[index]  # pyright: ignore[reportReturnType]

    def _all(self, x: Tensor, expert: Tensor, width: int) -> Tensor:
        """Every token through its expert (b, n): one product for each expert."""
        order = expert.flatten().argsort(stable=True)
        groups = x.flatten(0, 1).index_select(0, order).split(expert.flatten().bincount(minlength=len(self.experts)).tolist())
        out = torch.cat([self._expert(index)(group, width) for index, group in enumerate(groups)])
        return torch.zeros_like(out).index_copy(0, order, out).view_as(x)

    def _limited(self, x: Tensor, expert: Tensor, width: int) -> Tensor:
        """Every expert on as many tokens of each sample as it has slots, whatever comes: shapes are static; 0 for tokens that found no slot."""
        b, n, d = x.shape
        slots = slots_of(n, len(self.experts), self.capacity)
        slot = placed(expert, len(self.experts), slots)
        none = x.new_zeros(b, 1, d)
        held = torch.full((b, len(self.experts) * slots + 1), n, device=x.device).scatter(1, slot, torch.arange(n, device=x.device).expand(b, n))
        full = ops.take(torch.cat((x, none), 1), held[:, :-1]).unflatten(1, (-1, slots))
        out = torch.cat([self._expert(index)(group, width) for index, group in enumerate(full.unbind(1))], 1)
        return ops.take(torch.cat((out, none), 1), slot)

    def macs(self, tokens: int, width: int) -> int:
        return self._expert(0).macs(tokens, width) + tokens * self.router.in_features * len(self.experts)

    def contribution(self) -> Contribution:
        """Of the first expert, on its own tokens: while all are copies, one expert's units speak for all."""
        return self._expert(0).contribution()

    def permute(self, order: Tensor) -> None:
        """Put the hidden units of every expert into this order; the output stays what it was."""
        for index in range(len(self.experts)):
            self._expert(index).permute(order)


def slots_of(tokens: int, experts: int, capacity: float) -> int:
    """How many of a sample's tokens one expert takes in training."""
    return min(tokens, max(FEWEST, int(tokens * capacity / experts)))


def placed(expert: Tensor, experts: int, slots: int) -> Tensor:
    """Where each token stands, (b, n): expert * slots + how many tokens before it had the same expert; experts * slots for those that are one too many."""
    mine = F.one_hot(expert, experts)
    before = ((mine.cumsum(1) - mine) * mine).sum(-1)
    return torch.where(before < slots, expert * slots + before, experts * slots)


def balance(logits: Tensor) -> Tensor:
    """E times the sum over experts of (share of tokens sent there) (mean chance): 1 where all are alike, E where one gets everything. Logits (b, n, E)."""
    experts, chance = logits.shape[-1], logits.softmax(-1).flatten(0, -2)
    sent = F.one_hot(chance.argmax(-1), experts).to(chance).mean(0)
    return experts * (sent * chance.mean(0)).sum()


METHOD = Switch
