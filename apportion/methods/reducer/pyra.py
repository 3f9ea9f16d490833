"""Token merging that learns how far to trust what it merges: a token that goes is first weighted, by itself and by channel.

Xiong et al. 2024, "PYRA: Parallel Yielding Re-Activation for Training-Inference Efficient Task Adaptation", arXiv 2403.09192, section 3.
The pairs are those of token merging (`tome`). With z = LayerNorm(source + target) of each pair, by channel 2 sigmoid(w z) over the pairs and for each pair
2 sigmoid(z v) - 1, a source becomes source * (1 + channel * pair) before the weighted mean; v is 0 at first, so that nothing differs from `tome`.
Freeze the rest and teach these alone: `pairs` + 3d numbers in a block. Cost: that of `tome` and two products of d for each pair. Without teaching, use `tome`.
"""

from __future__ import annotations

import math
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apportion.errors import PathError
from apportion.methods import ops
from apportion.methods.slots import Mixed
from apportion.vocab import Card, Notes, Tokens


class PYRA(nn.Module):
    """`pairs` is the length of w: the most similar pair takes its first entry, and no more pairs than that can be merged at once."""

    card = Card(
        "Parallel yielding re-activation",
        "Xiong et al. 2024",
        "2403.09192",
        "tokens",
        exact=True,
        needs="training",
        changed="w is as long as the most pairs that a path may merge, and a path that merges fewer uses its first entries: one set of weights for all paths",
    )
    reduces = True

    def __init__(self, channels: int, dim: int, pairs: int) -> None:
        super().__init__()
        self.channels, self.dim, self.pairs = channels, dim, pairs
        self.norm = nn.LayerNorm(dim)
        self.over_pairs = nn.Parameter(torch.empty(pairs))
        self.over_channels = nn.Parameter(torch.zeros(dim))
        nn.init.kaiming_uniform_(self.over_pairs[None], a=math.sqrt(5))

    @classmethod
    def from_dense(cls, part: nn.Module, *, channels: int, dim: int, pairs: int = 128) -> Self:
        return cls(channels, dim, pairs)

    def forward(self, tokens: Tokens, keep: int, mixed: Mixed, notes: Notes | None = None, real: Tensor | None = None) -> Tokens:
        n, prefix = tokens.x.shape[1], tokens.prefix
        remove = n - keep
        if remove == 0 and real is None:
            return tokens
        similar = ops.alike(mixed.key, prefix)
        if real is not None:
            return self._padded(tokens, keep, real, similar)
        kept, gone, into, targets = ops.matched(similar, prefix, remove)
        return ops.reduce(self.reactivated(tokens, gone, targets), kept, gone, into)

    def reactivated(self, tokens: Tokens, source: Tensor, target: Tensor, taken: Tensor | None = None) -> Tokens:
        """Tokens with rows `source` (b, r) weighted before they join rows `target` (b, r), most similar first; with `taken` (b, r) bool those pairs only."""
        if source.shape[1] > self.pairs:
            raise PathError(f"{source.shape[1]} pairs to merge at once", wanted=f"at most {self.pairs}", do="Put `pyra` in with a larger option `pairs`.")
        whole = tokens.x * tokens.size[..., None]
        z = self.norm(ops.take(whole, source) + ops.take(whole, target))
        if taken is not None:
            z = z * taken[..., None]  # a pair that is not merged says nothing about the channels, and its own weight becomes 0
        by_channel = 2 * torch.sigmoid(self.over_pairs[: source.shape[1]] @ z)
        by_pair = 2 * torch.sigmoid(z @ self.over_channels) - 1
        return tokens._replace(x=ops.add_at(tokens.x, source, ops.take(tokens.x, source) * by_channel[:, None] * by_pair[..., None]))

    def _padded(self, tokens: Tokens, keep: int, real: Tensor, similar: Tensor) -> Tokens:
        """The same pairs as without the padding: it finds no partner and is none."""
        n, prefix, pad = tokens.x.shape[1], tokens.prefix, tokens.size[:, tokens.prefix :] == 0
        best, partner = similar.masked_fill(pad[:, None, 1::2], -torch.inf).max(-1)
        order = best.masked_fill(pad[:, ::2], -torch.inf).argsort(dim=-1, descending=True, stable=True)
        leaving = ((tokens.size > 0).sum(1) - real)[:, None]
        # Rounding can let a shorter row lose one token more than the padded batch does.
        pairs = min(order.shape[1], similar.shape[2], n - keep + 1)
        likeliest = order[:, :pairs]
        target = prefix + 1 + 2 * partner.gather(1, likeliest)
        tokens = self.reactivated(tokens, prefix + 2 * likeliest, target, torch.arange(pairs, device=order.device) < leaving)
        index = torch.arange(n, device=order.device)
        second = (index >= prefix) & ((index - prefix) % 2 == 1)

        def spread(of_first: Tensor) -> Tensor:
            """What belongs to the first of each two, at both of them."""
            return F.pad(of_first[..., None].expand(-1, -1, 2).flatten(1)[:, : n - prefix], (prefix, 0), value=n)

        gone = ~second & (spread(order.argsort(dim=-1)) < leaving)
        # A row that loses nothing keeps its order, as it would alone.
        return ops.settle(tokens, keep, gone, (prefix + 1 + 2 * spread(partner)).clamp_max(n - 1), index + n * (second & (leaving > 0)))

    def macs(self, before: int, keep: int, prefix: int, mixed_heads: int) -> int:
        left = before - prefix
        return 0 if before == keep else (left - left // 2) * (left // 2) * self.channels + 2 * (before - keep) * self.dim


METHOD = PYRA
