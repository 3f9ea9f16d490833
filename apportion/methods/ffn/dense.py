"""Two layers with a non-linearity between, for each token by itself.

Vaswani et al. 2017, "Attention Is All You Need", arXiv 1706.03762, section 3.3. (b, n, d) -> (b, n, d).
"""

from __future__ import annotations

from torch import Tensor, nn

from apportion.methods.slots import Contribution, Weight
from apportion.vocab import Card, Notes


class DenseFFN(nn.Module):
    """`up`: d -> hidden, `down`: hidden -> d; both cut themselves. By itself it offers the full width only."""

    card = Card("Feed-forward network", "Vaswani et al. 2017", "1706.03762", None, exact=True, needs="nothing")

    def __init__(self, *, up: Weight, down: Weight, act: nn.Module, hidden: int) -> None:
        super().__init__()
        self.up, self.down, self.act = up, down, act
        self.choices: tuple[int, ...] = (hidden,)

    def forward(self, x: Tensor, width: int, notes: Notes | None = None) -> Tensor:
        return self.down(self.act(self.up(x, out=width)), inp=width)

    def macs(self, tokens: int, width: int) -> int:
        return 2 * tokens * self.down.out_features * width

    def contribution(self) -> Contribution:
        return Contribution(self.get_submodule("down"), 1, self.down.strength())

    def permute(self, order: Tensor) -> None:
        """Put the hidden units into this order; the output stays what it was."""
        self.up.permute(out=order)
        self.down.permute(inp=order)


METHOD = DenseFFN
