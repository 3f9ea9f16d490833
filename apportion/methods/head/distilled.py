"""The answer is the mean of two: one layer reads the class token, another the distillation token behind it. Tokens -> (b, classes).

Touvron et al. 2021, "Training data-efficient image transformers & distillation through attention", arXiv 2012.12877, section 3 (joint classifiers).
"""

from __future__ import annotations

import copy

from torch import Tensor, nn

from apportion.vocab import Card, Tokens


class Distilled(nn.Module):
    card = Card("Distilled head", "Touvron et al. 2021", "2012.12877", None, exact=True, needs="nothing")

    def __init__(self, *, norm: nn.Module, project: nn.Module, macs_per_token: int, dim: int) -> None:
        super().__init__()
        self.norm, self.project, self.project_distilled, self._macs = norm, project, copy.deepcopy(project), 2 * macs_per_token

    def forward(self, tokens: Tokens) -> Tensor:
        x = self.norm(tokens.x[:, :2])
        return (self.project(x[:, 0]) + self.project_distilled(x[:, 1])) / 2

    def macs(self, tokens: int, prefix: int) -> int:
        return self._macs


METHOD = Distilled
