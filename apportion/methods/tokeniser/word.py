"""Token embedding: look up each id of a text, add positions and token types, normalise, project where the table is narrower than the network.

Devlin et al. 2019, "BERT", arXiv 1810.04805, section 3; factorised table: Lan et al. 2020, "ALBERT", arXiv 1909.11942, section 3.1.
Padding becomes tokens of size 0, which no attention sees and no mean counts; they are put last, wherever they stood. (b, n) int64 ids, or (b, 2, n) ids and
token types -> Tokens, n up to `length`. Cost: look-ups, and one product per token where there is a projection.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from apportion.errors import PathError
from apportion.vocab import Card, Tokens


class WordTokeniser(nn.Module):
    """Tables of `words`, `positions` (of which the first `offset` rows are not used) and `types`, each (entries, embedding); 0 entries: no such table.

    A real token's position is its number among the real ones. There is one source more than tokens in `origin`, which stands for no token: so sizes count from
    the first block on (`Tokens.reduced`). A row of padding alone is read as one token, so that its answer is finite.
    """

    card = Card("Token embedding", "Devlin et al. 2019", "1810.04805", None, exact=True, needs="nothing")
    entering: tuple[int, ...] = ()

    def __init__(
        self, *, words: int, length: int, padding: int, dim: int, embedding: int, positions: int, offset: int, types: int, class_token: bool, norm: nn.Module
    ) -> None:
        super().__init__()
        self.length, self.padding, self.offset, self.prefix = length, padding, offset, int(class_token)

        def table(entries: int) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(entries, embedding).normal_(std=0.02)) if entries else None

        self.word = nn.Embedding(words, embedding)
        self.position, self.kind = table(positions), table(types)
        self.norm = norm
        self.project = nn.Linear(embedding, dim) if embedding != dim else nn.Identity()

    def forward(self, inputs: Tensor, patch: int) -> Tokens:
        if patch:
            raise PathError(f"patch {patch}", wanted="patch 0: a text has none", do="Build paths with Space.path().")
        pair = inputs.ndim == 3 and inputs.shape[1] == 2 and self.kind is not None
        if not (inputs.ndim == 2 or pair) or inputs.dtype != torch.int64 or not 1 <= inputs.shape[-1] <= self.length:
            wanted = f"int64 (batch, n){' or (batch, 2, n)' if self.kind is not None else ''} with n from 1 to {self.length}"
            raise PathError(f"an input of {tuple(inputs.shape)}, {inputs.dtype}", wanted=wanted, do="Cut the text, or read the model with a larger length.")
        ids, kinds = (inputs[:, 0], inputs[:, 1]) if pair else (inputs, None)
        b, n = ids.shape
        real = ids != self.padding
        order = (~real).int().argsort(dim=1, stable=True)
        index = torch.arange(n, device=ids.device)
        x = self.word(ids.gather(1, order))
        if self.kind is not None:
            x = x + (self.kind[0] if kinds is None else self.kind[kinds.gather(1, order)])
        if self.position is not None:
            x = x + self.position[self.offset : self.offset + n]
        size = (index < real.sum(1, keepdim=True).clamp_min(1)).to(x.dtype)
        origin = torch.full((b, n + 1), n - 1, device=ids.device).scatter(1, order, index.expand(b, n))
        return Tokens(self.project(self.norm(x)), size, origin, self.prefix)

    def macs(self, patch: int) -> int:
        return self.length * self.project.in_features * self.project.out_features if isinstance(self.project, nn.Linear) else 0


METHOD = WordTokeniser
