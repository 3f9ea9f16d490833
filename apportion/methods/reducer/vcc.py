"""VIP-token-centric compression: neighbours join in segments, except where the prefix (the VIPs) attends to them most; there every token stays.

Zeng et al. 2023, "VCC: Scaling Transformers to 128K Tokens or More by Prioritizing Important Tokens", arXiv 2305.04241. The tokens behind the
prefix are cut in order into segments of `segment`; from the one that gets the least attention on, each becomes its mean, until `keep` tokens are left: the last
one joins only as many as it must. The order of the text stays. Without a prefix the mean of the queries asks. `decompressed` gives every token back behind a
block, moved as its segment was. Cost: one row of attention for each VIP, no product of all by all. Not for images, where neighbours in a row are not the most
alike (`tome`), nor where every input is short.
"""

from __future__ import annotations

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apportion.errors import PlanError
from apportion.methods import ops
from apportion.methods.slots import Mixed
from apportion.vocab import Card, Notes, Tokens


class VCC(nn.Module):
    """Segments of less than 3 cannot lose half of an odd number of tokens, as a path may ask."""

    card = Card(
        "VIP-token-centric compression",
        "Zeng et al. 2023",
        "2305.04241",
        "tokens",
        exact=True,
        needs="healing",
        changed="a segment's score is the attention that its tokens get, by the keys that the mixer has just used, not by a key of its mean; chosen once "
        "behind a mixer and kept, not anew in each layer, unless the caller decompresses; no straight-through gradient of the choice, no random exploration",
    )
    reduces = True

    def __init__(self, channels: int, segment: int) -> None:
        super().__init__()
        self.channels, self.segment = channels, segment

    @classmethod
    def from_dense(cls, part: nn.Module, *, channels: int, segment: int = 4) -> Self:
        """Raises PlanError for segments of less than 3."""
        if segment < 3:
            raise PlanError(f"segments of {segment} tokens", wanted="at least 3", do="Correct the plan, or choose the reducer `tome`.")
        return cls(channels, segment)

    def forward(self, tokens: Tokens, keep: int, mixed: Mixed, notes: Notes | None = None, real: Tensor | None = None) -> Tokens:
        n, prefix = tokens.x.shape[1], tokens.prefix
        if n == keep and real is None:
            return tokens
        present = (tokens.size > 0).sum(1, keepdim=True)
        leaving = (present - (keep if real is None else real[:, None])).clamp_min(0)
        index = torch.arange(n - prefix, device=present.device)
        first = index - index % self.segment
        gone = joining(self.scores(tokens, mixed), present - prefix, leaving, self.segment)[:, : n - prefix]
        into = F.pad(prefix + first, (prefix, 0)).expand(len(present), -1)
        return ops.settle(tokens, keep, F.pad(gone, (prefix, 0)), into, torch.arange(n, device=present.device))

    def scores(self, tokens: Tokens, mixed: Mixed) -> Tensor:
        """The attention of the VIPs (b, segments) that each segment gets, mean over heads and VIPs; padding gets none."""
        prefix, size = tokens.prefix, tokens.size[:, None, :, None]
        query = mixed.query[:, :, :prefix] if prefix else (mixed.query * size).sum(2, keepdim=True) / size.sum(2, keepdim=True)
        scores, bias = query @ mixed.key.transpose(-1, -2) * self.channels**-0.5, ops.size_bias(tokens)
        attention = (scores if bias is None else scores + bias).float().softmax(-1).mean((1, 2))[:, prefix:]
        return F.pad(attention, (0, -attention.shape[1] % self.segment)).unflatten(1, (-1, self.segment)).sum(-1)

    def macs(self, before: int, keep: int, prefix: int, mixed_heads: int) -> int:
        return 0 if before == keep else max(prefix, 1) * before * mixed_heads * self.channels


def joining(score: Tensor, count: Tensor, leaving: Tensor, segment: int) -> Tensor:
    """Which tokens join the first of their segment, (b, segments * segment) bool: `leaving` (b, 1) of the `count` (b, 1), those of the lowest scores first.

    Padding may be among them: it has nothing to give.
    """
    segments = score.shape[1]
    place = torch.arange(segments * segment, device=score.device)
    may_leave = ((count - segment * torch.arange(segments, device=score.device)).clamp(0, segment) - 1).clamp_min(0)
    order = score.argsort(dim=-1, stable=True)
    sorted_ = may_leave.gather(1, order)
    before = torch.zeros_like(may_leave).scatter(1, order, sorted_.cumsum(-1) - sorted_)
    number = before.repeat_interleave(segment, 1) + place % segment
    return (place % segment > 0) & (number <= leaving)


def decompressed(before: Tokens, compressed: Tokens, after: Tokens) -> Tokens:
    """The tokens `before`, each moved as the token of `compressed` that stands for it was on the way to `after`.

    What stands for one token alone is what the block made of it; members of a segment keep their distance to its mean. Between the two no token may be reduced.
    """
    place = torch.zeros(before.x.shape[:2], dtype=torch.int64, device=before.x.device).scatter(1, before.origin, compressed.origin)
    moved = before.x + ops.take(after.x - compressed.x, place)
    alone = ops.take(compressed.size, place) == before.size
    return before._replace(x=torch.where(alone[..., None], ops.take(after.x, place), moved))


METHOD = VCC
