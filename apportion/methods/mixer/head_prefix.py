"""Nested heads: a path keeps the first heads only, and its products shrink with them.

Heads as a nested dimension: Devvrit et al. 2024, "MatFormer", arXiv 2310.07707, section 3; which heads come first: Hou et al. 2020, "DynaBERT",
arXiv 2004.04037, section 2.1. Sort heads by importance before, heal afterwards. Saves less than depth or tokens in small networks.
"""

from __future__ import annotations

from typing import Self

from torch import Tensor, nn

from apportion.methods.slots import Contribution, Mixed, Mixer
from apportion.vocab import Card, Notes, Tokens


class HeadPrefix(nn.Module):
    card = Card("Nested attention heads", "Devvrit et al. 2024", "2310.07707", "heads", exact=True, needs="healing")

    def __init__(self, part: Mixer) -> None:
        super().__init__()
        self.part = part
        full = part.choices[-1]
        self.choices = tuple(sorted({max(1, full // 4), max(1, full // 2), max(1, full * 3 // 4), full}))

    @classmethod
    def from_dense(cls, part: Mixer) -> Self:
        return cls(part)

    def forward(self, tokens: Tokens, heads: int, notes: Notes | None = None) -> Mixed:
        return self.part(tokens, heads, notes)

    def macs(self, tokens: int, heads: int) -> int:
        return self.part.macs(tokens, heads)

    def contribution(self) -> Contribution:
        return self.part.contribution()

    def permute(self, order: Tensor) -> None:
        self.part.permute(order)


METHOD = HeadPrefix
