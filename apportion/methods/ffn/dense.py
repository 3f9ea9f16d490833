"""Two layers with a non-linearity between, for each token by itself; with a gate, the hidden units are multiplied by a third layer's.

Vaswani et al. 2017, "Attention Is All You Need", arXiv 1706.03762, section 3.3; gates (GeGLU, SwiGLU): Shazeer 2020, arXiv 2002.05202, section 2; a
norm over the hidden units: Shleifer et al. 2021, "NormFormer", arXiv 2110.09456, section 2. (b, n, d) -> (b, n, d).
"""

from __future__ import annotations

from torch import Tensor, nn

from apportion.methods.slots import Contribution, Nested, Weight
from apportion.vocab import Card, Notes


class DenseFFN(nn.Module):
    """`up` and `gate`: d -> hidden, `down`: hidden -> d; all cut themselves. By itself it offers the full width only."""

    card = Card("Feed-forward network", "Vaswani et al. 2017", "1706.03762", None, exact=True, needs="nothing")

    def __init__(self, *, up: Weight, down: Weight, act: nn.Module, hidden: int, gate: Weight | None = None, norm: Nested | None = None) -> None:
        super().__init__()
        self.up, self.down, self.act, self.gate, self.norm = up, down, act, gate, norm
        self.choices: tuple[int, ...] = (hidden,)

    def forward(self, x: Tensor, width: int, notes: Notes | None = None, size: Tensor | None = None) -> Tensor:
        hidden = self.act(self.up(x, out=width))
        hidden = hidden if self.gate is None else hidden * self.gate(x, out=width)
        return self.down(hidden if self.norm is None else self.norm(hidden), inp=width)

    def macs(self, tokens: int, width: int) -> int:
        return (2 if self.gate is None else 3) * tokens * self.down.out_features * width

    def contribution(self) -> Contribution:
        return Contribution(self.get_submodule("down"), 1, self.down.strength())

    def permute(self, order: Tensor) -> None:
        """Put the hidden units into this order; the output stays what it was."""
        for weight in (self.up, self.gate):
            if weight is not None:
                weight.permute(out=order)
        if self.norm is not None:
            self.norm.permute(order)
        self.down.permute(inp=order)


METHOD = DenseFFN
