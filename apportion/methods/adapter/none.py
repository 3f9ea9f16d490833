"""No adapter: the branch passes as it is. The dense part of this slot."""

from __future__ import annotations

from torch import Tensor, nn

from apportion.vocab import Card


class NoAdapter(nn.Module):
    card = Card("No adapter", "", "", None, exact=True, needs="nothing")

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        return branch

    def macs(self, tokens: int) -> int:
        return 0


METHOD = NoAdapter
