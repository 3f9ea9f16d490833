"""Learners whose outputs add up: a gate says how many of them each token gets, and the budget how many there are to give.

Wójcik et al. 2023, "Adaptive Computation Modules: Granular Conditional Computation For Efficient Inference", arXiv 2312.10193, section 3. Learner i holds
the i-th share of the hidden units; h_k, the sum of the first k and of the output bias, is the FFN cut to its first k shares. A width is a budget: k shares
for each token, on the mean over a sample's tokens. How many tokens get how many is fixed (`ops.sizes`), which ones is the gate's to say, so that graphs are
static, the cost is closed form and a sample is alone as in company. Padding gets what is left: a text is dealt the same as it would be without.
With a gradient it costs the full width.
"""

from __future__ import annotations

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apportion.errors import PlanError
from apportion.methods import kernels, ops
from apportion.methods.slots import Contribution, Layers
from apportion.vocab import Card, Notes

TEMPERATURE = 0.8  # of the noisy choice in training, as published


class Gate(nn.Module):
    """Logits (b, n, N + 1) of how many of N learners a token gets where k are to be spent on the mean. Both layers' biases are the budget's own."""

    def __init__(self, dim: int, hidden: int, learners: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(dim, hidden, bias=False), nn.Linear(hidden, learners + 1, bias=False)
        budget, count = torch.arange(1, learners)[:, None], torch.arange(learners + 1)
        self.first_bias = nn.Parameter(torch.zeros(learners - 1, hidden))
        self.last_bias = nn.Parameter(-(count - budget).square().float())  # untaught it asks for what the budget says
        nn.init.zeros_(self.last.weight)

    def forward(self, x: Tensor, k: int) -> Tensor:
        return self.last(F.gelu(self.first(x) + self.first_bias[k - 1])) + self.last_bias[k - 1]

    def macs(self, tokens: int) -> int:
        return tokens * self.first.out_features * (self.first.in_features + self.last.out_features)


class AdaptiveComputation(nn.Module):
    card = Card(
        "Adaptive Computation Modules",
        "Wójcik et al. 2023",
        "2312.10193",
        "width",
        exact=True,
        needs="training",
        changed="learners start as slices of the trained FFN; one gate serves every budget; a sample's tokens share a fixed budget, so that shapes are static; "
        "the gate multiplies what it chose, so that the task reaches it",
    )

    def __init__(self, part: Layers, *, learners: int, gate: Gate | None) -> None:
        super().__init__()
        self.part, self.gate, self.learners = part, gate, learners
        self.unit = part.choices[-1] // learners
        self.choices = tuple(k * self.unit for k in range(1, learners + 1))

    @classmethod
    def from_dense(cls, part: Layers, *, dim: int, learners: int = 4, gate: int = 0) -> Self:
        """`gate` hidden units in the gate; 0: no gate, every token gets the same. Raises PlanError for unequal shares, and for an FFN that is no such sum."""
        hidden = part.choices[-1]
        if learners < 2 or hidden % learners or gate < 0:
            wanted = "at least 2 equal shares of the units, a gate of 0 or more"
            raise PlanError(f"{learners} learners and a gate of {gate} for {hidden} units", wanted=wanted, do="Correct the plan.")
        if not {"up", "down", "norm"} <= set(dir(part)) or part.norm is not None:
            wanted = "a plain FFN without a norm over its hidden units: parts of it add up"
            raise PlanError(f"learners over {type(part).__name__}", wanted=wanted, do="Take one of the two out of the plan.")
        return cls(part, learners=learners, gate=Gate(dim, gate, learners) if gate else None).train(part.training)

    def forward(self, x: Tensor, width: int, notes: Notes | None = None, size: Tensor | None = None) -> Tensor:
        logits = self.logits(x, width, notes)
        if logits is None:
            return self.part(x, width, notes, size)
        tokens = ops.sizes(x.shape[1], width // self.unit, self.learners)
        needs = (logits.softmax(-1) * torch.arange(self.learners + 1, device=x.device)).sum(-1)
        order = needs.argsort(dim=-1, stable=True) if size is None else ops.dealt(needs, size)
        if logits.requires_grad:
            ranked = torch.tensor([count for count, size in enumerate(tokens) for _ in range(size)], device=x.device)
            return weighed(self.part, x, straight_through(logits, torch.zeros_like(order).scatter(1, order, ranked.expand_as(order))))
        flat = order + x.shape[1] * torch.arange(x.shape[0], device=x.device)[:, None]
        return grouped(self.part, x, torch.cat([rows.flatten() for rows in flat.split(tokens, 1)]), [x.shape[0] * size for size in tokens])

    def logits(self, x: Tensor, width: int, notes: Notes | None) -> Tensor | None:
        """What the gate says, also to `notes` under "gate"; None where all tokens get the same and it is not asked."""
        if self.gate is None or width == self.choices[-1]:
            return None
        logits = self.gate(x, width // self.unit)
        if notes is not None:
            notes.setdefault("gate", []).append(logits)
        if not self.training:
            return logits
        return (logits - torch.empty_like(logits).exponential_().log()) / TEMPERATURE  # Gumbel noise explores

    def macs(self, tokens: int, width: int) -> int:
        if self.gate is None or width == self.choices[-1]:
            return self.part.macs(tokens, width)
        given = sum(count * size for count, size in enumerate(ops.sizes(tokens, width // self.unit, self.learners)))
        return self.part.macs(1, self.unit) * given + self.gate.macs(tokens)

    def contribution(self) -> Contribution:
        return self.part.contribution()

    def permute(self, order: Tensor) -> None:
        """Put the hidden units into this order: which units are learner 1 changes, so do it before the learners are taught."""
        self.part.permute(order)


def straight_through(logits: Tensor, counts: Tensor) -> Tensor:
    """The choice as shares (b, n, N + 1) of 0 and 1, with the gradient of the probabilities (Bengio et al. 2013, arXiv 1308.3432)."""
    soft = logits.softmax(-1)
    return F.one_hot(counts, logits.shape[-1]).to(soft) + (soft - soft.detach())


def weighed(part: Layers, x: Tensor, choice: Tensor) -> Tensor:
    """Sum over k of choice_k h_k: learner i is multiplied by the sum of choice_k over k >= i."""
    hidden = part.act(part.up(x)) if part.gate is None else part.act(part.up(x)) * part.gate(x)
    switch = choice[..., 1:].flip(-1).cumsum(-1).flip(-1)
    return part.down((hidden.unflatten(-1, (switch.shape[-1], -1)) * switch[..., None]).flatten(-2))


def grouped(part: Layers, x: Tensor, rows: Tensor, counts: list[int]) -> Tensor:
    """Tokens `rows` (b * n,), of which the first counts[0] get no learner, the next counts[1] one, and so on.

    One dense product for each group, or two kernels in all: on a CUDA device with Triton, as `kernels.plain_because` says.
    """
    if not kernels.plain_because(part, x):
        return kernels.grouped(part, x, rows, counts)
    unit, none = part.choices[-1] // (len(counts) - 1), x.new_zeros(x.shape[-1]) if part.down.bias is None else part.down.bias
    groups = x.flatten(0, 1).index_select(0, rows).split(counts)
    out = torch.cat([part(group, k * unit) if k else none.expand_as(group) for k, group in enumerate(groups) if len(group)])
    return out.index_select(0, torch.zeros_like(rows).scatter(0, rows, torch.arange(len(rows), device=x.device))).view_as(x)


METHOD = AdaptiveComputation
