"""Attention that looks again until its answer settles: queries and keys are taken anew from what came out, values stay, and each sample stops by itself.

Mathur et al. 2025, "Change of Thought: Adaptive Test-Time Computation", arXiv 2507.13569 (fixed-point self-attention). From z = x, z <- x + f(z), where
f(z) is attention with queries and keys of z and values of x, until no token of the sample moves by more than `tolerance` of its length, or f has run
`iterations` times; the branch is f(z), so that one iteration is the dense mixer. Gradients go through the last f alone, with z as far from x as it is. A
graph is static: it runs all iterations and freezes, so its cost is the full one; `grouped` runs samples that still move, in eager. Where the products of
queries and keys are large nothing settles, the bound ends it, and rounding grows with every run: watch "iterations" in the notes. No use without training,
and none to save compute.
"""

from __future__ import annotations

import copy
from typing import Protocol, Self

import torch
from torch import Tensor, nn

from apportion.errors import PlanError
from apportion.methods import ops
from apportion.methods.slots import Contribution, Mixed, Mixer, Nested, Norm, Weight
from apportion.vocab import Card, Notes, Tokens


class Plain(Mixer, Protocol):
    """The dense mixer, which is plain while it has no positions of its own: the first three are 0, 0 and None."""

    rotary: float
    window: int
    relative: Tensor | None
    channels: int
    qkv: Weight
    proj: Weight
    query_norm: Norm
    key_norm: Norm
    norm: Nested | None


class FixedPoint(nn.Module):
    """Rows of `qkv`: queries and keys head by head, then values head by head. `notes` receives "iterations" (b,), how often f was of use."""

    card = Card(
        "Fixed-point self-attention",
        "Mathur et al. 2025",
        "2507.13569",
        None,
        exact=False,
        needs="training",
        changed="a sample stops when all of its tokens have settled, so that each keeps the tolerance; no spectral norms: the first run is what was trained",
    )

    def __init__(self, part: Plain, *, iterations: int, tolerance: float) -> None:
        super().__init__()
        heads, c = part.choices[-1], part.channels
        self.heads, self.channels, self.iterations, self.tolerance = heads, c, iterations, tolerance
        self.choices: tuple[int, ...] = (heads,)
        self.qkv, self.proj, self.query_norm, self.key_norm, self.norm = copy.deepcopy(part.qkv), part.proj, part.query_norm, part.key_norm, part.norm
        rows = torch.arange(3 * heads * c).view(heads, 3 * c)
        self.qkv.permute(out=torch.cat((rows[:, : 2 * c].flatten(), rows[:, 2 * c :].flatten())))
        self.temperature = nn.Parameter(torch.ones(heads))  # multiplies the scores of a head

    @classmethod
    def from_dense(cls, part: Plain, *, iterations: int = 3, tolerance: float = 1e-3) -> Self:
        """Raises PlanError for fewer than two iterations, and for a mixer that is not plain attention or has positions of its own."""
        if iterations < 2 or not tolerance >= 0:
            wanted = "at least 2 iterations and a tolerance that is not negative"
            raise PlanError(f"{iterations} iterations to {tolerance}", wanted=wanted, do="Correct the plan.")
        if not {"qkv", "proj", "rotary", "window", "relative"} <= set(dir(part)) or part.rotary or part.window or part.relative is not None:
            wanted = "plain attention without rotary positions, windows or a bias by distance"
            raise PlanError(f"a fixed point of {type(part).__name__}", wanted=wanted, do="Take one of the two out of the plan.")
        return cls(part, iterations=iterations, tolerance=tolerance)

    def forward(self, tokens: Tokens, heads: int, notes: Notes | None = None) -> Mixed:
        x, bias = tokens.x, ops.size_bias(tokens)
        first, value = self.start(x)
        query_key, z, going = first, x, torch.ones(len(x), dtype=torch.bool, device=x.device)
        count = torch.ones(len(x), device=x.device)
        for _ in range(1, self.iterations):
            with torch.no_grad():
                new = x + self.branch(query_key, value, bias)
                going = going & (moved(z, new, tokens.size) > self.tolerance)
                z, count = torch.where(going[:, None, None], new, z), count + going
            query_key = self.again(x + (z - x).detach())
        if notes is not None:
            notes.setdefault("iterations", []).append(count)
        return Mixed(self.branch(query_key, value, bias), *self.split(first))

    def start(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys (b, n, 2d), and values (b, n, d), of the input."""
        both = self.qkv(x)
        return both[..., : 2 * self.heads * self.channels], both[..., 2 * self.heads * self.channels :]

    def again(self, z: Tensor) -> Tensor:
        """Queries and keys (b, n, 2d) of a later z."""
        return self.qkv(z, out=2 * self.heads * self.channels)

    def split(self, query_key: Tensor) -> tuple[Tensor, Tensor]:
        query, key = query_key.unflatten(-1, (self.heads, 2, self.channels)).permute(3, 0, 2, 1, 4).unbind(0)
        return self.query_norm(query) * self.temperature.to(query)[:, None, None], self.key_norm(key)

    def branch(self, query_key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        """f, (b, n, d)."""
        out = ops.attend(*self.split(query_key), value.unflatten(-1, (self.heads, -1)).transpose(1, 2), bias).transpose(1, 2).flatten(2)
        return self.proj(out if self.norm is None else self.norm(out))

    def macs(self, tokens: int, heads: int) -> int:
        return self.grouped_macs(tokens, self.iterations)

    def grouped_macs(self, tokens: int, iterations: int) -> int:
        """Multiply-adds of a sample that stops after so many iterations, in `grouped`."""
        n, d = tokens, self.heads * self.channels
        return n * d * d + iterations * n * d * (3 * d + 2 * n)

    def contribution(self) -> Contribution:
        return Contribution(self.get_submodule("proj"), self.channels, self.proj.strength())

    @torch.no_grad()
    def permute(self, order: Tensor) -> None:
        """Put the heads into this order; the output stays what it was."""
        c = self.channels
        pairs, singles = ((order[:, None] * each + torch.arange(each, device=order.device)).flatten() for each in (2 * c, c))
        self.qkv.permute(out=torch.cat((pairs, 2 * self.heads * c + singles)))
        self.proj.permute(inp=singles)
        self.temperature.copy_(self.temperature[order])
        if self.norm is not None:
            self.norm.permute(singles)


def moved(z: Tensor, new: Tensor, size: Tensor) -> Tensor:
    """How far the token that moved most has moved, as a share of its length, (b,); padding does not count."""
    return ((new - z).norm(dim=-1) / z.norm(dim=-1)).masked_fill(size == 0, 0).amax(1)


def grouped(mixer: FixedPoint, tokens: Tokens) -> Tensor:
    """The branch (b, n, d), where a sample that has settled is not run again. Eager, as shapes follow the data."""
    out, left, size, bias = torch.zeros_like(tokens.x), torch.arange(len(tokens.x), device=tokens.x.device), tokens.size, ops.size_bias(tokens)
    query_key, value = mixer.start(tokens.x)
    x = z = tokens.x
    for run in range(1, mixer.iterations + 1):
        branch = mixer.branch(query_key, value, bias)
        on = (moved(z, x + branch, size) > mixer.tolerance) & (run < mixer.iterations)
        out = out.index_copy(0, left[~on], branch[~on])
        if not bool(on.any()):
            break
        left, x, z, value, size, bias = left[on], x[on], (x + branch)[on], value[on], size[on], None if bias is None else bias[on]
        query_key = mixer.again(x + (z - x))
    return out


METHOD = FixedPoint
