"""Multi-head softmax attention, fused; a merged token weighs as much as the tokens it stands for.

Vaswani et al. 2017, "Attention Is All You Need", arXiv 1706.03762, section 3.2; log-size bias: Bolya et al. 2023, arXiv 2210.09461, section 3.2;
q/k norm: Dehghani et al. 2023, arXiv 2302.05442. Rows of `qkv` are grouped by head, so that a prefix of rows is a prefix of heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from apportion.methods import ops
from apportion.methods.slots import Contribution, Mixed, Norm, Weight
from apportion.vocab import Card, Notes, Tokens


class Attention(nn.Module):
    """`qkv`: d -> heads * 3 * channels, head by head; `proj`: heads * channels -> d; both cut themselves. By itself it offers full heads only."""

    card = Card("Scaled dot-product attention", "Vaswani et al. 2017", "1706.03762", None, exact=True, needs="nothing")

    def __init__(self, *, heads: int, channels: int, qkv: Weight, proj: Weight, query_norm: Norm, key_norm: Norm) -> None:
        super().__init__()
        self.heads, self.channels = heads, channels
        self.qkv, self.proj, self.query_norm, self.key_norm = qkv, proj, query_norm, key_norm
        self.choices: tuple[int, ...] = (heads,)

    def forward(self, tokens: Tokens, heads: int, notes: Notes | None = None) -> Mixed:
        b, n, _ = tokens.x.shape
        query, key, value = self.qkv(tokens.x, out=heads * 3 * self.channels).view(b, n, heads, 3, self.channels).permute(3, 0, 2, 1, 4).unbind(0)
        query, key = self.query_norm(query), self.key_norm(key)
        out = ops.attend(query, key, value, ops.size_bias(tokens)).transpose(1, 2).reshape(b, n, heads * self.channels)
        return Mixed(self.proj(out, inp=heads * self.channels), query, key)

    def macs(self, tokens: int, heads: int) -> int:
        inner = heads * self.channels
        return 4 * tokens * self.proj.out_features * inner + 2 * tokens * tokens * inner

    def contribution(self) -> Contribution:
        return Contribution(self.get_submodule("proj"), self.channels, self.proj.strength())

    def permute(self, order: Tensor) -> None:
        """Put the heads into this order; the output stays what it was."""

        def rows(each: int) -> Tensor:
            return (order[:, None] * each + torch.arange(each, device=order.device)).flatten()

        self.qkv.permute(out=rows(3 * self.channels))
        self.proj.permute(inp=rows(self.channels))


METHOD = Attention
