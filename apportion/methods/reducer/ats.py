"""Adaptive token sampling: tokens are drawn at equal steps of their summed significance, so that a few heavy ones leave fewer than asked for.

Fayyaz et al. 2022, "Adaptive Token Sampling For Efficient Vision Transformers", arXiv 2111.15667, section 3. Significance is the class token's attention; with
tokens in its order and c their cumulative share, `keep` - prefix targets lie evenly from the first c to 1, and each draws the token of the nearest c. What
is drawn twice is one token, and the rest of the `keep` is padding (size 0). Without a class token the mean of the queries asks. Cost: one row of attention,
and one product of all by all. A static graph pays for the padding too, and the tail is drawn from as well: where the number of tokens is given, `evit` keeps
more of the answer.
"""

from __future__ import annotations

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apportion.methods import ops
from apportion.methods.slots import Mixed
from apportion.vocab import Card, Notes, Tokens


class ATS(nn.Module):
    card = Card(
        "Adaptive token sampling",
        "Fayyaz et al. 2022",
        "2111.15667",
        "tokens",
        exact=True,
        needs="nothing",
        changed="significance is the attention without the norms of the values, which a mixer does not give; a token that is not drawn joins the most alike "
        "(cosine of keys) that is, instead of being lost; a sample that already fits is left as it is, because its places are paid for; masks are sizes of 0",
    )
    reduces = True

    def __init__(self, channels: int, class_token: bool) -> None:
        super().__init__()
        self.channels, self.class_token = channels, class_token

    @classmethod
    def from_dense(cls, part: nn.Module, *, channels: int, class_token: bool) -> Self:
        return cls(channels, class_token)

    def forward(self, tokens: Tokens, keep: int, mixed: Mixed, notes: Notes | None = None, real: Tensor | None = None) -> Tokens:
        n, prefix = tokens.x.shape[1], tokens.prefix
        if n == keep and real is None:
            return tokens
        present = tokens.size[:, prefix:] > 0
        count = present.sum(1, keepdim=True)
        wanted = torch.full_like(count, keep - prefix) if real is None else real[:, None] - prefix
        drawn = sampled(self.significance(tokens, mixed), wanted)
        gone = present & ~drawn & (count > wanted)
        metric = F.normalize(mixed.key[:, :, prefix:].mean(1), dim=-1)
        into = prefix + (metric @ metric.transpose(1, 2)).masked_fill(~drawn[:, None], -torch.inf).argmax(-1)
        return ops.settle(tokens, keep, F.pad(gone, (prefix, 0)), F.pad(into, (prefix, 0)), torch.arange(n, device=into.device))

    def significance(self, tokens: Tokens, mixed: Mixed) -> Tensor:
        """The attention (b, n - prefix) that each token gets, summed over heads; padding gets none."""
        prefix, size = tokens.prefix, tokens.size[:, None, :, None]
        query = mixed.query[:, :, :1] if self.class_token else (mixed.query * size).sum(2, keepdim=True) / size.sum(2, keepdim=True)
        scores = (query @ mixed.key.transpose(-1, -2)).squeeze(2) * self.channels**-0.5
        bias = ops.size_bias(tokens)
        return (scores if bias is None else scores + bias[:, 0]).float().softmax(-1).sum(1)[:, prefix:]

    def macs(self, before: int, keep: int, prefix: int, mixed_heads: int) -> int:
        return 0 if before == keep else before * mixed_heads * self.channels + (before - prefix) ** 2 * self.channels


def sampled(score: Tensor, targets: Tensor) -> Tensor:
    """Which of the scores (b, n), none below 0, are nearest to one of `targets` (b, 1) even steps through their cumulative sum: (b, n) bool.

    A score of 0 is never drawn and the largest always is. Each score owns the steps between the middles to its neighbours, so that they need not be made.
    """
    order = score.argsort(dim=-1, stable=True)
    cumulative = score.gather(1, order).cumsum(-1)
    cumulative = cumulative / cumulative[:, -1:].clamp_min(torch.finfo(score.dtype).tiny)
    first = torch.where(cumulative > 0, cumulative, 1).amin(-1, keepdim=True)
    middle = (cumulative[:, 1:] + cumulative[:, :-1]) / 2
    below = ((middle - first) / (1 - first).clamp_min(torch.finfo(score.dtype).eps) * (targets - 1)).ceil().clamp_min(0)
    below = torch.cat((torch.zeros_like(first), below, targets.to(below)), 1)
    return torch.zeros_like(score, dtype=torch.bool).scatter(1, order, below[:, 1:] > below[:, :-1])


METHOD = ATS
