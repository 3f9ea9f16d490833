"""Feature embedding: one token for each column of a table, a number times a learned vector plus a bias, or a row of a category's own table plus a bias.

Gorishniy et al. 2021, "Revisiting Deep Learning Models for Tabular Data" (FT-Transformer), arXiv 2106.11959, section 3.3 and its feature tokenizer.
(b, columns) float, numbers first, then categories by the number of their entry -> Tokens: prefix, then the columns in order. A number that is missing (NaN)
is a vector of its own. Cost: no product of matrices, so no multiply-adds are counted. Not for hundreds of columns: blocks cost with the square of their number.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from apportion.errors import PathError
from apportion.vocab import Card, Tokens


class FeatureTokeniser(nn.Module):
    """`categories`: entries of each column that holds categories. Columns need no positions: each has vectors of its own."""

    card = Card(
        "Feature tokenizer",
        "Gorishniy et al. 2021",
        "2106.11959",
        None,
        exact=True,
        needs="nothing",
        changed="a number that is missing is a learned vector",
    )
    entering: tuple[int, ...] = ()

    def __init__(self, *, numbers: int, categories: Sequence[int], dim: int, prefix: int) -> None:
        super().__init__()
        self.numbers, self.categories, self.prefix = numbers, tuple(categories), prefix

        def learned(rows: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(rows, dim).uniform_(-(dim**-0.5), dim**-0.5))

        columns = numbers + len(self.categories)
        self.first, self.weight, self.missing, self.entry, self.bias = (learned(rows) for rows in (prefix, numbers, numbers, sum(self.categories), columns))
        self.start: Tensor  # of each category's entries among all
        self.register_buffer("start", torch.tensor((0, *self.categories), dtype=torch.int64).cumsum(0)[:-1], persistent=False)

    def forward(self, inputs: Tensor, patch: int) -> Tokens:
        """A category's entry beyond its own is not looked for: indices are taken as they are."""
        if patch:
            raise PathError(f"patch {patch}", wanted="patch 0: a row of a table has none", do="Build paths with Space.path().")
        if inputs.ndim != 2 or inputs.shape[1] != len(self.bias):
            raise PathError(f"an input of {tuple(inputs.shape)}", wanted=f"(batch, {len(self.bias)})", do="Give the columns that the network was made for.")
        value = inputs[:, : self.numbers, None]
        absent = value.isnan()
        # Not NaN times weight: its gradient would be NaN too, whatever is chosen afterwards.
        number = torch.where(absent, self.missing, value.masked_fill(absent, 0) * self.weight)
        entry = self.entry[inputs[:, self.numbers :].long() + self.start]
        x = torch.cat((self.first.expand(len(inputs), -1, -1), torch.cat((number, entry), 1) + self.bias), 1)
        b, n, _ = x.shape
        return Tokens(x, x.new_ones(b, n), torch.arange(n, device=x.device).expand(b, n), self.prefix)

    def macs(self, patch: int) -> int:
        return 0


METHOD = FeatureTokeniser
