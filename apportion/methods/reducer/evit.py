"""Attentive pruning: keep the tokens that the class token attends to most, and join the others into one.

Liang et al. 2022, "Not All Patches Are What You Need: Expediting Vision Transformers via Token Reorganizations", arXiv 2202.07800, section 3.
Needs a class token. Cost: one row of attention. Not for dense prediction, and not early in a network: a first block's class token knows little.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from apportion.errors import PlanError
from apportion.methods import ops
from apportion.methods.slots import Mixed
from apportion.vocab import Card, Notes, Tokens


class EViT(nn.Module):
    card = Card(
        "Expediting ViTs via token reorganisation",
        "Liang et al. 2022",
        "2202.07800",
        "tokens",
        exact=True,
        needs="healing",
        changed="the joined token is the size-weighted mean and carries its size into later attention, so that it means the same as a merged one",
    )
    reduces = True

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    @classmethod
    def from_dense(cls, part: nn.Module, *, channels: int, class_token: bool) -> Self:
        """Raises PlanError in a network without a class token: a register's attention says nothing about what matters."""
        if not class_token:
            raise PlanError("attentive pruning in a network without a class token", wanted="a class token to ask", do="Choose the reducer `tome` instead.")
        return cls(channels)

    def forward(self, tokens: Tokens, keep: int, mixed: Mixed, notes: Notes | None = None, real: Tensor | None = None) -> Tokens:
        n, prefix = tokens.x.shape[1], tokens.prefix
        if n == keep and real is None:
            return tokens
        scores = (mixed.query[:, :, :1] @ mixed.key.transpose(-1, -2)).squeeze(2) * self.channels**-0.5
        bias = ops.size_bias(tokens)
        attention = (scores if bias is None else scores + bias[:, 0]).softmax(-1).mean(1)[:, prefix:]
        if real is not None:
            return _padded(tokens, keep, real, attention)
        order = attention.argsort(dim=-1, descending=True, stable=True) + prefix
        # The strongest of those that do not stay is the row into which the rest is joined.
        stay, last, gone = order[:, : keep - prefix - 1].sort(dim=-1).values, order[:, keep - prefix - 1, None], order[:, keep - prefix :]
        first = torch.arange(prefix, device=order.device).expand(order.shape[0], -1)
        return ops.reduce(tokens, torch.cat((first, stay, last), 1), gone, torch.full_like(gone, keep - 1))

    def macs(self, before: int, keep: int, prefix: int, mixed_heads: int) -> int:
        return 0 if before == keep else before * mixed_heads * self.channels


def _padded(tokens: Tokens, keep: int, real: Tensor, attention: Tensor) -> Tokens:
    """The same choice as without the padding, which comes after every real token."""
    n, prefix, pad = tokens.x.shape[1], tokens.prefix, tokens.size[:, tokens.prefix :] == 0
    best = attention.masked_fill(pad, -1).argsort(dim=-1, descending=True, stable=True)
    rank, stay = best.argsort(dim=-1), (real - prefix)[:, None]
    leaves = ((tokens.size > 0).sum(1) > real)[:, None]
    first = torch.zeros(len(rank), prefix, dtype=torch.bool, device=rank.device)
    gone = torch.cat((first, (rank >= stay) & ~pad), 1)
    joined = torch.cat((first, (rank == stay - 1) & leaves), 1)
    into = (prefix + best.gather(1, (stay - 1).clamp_min(0))).expand(-1, n)
    return ops.settle(tokens, keep, gone, into, torch.arange(n, device=rank.device) + n * joined)


METHOD = EViT
