"""Nested FFN: a path uses the first hidden units only; every width is a prefix of the next.

Devvrit et al. 2024, "MatFormer: Nested Transformer for Elastic Inference", arXiv 2310.07707, section 3: widths of an eighth, a quarter, a half and
all of the hidden units; any width in any block (mix'n'match). Sort units by importance before; heal afterwards: a plain FFN's prefix is poor.
"""

from __future__ import annotations

from typing import Self

from torch import Tensor, nn

from apportion.methods.slots import Contribution, FeedForward
from apportion.vocab import Card, Notes


class MatFormer(nn.Module):
    card = Card("MatFormer", "Devvrit et al. 2024", "2310.07707", "width", exact=True, needs="healing")

    def __init__(self, part: FeedForward) -> None:
        super().__init__()
        self.part = part
        full = part.choices[-1]
        self.choices = tuple(sorted({max(1, full // share) for share in (8, 4, 2, 1)}))

    @classmethod
    def from_dense(cls, part: FeedForward) -> Self:
        return cls(part)

    def forward(self, x: Tensor, width: int, notes: Notes | None = None, size: Tensor | None = None) -> Tensor:
        return self.part(x, width, notes, size)

    def macs(self, tokens: int, width: int) -> int:
        return self.part.macs(tokens, width)

    def contribution(self) -> Contribution:
        return self.part.contribution()

    def permute(self, order: Tensor) -> None:
        self.part.permute(order)


METHOD = MatFormer
