"""Every block runs. The dense part of this slot."""

from __future__ import annotations

from typing import Self

from apportion.vocab import Card


class Every:
    card = Card("All blocks", "", "", None, exact=True, needs="nothing")
    skips = False

    @classmethod
    def from_dense(cls, part: object) -> Self:
        return cls()

    def orders(self, blocks: int) -> tuple[tuple[int, ...], ...]:
        return (tuple(range(blocks)),)


METHOD = Every
