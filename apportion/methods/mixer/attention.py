"""Multi-head softmax attention, fused; a merged token weighs as much as the tokens it stands for.

Vaswani et al. 2017, "Attention Is All You Need", arXiv 1706.03762, section 3.2; log-size bias: Bolya et al. 2023, arXiv 2210.09461, section 3.2;
q/k norm: Dehghani et al. 2023, arXiv 2302.05442; rotary positions: Su et al. 2021, arXiv 2104.09864, section 3.2; relative bias in buckets: Raffel et al.
2020, arXiv 1910.10683, section 2.1. For patches of images, both go by rows and columns: rotary positions by half of the channels for each (Fang et al.
2023, "EVA-02", arXiv 2303.11331, section 2), the bias from a table of all differences (Bao et al. 2022, "BEiT", arXiv 2106.08254, appendix).
Rows of `qkv` are grouped by head, so that a prefix of rows is a prefix of heads.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apportion.methods import ops
from apportion.methods.slots import Contribution, Mixed, Nested, Norm, Weight
from apportion.vocab import Card, Notes, Tokens

FAR = -1e4  # of a key outside the window: no weight beside any key inside, and finite, so that padding far from all real tokens is no NaN
MAX_DISTANCE = 128  # from here on all distances share the last bucket, where nothing else is said


class Attention(nn.Module):
    """`qkv`: d -> heads * 3 * channels, head by head; `proj`: heads * channels -> d; both cut themselves. By itself it offers full heads only.

    Optional: `rotary`, the base of rotary positions; `window`, how far a token sees to either side; `relative`, buckets of a learned bias for each head by
    distance, all from `relative_range` on in the last; `gate`, (b, n, d) -> (b, heads, n, 1), what each query multiplies that bias by (not for texts, which
    have a source more than tokens); `norm`, over all heads together, before they are projected. With `grid`, patches on a side, positions are rows and columns:
    `start` and `step` make them coordinates, and the prefix is not rotated. A merged token stands where the first of its tokens stood: exact at full, after
    merging an approximation; so is a norm over fewer heads. `Mixed` holds rotated query and key.
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
        relative_range: int = MAX_DISTANCE,
        gate: Nested | None = None,
        grid: int = 0,
        start: float = 0.0,
        step: float = 1.0,
        norm: Nested | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.channels = heads, channels
        self.qkv, self.proj, self.query_norm, self.key_norm, self.relative_range, self.gate = qkv, proj, query_norm, key_norm, relative_range, gate
        self.rotary, self.window, self.grid, self.start, self.step, self.norm = rotary, window, grid, start, step, norm
        self.relative = nn.Parameter(torch.empty(relative, heads).normal_(std=0.02)) if relative else None
        self.choices: tuple[int, ...] = (heads,)

    def forward(self, tokens: Tokens, heads: int, notes: Notes | None = None) -> Mixed:
        b, n, _ = tokens.x.shape
        query, key, value = self.qkv(tokens.x, out=heads * 3 * self.channels).view(b, n, heads, 3, self.channels).permute(3, 0, 2, 1, 4).unbind(0)
        query, key, bias = self.query_norm(query), self.key_norm(key), ops.size_bias(tokens)
        if self.rotary or self.window or self.relative is not None:
            # With one source that stands for no token, as a text has, so that one merged patch is not taken for it.
            sources = F.pad(tokens.origin, (0, 1), value=n - 1) if self.grid or self.gate is not None else tokens.origin
            query, key, bias = self._placed(ops.positions(tokens._replace(origin=sources)), tokens, query, key, bias)
        out = ops.attend(query, key, value, bias).transpose(1, 2).reshape(b, n, heads * self.channels)
        return Mixed(self.proj(out if self.norm is None else self.norm(out), inp=heads * self.channels), query, key)

    def _placed(self, where: Tensor, tokens: Tokens, query: Tensor, key: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Query, key and bias with all that depends on where (1 or b, n) the tokens stand."""
        if self.rotary:
            angle = self._angle(where, tokens.prefix)
            query, key = rotated(query, angle), rotated(key, angle)
        distance = where[:, None, None, :] - where[:, None, :, None]
        parts = [] if bias is None else [bias]
        if self.window:
            parts.append((distance.abs() > self.window) * query.new_tensor(FAR))
        if self.relative is not None:
            entry = cell(where, tokens.prefix, self.grid) if self.grid else bucket(distance[:, 0], len(self.relative), self.relative_range)
            table = self.relative[entry, : query.shape[1]].permute(0, 3, 1, 2)
            parts.append(table if self.gate is None else self.gate(tokens.x)[:, : query.shape[1]] * table)
        return query, key, sum(parts[1:], parts[0]) if parts else None

    def _angle(self, where: Tensor, prefix: int) -> Tensor:
        """(1 or b, n, channels / 2) float32: a position times a rate for each pair of channels; on a grid the row for half of them, the column for half."""
        if not self.grid:
            return where[..., None].float() * rates(self.channels, self.rotary, where)
        place, each = where - prefix, rates(self.channels // 2, self.rotary, where)
        axes = [(self.start + self.step * axis.float())[..., None] * each for axis in (place // self.grid, place % self.grid)]
        return torch.cat(axes, -1) * (place >= 0)[..., None]

    def macs(self, tokens: int, heads: int) -> int:
        gate = 0 if self.gate is None else 2 * tokens * self.proj.out_features * self.heads
        return (4 * tokens * self.proj.out_features + 2 * tokens * tokens) * heads * self.channels + gate

    def contribution(self) -> Contribution:
        return Contribution(self.get_submodule("proj"), self.channels, self.proj.strength())

    @torch.no_grad()
    def permute(self, order: Tensor) -> None:
        """Put the heads into this order; the output stays what it was."""

        def rows(each: int) -> Tensor:
            return (order[:, None] * each + torch.arange(each, device=order.device)).flatten()

        self.qkv.permute(out=rows(3 * self.channels))
        self.proj.permute(inp=rows(self.channels))
        if self.norm is not None:
            self.norm.permute(rows(self.channels))
        if self.relative is not None:
            self.relative.copy_(self.relative[:, order])
        if self.gate is not None:
            self.gate.permute(order)


def rates(channels: int, base: float, where: Tensor) -> Tensor:
    """(channels / 2,) turns by position: 1 / base ** (2i / channels)."""
    return 1 / base ** (torch.arange(0, channels, 2, device=where.device, dtype=torch.float32) / channels)


def rotated(x: Tensor, angle: Tensor) -> Tensor:
    """x (b, h, n, c) with channels i and i + c / 2 turned together by angle (1 or b, n, c / 2), which is float32 whatever the type of x."""
    cos, sin = angle[:, None].cos().to(x.dtype), angle[:, None].sin().to(x.dtype)
    one, two = x.chunk(2, -1)
    return torch.cat((one * cos - two * sin, two * cos + one * sin), -1)


def cell(where: Tensor, prefix: int, grid: int) -> Tensor:
    """Which row of the table belongs to a query and a key, (1 or b, n, n): one for each difference of rows and columns, the last three for a prefix."""
    place, side = where - prefix, 2 * grid - 1
    row, column = ((axis[:, :, None] - axis[:, None, :] + grid - 1) for axis in (place // grid, place % grid))
    query, key = (place < 0)[:, :, None], (place < 0)[:, None, :]
    return torch.where(query, torch.where(key, side**2 + 2, side**2), torch.where(key, side**2 + 1, row * side + column))


def bucket(distance: Tensor, buckets: int, end: int = MAX_DISTANCE) -> Tensor:
    """Which row of the table belongs to a distance (key minus query): half of them for either direction, the near ones one each, the far ones by logarithm."""
    side = buckets // 2
    near, far = side // 2, distance.abs()
    log = (far.clamp_min(1).float() / near).log() / math.log(end / near) * (side - near)
    return side * (distance > 0) + torch.where(far < near, far, (near + log.long()).clamp_max(side - 1))


METHOD = Attention
