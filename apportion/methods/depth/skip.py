"""Blocks in the middle are left out, evenly; the first and the last always run, since later layers can stand in for their neighbours but not for the ends.

Wu et al. 2018, "BlockDrop", arXiv 1711.08393 (few patterns suffice); Fan et al. 2020, "LayerDrop", arXiv 1909.11556, section 3.2 (every other layer).
Works a little without healing where first-n does not.
"""

from __future__ import annotations

from typing import Self

from apportion.vocab import Card


class Skip:
    card = Card("Skipped blocks", "Wu et al. 2018", "1711.08393", "depth", exact=True, needs="healing")
    skips = True

    @classmethod
    def from_dense(cls, part: object) -> Self:
        return cls()

    def orders(self, blocks: int) -> tuple[tuple[int, ...], ...]:
        def spread(n: int) -> tuple[int, ...]:
            return tuple(round(i * (blocks - 1) / (n - 1)) for i in range(n)) if n > 1 else (0,)

        return tuple(spread(n) for n in range(1, blocks + 1))


METHOD = Skip
