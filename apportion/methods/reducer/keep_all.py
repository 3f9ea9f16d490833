"""No reduction: every token stays. The dense part of this slot."""

from __future__ import annotations

from typing import Self

from torch import Tensor, nn

from apportion.errors import PathError
from apportion.methods.slots import Mixed
from apportion.vocab import Card, Notes, Tokens


class KeepAll(nn.Module):
    card = Card("No token reduction", "", "", None, exact=True, needs="nothing")
    reduces = False

    @classmethod
    def from_dense(cls, part: nn.Module) -> Self:
        return cls()

    def forward(self, tokens: Tokens, keep: int, mixed: Mixed, notes: Notes | None = None, real: Tensor | None = None) -> Tokens:
        if keep != tokens.x.shape[1]:
            raise PathError(f"a wish to keep {keep} of {tokens.x.shape[1]} tokens", wanted="all of them", do="Put a reducer into this slot.")
        return tokens

    def macs(self, before: int, keep: int, prefix: int, mixed_heads: int) -> int:
        return 0


METHOD = KeepAll
