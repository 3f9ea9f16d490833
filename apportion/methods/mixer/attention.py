"""Multi-head softmax attention, fused; a merged token weighs as much as the tokens it stands for.

Vaswani et al. 2017, "Attention Is All You Need", arXiv 1706.03762, section 3.2; log-size bias: Bolya et al. 2023, arXiv 2210.09461, section 3.2;
q/k norm: Dehghani et al. 2023, arXiv 2302.05442; rotary positions: Su et al. 2021, arXiv 2104.09864, section 3.2; relative bias in buckets: Raffel et al.
2020, arXiv 1910.10683, section 2.1. Rows of `qkv` are grouped by head, so that a prefix of rows is a prefix of heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from apportion.methods import ops
from apportion.methods.slots import Contribution, Mixed, Norm, Weight
from apportion.vocab import Card, Notes, Tokens

FAR = -1e4  # of a key outside the window: no weight beside any key inside, and finite, so that padding far from all real tokens is no NaN
MAX_DISTANCE = 128  # from here on all distances share the last bucket


class Attention(nn.Module):
    """`qkv`: d -> heads * 3 * channels, head by head; `proj`: heads * channels -> d; both cut themselves. By itself it offers full heads only.

    Optional: `rotary`, the base of rotary positions; `window`, how far a token sees to either side; `relative`, buckets of a learned bias for each head by
    distance. A merged token stands where the first of its tokens stood: exact at full, after merging an approximation. `Mixed` holds rotated query and key.
    """

    card = Card("Scaled dot-product attention", "Vaswani et al. 2017", "1706.03762", None, exact=True, needs="nothing")

    def __init__(
        self,
        *,
        heads: int,
        channels: int,
        qkv: Weight,
        proj: Weight,
        query_norm: Norm,
        key_norm: Norm,
        rotary: float = 0.0,
        window: int = 0,
        relative: int = 0,
    ) -> None:
        super().__init__()
        self.heads, self.channels = heads, channels
        self.qkv, self.proj, self.query_norm, self.key_norm = qkv, proj, query_norm, key_norm
        self.rotary, self.window = rotary, window
        self.relative = nn.Parameter(torch.empty(relative, heads).normal_(std=0.02)) if relative else None
        self.choices: tuple[int, ...] = (heads,)

    def forward(self, tokens: Tokens, heads: int, notes: Notes | None = None) -> Mixed:
        b, n, _ = tokens.x.shape
        query, key, value = self.qkv(tokens.x, out=heads * 3 * self.channels).view(b, n, heads, 3, self.channels).permute(3, 0, 2, 1, 4).unbind(0)
        query, key, bias = self.query_norm(query), self.key_norm(key), ops.size_bias(tokens)
        if self.rotary or self.window or self.relative is not None:
            query, key, bias = self._placed(ops.positions(tokens), query, key, bias)
        out = ops.attend(query, key, value, bias).transpose(1, 2).reshape(b, n, heads * self.channels)
        return Mixed(self.proj(out, inp=heads * self.channels), query, key)

    def _placed(self, where: Tensor, query: Tensor, key: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Query, key and bias with all that depends on where (1 or b, n) the tokens stand."""
        if self.rotary:
            query, key = rotated(query, where, self.rotary), rotated(key, where, self.rotary)
        distance = where[:, None, None, :] - where[:, None, :, None]
        parts = [] if bias is None else [bias]
        if self.window:
            parts.append((distance.abs() > self.window) * query.new_tensor(FAR))
        if self.relative is not None:
            parts.append(self.relative[bucket(distance[:, 0], len(self.relative)), : query.shape[1]].permute(0, 3, 1, 2))
        return query, key, sum(parts[1:], parts[0]) if parts else None

    def macs(self, tokens: int, heads: int) -> int:
        inner = heads * self.channels
        return 4 * tokens * self.proj.out_features * inner + 2 * tokens * tokens * inner

    def contribution(self) -> Contribution:
        return Contribution(self.get_submodule("proj"), self.channels, self.proj.strength())

    @torch.no_grad()
    def permute(self, order: Tensor) -> None:
        """Put the heads into this order; the output stays what it was."""

        def rows(each: int) -> Tensor:
            return (order[:, None] * each + torch.arange(each, device=order.device)).flatten()

        self.qkv.permute(out=rows(3 * self.channels))
        self.proj.permute(inp=rows(self.channels))
        if self.relative is not None:
            self.relative.copy_(self.relative[:, order])


def rotated(x: Tensor, where: Tensor, base: float) -> Tensor:
    """x (b, h, n, c) with channels i and i + c / 2 turned together by where / base ** (2i / c); the angles are float32 whatever the type of x."""
    rates = 1 / base ** (torch.arange(0, x.shape[-1], 2, device=x.device, dtype=torch.float32) / x.shape[-1])
    angle = where[:, None, :, None].float() * rates
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    one, two = x.chunk(2, -1)
    return torch.cat((one * cos - two * sin, two * cos + one * sin), -1)


def bucket(distance: Tensor, buckets: int) -> Tensor:
    """Which row of the table belongs to a distance (key minus query): half of them for either direction, the near ones one each, the far ones by logarithm."""
    side = buckets // 2
    near, far = side // 2, distance.abs()
    log = (far.clamp_min(1).float() / near).log() / math.log(MAX_DISTANCE / near) * (side - near)
    return side * (distance > 0) + torch.where(far < near, far, (near + log.long()).clamp_max(side - 1))


METHOD = Attention
