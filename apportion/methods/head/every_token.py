"""An answer for each source token: each is given that of the token it went into. Tokens -> (b, n, classes), 0 where there is no token.

Devlin et al. 2019, "BERT", arXiv 1810.04805, section 5.3, for words; Strudel et al. 2021, "Segmenter", arXiv 2105.05633, section 3.2 (linear decoder), for
patches. Tokens of the prefix have an answer in texts, where they are words like others, and none in images. So a path that merges still answers for all.
Padding stands behind the words where a path merges: where else it stood cannot be seen any more.
"""

from __future__ import annotations

from torch import Tensor, nn

from apportion.methods import ops
from apportion.vocab import Card, Tokens


class EveryToken(nn.Module):
    """`words`: whether tokens are those of a text, whose `origin` has one source more, which stands for no token."""

    card = Card("A head for each token", "Devlin et al. 2019", "1810.04805", None, exact=True, needs="nothing")

    def __init__(self, *, norm: nn.Module, project: nn.Module, macs_per_token: int, dim: int, words: bool) -> None:
        super().__init__()
        self.norm, self.project, self._macs, self.words = norm, project, macs_per_token, words

    def forward(self, tokens: Tokens) -> Tensor:
        answers = self.project(self.norm(tokens.x))
        if not self.words:
            return ops.take(answers, tokens.origin[:, tokens.prefix :])
        origin, real = tokens.origin[:, :-1], (tokens.size > 0).int()
        held = ops.take(real, origin)
        # A reducer may leave padding no place of its own: sizes say how many words there are.
        known = held * (held.cumsum(1) <= tokens.size.sum(1, keepdim=True))
        return ops.take(answers, origin) * known[..., None]

    def macs(self, tokens: int, prefix: int) -> int:
        return self._macs * tokens


METHOD = EveryToken
