"""The answer is read by a learned query that attends to all tokens, followed by one FFN.

Zhai et al. 2022, "Scaling Vision Transformers", arXiv 2106.04560, section 2.3 (MAP head). Tokens -> (b, classes).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from apportion.methods import ops
from apportion.vocab import Card, Tokens


class AttentionPool(nn.Module):
    card = Card("Attention-pool head", "Zhai et al. 2022", "2106.04560", None, exact=True, needs="nothing")

    def __init__(
        self, *, norm: nn.Module, project: nn.Module, macs_per_token: int, dim: int, heads: int, hidden: int, act: nn.Module, pool_norm: nn.Module
    ) -> None:
        super().__init__()
        self.heads, self.dim, self.hidden, self._macs = heads, dim, hidden, macs_per_token
        self.latent = nn.Parameter(torch.empty(1, dim).normal_(std=dim**-0.5))
        self.query, self.key_value, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.pool_norm, self.up, self.act, self.down = pool_norm, nn.Linear(dim, hidden), act, nn.Linear(hidden, dim)
        self.norm, self.project = norm, project

    def forward(self, tokens: Tokens) -> Tensor:
        b, n, d = tokens.x.shape
        query = self.query(self.latent).expand(b, 1, d).view(b, 1, self.heads, -1).transpose(1, 2)
        key, value = self.key_value(tokens.x).view(b, n, 2, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        x = self.proj(ops.attend(query, key, value, ops.size_bias(tokens)).transpose(1, 2).reshape(b, d))
        return self.project(self.norm(x + self.down(self.act(self.up(self.pool_norm(x))))))

    def macs(self, tokens: int, prefix: int) -> int:
        # The query of the latent is computed once for the whole batch; one sample is charged for it, as at batch 1.
        return (2 * self.dim * self.dim) + 2 * tokens * self.dim * self.dim + 2 * tokens * self.dim + 2 * self.dim * self.hidden + self._macs


METHOD = AttentionPool
