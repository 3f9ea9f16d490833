"""Adam whose weight decay acts on the weights, not through the gradient's moments.

Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization", arXiv 1711.05101, algorithm 2. Decay falls on the matrices of products only:
not on biases, norms, scales, class tokens, registers or positions, which are offsets or gains with no size of their own to keep small.
State: two tensors of a parameter's size and one count each.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from apportion.vocab import Card


class AdamW(torch.optim.AdamW):
    card = Card("AdamW", "Loshchilov and Hutter 2019", "1711.05101", None, exact=True, needs="training")

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], *, learning_rate: float, weight_decay: float) -> None:
        matrices, others = [], []
        for name, parameter in named:
            (matrices if parameter.ndim > 1 and name.endswith("weight") else others).append(parameter)
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        super().__init__([group for group in groups if group["params"]], lr=learning_rate, fused=True)


METHOD = AdamW
