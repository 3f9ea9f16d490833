"""The answer is read from the mean of the tokens, each counting for as many as it stands for: merging does not move it. Tokens -> (b, classes)."""

from __future__ import annotations

from torch import Tensor, nn

from apportion.vocab import Card, Tokens


class Mean(nn.Module):
    card = Card("Mean head", "Zhai et al. 2022", "2106.04560", None, exact=True, needs="nothing")

    def __init__(self, *, norm: nn.Module, project: nn.Module, macs_per_token: int, dim: int) -> None:
        super().__init__()
        self.norm, self.project, self._macs = norm, project, macs_per_token

    def forward(self, tokens: Tokens) -> Tensor:
        x = tokens.x[:, tokens.prefix :]
        if tokens.reduced:
            size = tokens.size[:, tokens.prefix :, None]
            pooled = (x * size).sum(1) / size.sum(1)
        else:
            pooled = x.mean(1)
        return self.project(self.norm(pooled))

    def macs(self, tokens: int, prefix: int) -> int:
        return self._macs


METHOD = Mean
