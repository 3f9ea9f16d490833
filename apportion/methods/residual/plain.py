"""The branch is added as it is (He et al. 2016, arXiv 1512.03385)."""

from __future__ import annotations

from torch import Tensor, nn

from apportion.vocab import Card


class Plain(nn.Module):
    card = Card("Residual connection", "He et al. 2016", "1512.03385", None, exact=True, needs="nothing")

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        return x + branch


METHOD = Plain
