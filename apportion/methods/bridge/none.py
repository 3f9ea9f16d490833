"""Nothing stands for blocks that are left out: tokens pass as they are. The dense part of this slot."""

from __future__ import annotations

from torch import nn

from apportion.vocab import Card, Tokens


class NoBridge(nn.Module):
    card = Card("No bridge", "", "", None, exact=True, needs="nothing")
    runs: tuple[tuple[int, int], ...] = ()

    def forward(self, tokens: Tokens, first: int, last: int) -> Tokens:
        return tokens

    def macs(self, tokens: int, first: int, last: int) -> int:
        return 0


METHOD = NoBridge
