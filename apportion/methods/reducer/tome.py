"""Token merging: join the most alike tokens, each counting for as many as it stands for.

Bolya et al. 2023, "Token Merging: Your ViT But Faster", arXiv 2210.09461, section 3: tokens are dealt in turn into two sets, each of the first
finds its most similar in the second (cosine of keys, mean over heads), and the most similar pairs are joined by their weighted mean.
One call takes away at most half. Cost: one product of half by half the tokens. Not for fewer than about 32 tokens.
"""

from __future__ import annotations

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apportion.methods import ops
from apportion.methods.slots import Mixed
from apportion.vocab import Card, Notes, Tokens


class ToMe(nn.Module):
    card = Card("Token Merging", "Bolya et al. 2023", "2210.09461", "tokens", exact=True, needs="nothing")
    reduces = True

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    @classmethod
    def from_dense(cls, part: nn.Module, *, channels: int) -> Self:
        return cls(channels)

    def forward(self, tokens: Tokens, keep: int, mixed: Mixed, notes: Notes | None = None, real: Tensor | None = None) -> Tokens:
        n, prefix = tokens.x.shape[1], tokens.prefix
        remove = n - keep
        if remove == 0 and real is None:
            return tokens
        similar = ops.alike(mixed.key, prefix)
        if real is not None:
            return _padded(tokens, keep, real, similar)
        kept, gone, into, _ = ops.matched(similar, prefix, remove)
        return ops.reduce(tokens, kept, gone, into)

    def macs(self, before: int, keep: int, prefix: int, mixed_heads: int) -> int:
        left = before - prefix
        return 0 if before == keep else (left - left // 2) * (left // 2) * self.channels


def _padded(tokens: Tokens, keep: int, real: Tensor, similar: Tensor) -> Tokens:
    """The same pairs as without the padding: it finds no partner and is none."""
    n, prefix, pad = tokens.x.shape[1], tokens.prefix, tokens.size[:, tokens.prefix :] == 0
    best, partner = similar.masked_fill(pad[:, None, 1::2], -torch.inf).max(-1)
    rank = best.masked_fill(pad[:, ::2], -torch.inf).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    leaving = ((tokens.size > 0).sum(1) - real)[:, None]
    index = torch.arange(n, device=rank.device)
    second = (index >= prefix) & ((index - prefix) % 2 == 1)

    def spread(of_first: Tensor) -> Tensor:
        """What belongs to the first of each two, at both of them."""
        return F.pad(of_first[..., None].expand(-1, -1, 2).flatten(1)[:, : n - prefix], (prefix, 0), value=n)

    gone = ~second & (spread(rank) < leaving)
    # A row that loses nothing keeps its order, as it would alone.
    return ops.settle(tokens, keep, gone, (prefix + 1 + 2 * spread(partner)).clamp_max(n - 1), index + n * (second & (leaving > 0)))


METHOD = ToMe
