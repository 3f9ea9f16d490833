"""The first n blocks run, then the head: the static form of an early exit.

Teerapittayanon et al. 2016, "BranchyNet", arXiv 1709.01686; for transformers: Xin et al. 2020, "DeeBERT", arXiv 2004.12993, section 3.
A smaller depth is a prefix of a larger one, so that work done up to an exit is never lost. Heal before use: the head has never seen shallow features.
"""

from __future__ import annotations

from typing import Self

from apportion.vocab import Card


class First:
    card = Card("First n blocks", "Xin et al. 2020", "2004.12993", "depth", exact=True, needs="healing")
    skips = True

    @classmethod
    def from_dense(cls, part: object) -> Self:
        return cls()

    def orders(self, blocks: int) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(range(n)) for n in range(1, blocks + 1))


METHOD = First
