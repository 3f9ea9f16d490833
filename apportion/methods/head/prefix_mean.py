"""The answer is read from the mean of the tokens in front, such as a class and a distillation token. Tokens -> (b, classes).

Gong et al. 2021, "AST: Audio Spectrogram Transformer", arXiv 2104.01778, whose published code does so; it needs at least one such token.
"""

from __future__ import annotations

from torch import Tensor, nn

from apportion.vocab import Card, Tokens


class PrefixMean(nn.Module):
    card = Card("Mean of the prefix", "Gong et al. 2021", "2104.01778", None, exact=True, needs="nothing")

    def __init__(self, *, norm: nn.Module, project: nn.Module, macs_per_token: int, dim: int) -> None:
        super().__init__()
        self.norm, self.project, self._macs = norm, project, macs_per_token

    def forward(self, tokens: Tokens) -> Tensor:
        return self.project(self.norm(tokens.x[:, : tokens.prefix].mean(1)))

    def macs(self, tokens: int, prefix: int) -> int:
        return self._macs


METHOD = PrefixMean
