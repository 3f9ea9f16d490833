"""A fitted map stands for a run of blocks that is left out: each token, changed linearly by itself and by the mean of the tokens.

Yom Din et al. 2023, "Jump to Conclusions", arXiv 2303.09435, section 3: h' = A h with A by least squares, from one layer to any later one. Here
h' = h + A h + B m + b with m the mean of the tokens beyond the prefix, each counted as often as it stands for source tokens: that is attention which looks at
all alike, and it is most of what a run of blocks moves between tokens. Fitted by `network.fit_bridges`; before that it passes tokens as they are.
Merging keeps the mean and goes through the linear part unchanged, so that a map that was fitted at full serves reduced tokens too.
Costs (n + 1) d^2 multiply-adds where a block costs about 12 n d^2, and 2 d^2 weights for each run. Do not use it where blocks are healed: they do as well.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self

from torch import Tensor, nn

from apportion.errors import PlanError
from apportion.vocab import Card, Tokens


class Map(nn.Module):
    """Tokens (b, n, d) and their mean (b, d) to how much is added. Zero at first."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.token, self.mean = nn.Linear(dim, dim), nn.Linear(dim, dim, bias=False)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, mean: Tensor) -> Tensor:
        return self.token(x) + self.mean(mean)[:, None]


class Surrogate(nn.Module):
    card = Card(
        "Fitted maps for blocks left out",
        "Yom Din et al. 2023",
        "2303.09435",
        None,
        exact=True,
        needs="calibration",
        changed="the map also reads the mean of the tokens: without it a run of blocks that mixes tokens is not worth replacing",
    )

    def __init__(self, dim: int, runs: Iterable[tuple[int, int]]) -> None:
        super().__init__()
        self.dim, self.runs = dim, tuple(sorted(runs))
        self.maps = nn.ModuleDict({name(run): Map(dim) for run in self.runs})

    @classmethod
    def from_dense(cls, part: object, dim: int, runs: str = "") -> Self:
        """`runs`: such as "3-5 3-6", each the first block of a run and the one behind its last; those for which maps are there."""
        return cls(dim, map(run_of, runs.split()))

    def forward(self, tokens: Tokens, first: int, last: int) -> Tokens:
        if (first, last) not in self.runs:
            return tokens
        own = tokens.size[:, tokens.prefix :, None].to(tokens.x.dtype)
        mean = (tokens.x[:, tokens.prefix :] * own).sum(1) / own.sum(1).clamp_min(1e-6)
        return tokens._replace(x=tokens.x + self.maps[name((first, last))](tokens.x, mean))

    def macs(self, tokens: int, first: int, last: int) -> int:
        return (tokens + 1) * self.dim**2 if (first, last) in self.runs else 0


def name(run: tuple[int, int]) -> str:
    return f"{run[0]}-{run[1]}"


def run_of(text: str) -> tuple[int, int]:
    """Raises PlanError."""
    first, _, last = text.partition("-")
    if not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise PlanError(f"a run of blocks {text!r}", wanted="such as 3-5: the first block and the one behind the last", do="Correct the plan.")
    return int(first), int(last)


METHOD = Surrogate
