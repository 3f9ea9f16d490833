"""The answer is read from the first token (Dosovitskiy et al. 2021, arXiv 2010.11929, section 3.1). Tokens -> (b, classes)."""

from __future__ import annotations

from torch import Tensor, nn

from apportion.vocab import Card, Tokens


class ClassToken(nn.Module):
    card = Card("Class-token head", "Dosovitskiy et al. 2021", "2010.11929", None, exact=True, needs="nothing")

    def __init__(self, *, norm: nn.Module, project: nn.Module, macs_per_token: int, dim: int) -> None:
        super().__init__()
        self.norm, self.project, self._macs = norm, project, macs_per_token

    def forward(self, tokens: Tokens) -> Tensor:
        return self.project(self.norm(tokens.x[:, 0]))

    def macs(self, tokens: int, prefix: int) -> int:
        return self._macs


METHOD = ClassToken
