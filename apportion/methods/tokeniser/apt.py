"""Adaptive patch sizes: where the picture is plain, one token stands for a square of four patches.

Choudhury et al. 2025, "Accelerating Vision Transformers with Adaptive Patch Sizes", arXiv 2510.18091, section 3. The plainness of a cell of 2 x 2 patches is
the entropy of its grey levels, H = -sum q log2 q; the plainest become coarse tokens E(cell at half size) + Z(C(E of its patches)) + position of the cell,
with Z zero at first. (b, channels, side, side) -> Tokens: prefix, patches in raster order, then coarse tokens in raster order. Cost: one product for each
patch, and for each coarse token one more and 5 d^2; it saves in every block after it. Not for a convolutional stem, nor where detail is everywhere.
"""

from __future__ import annotations

import math
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apportion.errors import PathError, PlanError
from apportion.methods import ops
from apportion.vocab import Card, Tokens

GREY = (0.2989, 0.587, 0.114)
LEVELS = 256


class APT(nn.Module):
    """Wraps the patch tokeniser of a trained network. `level` is one grey level of 255 in the units of the inputs: 1 / (255 std) after normalisation."""

    card = Card(
        "Adaptive patch sizes",
        "Choudhury et al. 2025",
        "2510.18091",
        "tokens",
        exact=True,
        needs="healing",
        changed="two sizes; a path states how many tokens leave, and the plainest cells of each image are coarse, so that shapes are static (how many a "
        "threshold would leave is `needed`); a coarse token has size 4, by which later attention and heads weigh it; grey levels need no mean",
    )

    def __init__(self, part: Any, *, level: float) -> None:
        super().__init__()
        self.part, self.level, self.levels = part, level, LEVELS
        self.cells = part.grid // 2  # along each side; an odd last row and column stay fine
        full = part.grid**2 + part.prefix
        self.entering = tuple(full - 3 * coarse for coarse in range(self.cells**2, 0, -1))
        dim = part.project.out_channels
        self.join, self.add = nn.Conv2d(dim, dim, 2, 2), nn.Linear(dim, dim)
        nn.init.zeros_(self.add.weight)
        nn.init.zeros_(self.add.bias)

    @classmethod
    def from_dense(cls, part: Any, *, level: float = 1 / (255 * 0.225)) -> Self:
        """Raises PlanError for a convolutional stem, whose patches overlap, and for a picture of fewer than 2 x 2 patches."""
        if not isinstance(part.project, nn.Conv2d) or part.grid < 2:
            raise PlanError(
                f"adaptive patch sizes on {part.grid} x {part.grid} patches made by {type(part.project).__name__}",
                wanted="one product for each patch, at least 2 x 2 of them",
                do="Take the choice out of the plan.",
            )
        return cls(part, level=level)

    def forward(self, inputs: Tensor, patch: int, tokens: int | None = None) -> Tokens:
        """`tokens`: how many leave, prefix included: three fewer for each coarse one, all patches where nothing is said. Raises PathError."""
        coarse, side = self._coarse(tokens), self.part.image_size
        if not coarse or patch != self.part.patch or inputs.shape[-2:] != (side, side):
            return self.part(inputs, patch)  # which refuses what does not fit
        b, fine = len(inputs), self.part.grid**2 - 4 * coarse
        cell = self.entropy(inputs).argsort(dim=-1, stable=True)[:, :coarse].sort(dim=-1).values
        members = self._members(inputs.device)[cell].flatten(1)  # (b, 4 coarse)
        embedded = self.part.project(inputs).flatten(2).transpose(1, 2)
        gone = torch.zeros(embedded.shape[:2], dtype=torch.uint8, device=inputs.device).scatter(1, members, 1)
        stay = gone.argsort(dim=-1, stable=True)[:, :fine]
        position = self.part.position[-embedded.shape[1] :]
        large = self._large(inputs, cell, ops.take(embedded, members)) + self._coarse_position(position)[cell]
        x = torch.cat((self._first(b), ops.take(embedded + position, stay), large), 1)
        prefix, index = self.part.prefix, torch.arange(x.shape[1], device=inputs.device)
        origin = torch.zeros_like(gone, dtype=torch.int64).scatter(1, stay, index[prefix : prefix + fine].expand(b, -1))
        origin = origin.scatter(1, members, index[prefix + fine :].repeat_interleave(4).expand(b, -1))
        size = torch.where(index < prefix + fine, x.new_ones(()), 4).expand(b, -1)
        return Tokens(self.part.norm(x), size, torch.cat((index[:prefix].expand(b, -1), origin), 1), prefix)

    def macs(self, patch: int, tokens: int | None = None) -> int:
        dim = self.join.out_channels
        return self.part.macs(patch) + self._coarse(tokens) * (self.part.project.weight.numel() + 5 * dim * dim)

    def entropy(self, inputs: Tensor) -> Tensor:
        """Bits (b, cells) of the grey levels in each cell, from 0 for one colour to 8. A shift of all levels is nothing to it."""
        weight = inputs.new_tensor(GREY if inputs.shape[1] == len(GREY) else (1 / inputs.shape[1],) * inputs.shape[1])
        grey = (inputs * weight[:, None, None]).sum(1, keepdim=True)
        # Counted round and round: a wider range than that of 8 bits would otherwise pile up at one end and look plain.
        cell = self._cells((grey / self.level).round().remainder(LEVELS), 2 * self.part.patch).flatten(2).long()
        count = inputs.new_zeros(*cell.shape[:2], LEVELS).scatter_add(2, cell, inputs.new_ones(()).expand_as(cell))
        return torch.special.entr(count / cell.shape[2]).sum(-1) / math.log(2)

    def needed(self, inputs: Tensor, threshold: float) -> Tensor:
        """How many tokens (b,) each image needs where cells below so many bits are coarse (the paper: 5.5): a signal for whoever chooses the path."""
        return self.part.grid**2 + self.part.prefix - 3 * (self.entropy(inputs) < threshold).sum(1)

    def _coarse(self, tokens: int | None) -> int:
        full = self.part.grid**2 + self.part.prefix
        if tokens is None or tokens == full:
            return 0
        if tokens not in self.entering:
            raise PathError(f"{tokens} tokens from the tokeniser", wanted=f"{self.entering[0]} to {full} in steps of 3", do="Correct the path.")
        return (full - tokens) // 3

    def _members(self, device: torch.device) -> Tensor:
        """The patches (cells, 4) of each cell, row by row."""
        corner = 2 * torch.arange(self.cells, device=device)
        grid = self.part.grid
        return (corner[:, None] * grid + corner).flatten()[:, None] + torch.tensor([0, 1, grid, grid + 1], device=device)

    def _cells(self, image: Tensor, side: int) -> Tensor:
        """Squares (b, cells, channels, side, side) of an image; what is beyond the last whole one is left out."""
        whole = image[:, :, : self.cells * side, : self.cells * side]
        return whole.unflatten(3, (self.cells, side)).unflatten(2, (self.cells, side)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)

    def _large(self, inputs: Tensor, cell: Tensor, patches: Tensor) -> Tensor:
        """Embedding (b, coarse, d) of the cells: at half size as if it were a patch, and what its own patches (b, 4 coarse, d) add."""
        b, coarse = cell.shape
        # The mean of 2 x 2 pixels is the bilinear resize by two: no tap leaves the cell.
        half = ops.take(self._cells(F.avg_pool2d(inputs, 2), self.part.patch), cell)
        detail = self.join(patches.reshape(b * coarse, 2, 2, -1).permute(0, 3, 1, 2)).flatten(1)
        return (self.part.project(half.flatten(0, 1)).flatten(1) + self.add(detail)).view(b, coarse, -1)

    def _coarse_position(self, position: Tensor) -> Tensor:
        grid = position.T.view(1, -1, self.part.grid, self.part.grid)[..., : 2 * self.cells, : 2 * self.cells]
        return F.interpolate(grid, size=(self.cells, self.cells), mode="bicubic")[0].flatten(1).T

    def _first(self, batch: int) -> Tensor:
        """Class and register tokens (batch, prefix, d)."""
        part = self.part
        if part.first is None:
            return part.position.new_zeros(batch, 0, part.position.shape[1])
        return (part.first + part.position[: part.prefix] if part.position_prefix else part.first).expand(batch, -1, -1)


METHOD = APT
