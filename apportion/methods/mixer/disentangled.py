"""Attention in which content and position are scored apart: each query looks at distances as well as at keys, and each key at distances too.

He et al. 2021, "DeBERTa", arXiv 2006.03654, section 3.1; far distances in buckets by logarithm: its second version, and He et al. 2023, arXiv 2111.09543.
Token i scores token j, with r = bucket(i - j), by q_i k_j / sqrt(c) + q_i K_r + k_j Q_r, where K and Q hold a key and a query for each bucket and head. The
paper projects one table by the weights of each block. That depends on no text, so both stand here projected; they hold the scale as well, which the paper
makes 1 / sqrt(3 c) for all three terms: its queries are read divided by sqrt(3).
"""

from __future__ import annotations

import math
from typing import Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apportion.errors import PlanError
from apportion.methods import ops
from apportion.methods.slots import Contribution, Mixed, Mixer, Nested, Norm, Weight
from apportion.vocab import Card, Notes, Tokens

SLACK = 1e-6  # of a logarithm that is a whole number but for rounding


class Plain(Mixer, Protocol):
    """The dense mixer, which is plain while the first four are 0, 0, None and None; `grid` is 0 where there is no image."""

    rotary: float
    window: int
    relative: Tensor | None
    norm: Nested | None
    grid: int
    channels: int
    qkv: Weight
    proj: Weight
    query_norm: Norm
    key_norm: Norm


class Disentangled(nn.Module):
    """Takes the matrices of dense attention. `position_key` and `position_query`, (heads, channels, buckets that `length` tokens reach), either may be None.

    `relative`: buckets of both directions together; `relative_range`: where the last of them begins, 0 for a bucket for each distance. Distances from
    `length` on are one. A merged token stands where the first of its tokens stood, which is exact at full. `text`: there is a source more than tokens.
    Cost: 2 n * buckets * heads * channels MACs above attention, and both tables in each block. `Mixed` holds query and key of the content alone.
    """

    card = Card(
        "Disentangled attention",
        "He et al. 2021",
        "2006.03654",
        None,
        exact=True,
        needs="training",
        changed="tables are projected and scaled once, for each block apart; where they are put into a trained network they begin at zero",
    )

    def __init__(
        self,
        part: Plain,
        *,
        relative: int,
        relative_range: int,
        length: int,
        content_to_position: bool = True,
        position_to_content: bool = True,
        text: bool = True,
    ) -> None:
        super().__init__()
        self.heads, self.channels = heads, channels = part.choices[-1], part.channels
        self.relative, self.relative_range, self.length, self.text = relative, relative_range, length, text
        self.qkv, self.proj, self.query_norm, self.key_norm = part.qkv, part.proj, part.query_norm, part.key_norm
        self.first, last = reach(length, relative, relative_range)

        def table(wanted: bool) -> nn.Parameter | None:
            return nn.Parameter(torch.zeros(heads, channels, last - self.first + 1)) if wanted else None

        self.position_key, self.position_query = table(content_to_position), table(position_to_content)
        self.choices: tuple[int, ...] = (heads,)

    @classmethod
    def from_dense(cls, part: Plain, *, length: int = 512, relative: int = 64, relative_range: int = 128) -> Self:
        """Raises PlanError for too few buckets, and for a mixer that is not plain attention or has positions of its own."""
        if length < 2 or relative < 4 or (relative_range and relative_range - 1 <= relative // 4):
            found = f"{relative} buckets up to {relative_range} for {length} tokens"
            raise PlanError(found, wanted="2 tokens, 4 buckets, and a range beyond those of one distance", do="Correct the plan.")
        plain = {"rotary", "window", "relative", "norm"} <= set(dir(part)) and not (part.rotary or part.window)
        if not plain or part.relative is not None or part.norm is not None:
            wanted = "plain attention without rotary positions, windows, a bias by distance or a norm"
            raise PlanError(f"disentangled attention of {type(part).__name__}", wanted=wanted, do="Take one of the two out of the plan.")
        made = cls(part, relative=relative, relative_range=relative_range, length=length, text=not part.grid)
        return made.to(next(part.contribution().into.parameters()))  # the type and device of the network

    def forward(self, tokens: Tokens, heads: int, notes: Notes | None = None) -> Mixed:
        b, n, _ = tokens.x.shape
        query, key, value = self.qkv(tokens.x, out=heads * 3 * self.channels).view(b, n, heads, 3, self.channels).permute(3, 0, 2, 1, 4).unbind(0)
        query, key = self.query_norm(query), self.key_norm(key)
        sizes, entry = ops.size_bias(tokens), self._entry(tokens)[:, None].expand(b, heads, n, n)
        parts = [] if sizes is None else [sizes]
        if self.position_key is not None:
            parts.append(torch.einsum("bhnc,hcr->bhnr", query, self.position_key[:heads]).gather(3, entry))
        if self.position_query is not None:
            parts.append(torch.einsum("bhnc,hcr->bhnr", key, self.position_query[:heads]).gather(3, entry.mT).mT)
        out = ops.attend(query, key, value, sum(parts[1:], parts[0]) if parts else None).transpose(1, 2).reshape(b, n, heads * self.channels)
        return Mixed(self.proj(out, inp=heads * self.channels), query, key)

    def _entry(self, tokens: Tokens) -> Tensor:
        """Which row of the tables belongs to a query and a key, (1 or b, n, n)."""
        where = ops.positions(tokens if self.text else tokens._replace(origin=F.pad(tokens.origin, (0, 1), value=tokens.x.shape[1] - 1)))
        far = self.length - 1
        row = bucket(torch.arange(-far, far + 1, device=where.device), self.relative, self.relative_range) - self.first
        return row[(where[:, :, None] - where[:, None, :]).clamp(-far, far) + far]

    def macs(self, tokens: int, heads: int) -> int:
        rows = sum(table.shape[-1] for table in (self.position_key, self.position_query) if table is not None)
        return (4 * tokens * self.proj.out_features + 2 * tokens * tokens + tokens * rows) * heads * self.channels

    def contribution(self) -> Contribution:
        return Contribution(self.get_submodule("proj"), self.channels, self.proj.strength())

    @torch.no_grad()
    def permute(self, order: Tensor) -> None:
        """Put the heads into this order; the output stays what it was."""
        triples, singles = ((order[:, None] * each + torch.arange(each, device=order.device)).flatten() for each in (3 * self.channels, self.channels))
        self.qkv.permute(out=triples)
        self.proj.permute(inp=singles)
        for table in (self.position_key, self.position_query):
            if table is not None:
                table.copy_(table[order])


def bucket(distance: Tensor, buckets: int, end: int) -> Tensor:
    """Bucket of a distance (query minus key), from -buckets / 2: the near half one each, the far ones by logarithm up to `end`, or all one each."""
    side = buckets // 2
    if end:
        near, far = side // 2, distance.abs()
        log = (far.clamp_min(near).double() / near).log() / math.log((end - 1) / near) * (near - 1)
        distance = torch.where(far <= near, distance, distance.sign() * (near + (log - SLACK).ceil().long()))
    return distance.clamp(-side, side - 1)


def reach(length: int, buckets: int, end: int) -> tuple[int, int]:
    """First and last bucket that so many tokens have among them. On the CPU by name: a network is also built where tensors have no values."""
    first, last = bucket(torch.tensor([1 - length, length - 1], device="cpu"), buckets, end).tolist()
    return first, last


METHOD = Disentangled
