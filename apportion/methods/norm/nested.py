"""Layer normalisation that cuts itself: fewer channels are normed among themselves, with the first of the gains and shifts.

Ba et al. 2016, arXiv 1607.06450, over a nested dimension, as inside a branch of NormFormer (Shleifer et al. 2021, arXiv 2110.09456, section 2).
(..., c) -> (..., c) with c up to full. Exact at full; a narrower slice has a mean and a spread of its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apportion.vocab import Card


class NestedNorm(nn.Module):
    card = Card("Nested layer normalisation", "Shleifer et al. 2021", "2110.09456", None, exact=True, needs="nothing")

    def __init__(self, width: int, *, eps: float, bias: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[-1]
        return F.layer_norm(x, (width,), self.weight[:width], None if self.bias is None else self.bias[:width], self.eps)

    @torch.no_grad()
    def permute(self, order: Tensor) -> None:
        """Put the channels into this order (in place)."""
        for factor in (self.weight, self.bias):
            if factor is not None:
                factor.copy_(factor[order])


METHOD = NestedNorm
