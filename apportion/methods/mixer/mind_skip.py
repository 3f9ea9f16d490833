"""Attention that a sample may do without: one router for each block looks at the mean token and opens or closes its gate.

He et al. 2024, "Router-Tuning: A Simple and Effective Approach for Enabling Dynamic-Depth in Transformers", arXiv 2410.13184, section 3 (MindSkip, by
sequence). r = sigmoid(w . mean token), gate 1 where r >= 1/2; w (d,) is 0 at first, so every gate is open and the network is what it was. Freeze the rest
and teach w alone, with `over_capacity` or nothing will ever close. A graph is static: it runs the attention and multiplies, so its cost is full attention
and d for each token; `grouped` runs it for the open samples only, in eager. The first thing to try instead is leaving a block's attention out for all inputs.
Not where a norm stands on the branch: its bias passes a closed gate.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from apportion.methods.slots import Contribution, Mixed, Mixer
from apportion.vocab import Card, Notes, Tokens


class MindSkip(nn.Module):
    """`notes` receives "open" (b,), the gates, which carry the gradient of r as if the threshold were not there (Bengio et al. 2013, arXiv 1308.3432)."""

    card = Card(
        "MindSkip",
        "He et al. 2024",
        "2410.13184",
        None,
        exact=True,
        needs="training",
        changed="the mean is over real tokens, by size; a closed gate still feels the task in training, so that it can open again",
    )

    def __init__(self, part: Mixer, dim: int) -> None:
        super().__init__()
        self.part, self.choices = part, part.choices
        self.router = nn.Linear(dim, 1, bias=False)
        nn.init.zeros_(self.router.weight)

    @classmethod
    def from_dense(cls, part: Mixer, *, dim: int) -> Self:
        made = cls(part, dim)
        made.router.to(next(part.contribution().into.parameters()))  # the type and device of the network
        return made

    def gate(self, tokens: Tokens) -> Tensor:
        """1 or 0 for each sample, (b,)."""
        # The mean of the scores is the score of the mean; and what reads the norm's very output can be folded with the other products that do.
        score = (self.router(tokens.x)[..., 0] * tokens.size).sum(1) / tokens.size.sum(1)
        chance, opened = score.sigmoid(), (score >= 0).to(score)
        return opened + (chance - chance.detach()) if chance.requires_grad else opened

    def forward(self, tokens: Tokens, heads: int, notes: Notes | None = None) -> Mixed:
        mixed, gate = self.part(tokens, heads, notes), self.gate(tokens)
        if notes is not None:
            notes.setdefault("open", []).append(gate)
        return mixed._replace(out=mixed.out * gate[:, None, None])

    def macs(self, tokens: int, heads: int) -> int:
        return self.part.macs(tokens, heads) + tokens * self.router.in_features

    def grouped_macs(self, tokens: int, heads: int, share: float) -> float:
        """Mean multiply-adds of a sample in `grouped`, where this share of the gates is open."""
        return share * self.part.macs(tokens, heads) + tokens * self.router.in_features

    def contribution(self) -> Contribution:
        return self.part.contribution()

    def permute(self, order: Tensor) -> None:
        self.part.permute(order)


def grouped(mixer: MindSkip, tokens: Tokens, heads: int) -> Tensor:
    """The branch (b, n, d) with attention run for the samples that are open only. Eager, as shapes follow the data.

    There are no queries and keys of the others, hence none are given: not before a reducer that looks at them.
    """
    opened = mixer.gate(tokens).nonzero()[:, 0]
    out = torch.zeros_like(tokens.x)
    if not len(opened):
        return out
    kept = tokens._replace(x=tokens.x[opened], size=tokens.size[opened], origin=tokens.origin[opened])
    return out.index_copy(0, opened, mixer.part(kept, heads).out)


def over_capacity(gates: Tensor, capacity: float) -> Tensor:
    """How far the share of open gates (b, blocks) is above what is allowed, block by block, added up; 0 and no gradient where it is not."""
    return (gates.mean(0) - capacity).relu().sum()


METHOD = MindSkip
