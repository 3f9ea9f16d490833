"""Gates on a bias by distance: each query says, head by head, how much of it counts.

Chen et al. 2022, "WavLM", arXiv 2110.13900, section III, after Chi et al. 2022, "XLM-E", arXiv 2106.16138.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Gate(nn.Module):
    """(b, n, d) -> (b, heads, n, 1): two gates for each head, of which one lets in the other; `linear`, d -> heads * 2, head by head.

    All heads are computed, also where a path uses fewer: 2 d heads MACs for each token. A source that looks at a head's own channels only has zeros elsewhere.
    """

    def __init__(self, heads: int, linear: Any) -> None:
        super().__init__()
        self.linear, self.scale = linear, nn.Parameter(torch.ones(heads))

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.linear(x).unflatten(-1, (-1, 2)).sigmoid().permute(3, 0, 2, 1)[..., None].unbind(0)
        return one * (two * self.scale[:, None, None] - 1) + 2

    @torch.no_grad()
    def permute(self, order: Tensor) -> None:
        """Put the heads into this order."""
        self.linear.permute(out=(2 * order[:, None] + torch.arange(2, device=order.device)).flatten())
        self.scale.copy_(self.scale[order])
