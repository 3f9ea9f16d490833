"""A plain matrix that cuts itself: its first `out` rows and first `inp` columns, as views, so that a narrower path is a smaller product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apportion.vocab import Card


class DenseWeight(nn.Module):
    """x (..., inp) -> (..., out)."""

    card = Card("Dense matrix", "", "", None, exact=True, needs="nothing")

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        nn.init.trunc_normal_(self.weight, std=0.02 if in_features > 256 else in_features**-0.5 / 2)

    def forward(self, x: Tensor, out: int | None = None, inp: int | None = None) -> Tensor:
        weight, bias = self.weight, self.bias
        if out is not None and out < self.out_features:
            weight, bias = weight[:out], None if bias is None else bias[:out]
        return F.linear(x, weight if inp is None or inp == self.in_features else weight[:, :inp], bias)

    @torch.no_grad()
    def permute(self, *, out: Tensor | None = None, inp: Tensor | None = None) -> None:
        """Put rows and columns into this order (in place)."""
        if out is not None:
            self.weight.copy_(self.weight[out])
            if self.bias is not None:
                self.bias.copy_(self.bias[out])
        if inp is not None:
            self.weight.copy_(self.weight[:, inp])

    def strength(self) -> Tensor:
        """Squared norm of each column: how far an input channel reaches."""
        return self.weight.detach().float().square().sum(0)


METHOD = DenseWeight
