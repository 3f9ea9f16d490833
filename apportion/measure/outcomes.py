"""The table that control learns from: every sample along every path, the glance taken once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from apportion.methods import ops
from apportion.vocab import Outcomes, Tokens

Look = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Inputs -> the signal (b, f) and every rung's logits (b, k, classes)."""


def look(glance: Callable[[Tensor], tuple[Tokens, Tensor]], rungs: Sequence[Callable[[Tokens], Tensor]]) -> Look:
    """The modules as they are, the glance taken once. Cost of a call: one full forward pass per sample and rung."""

    def run(inputs: Tensor) -> tuple[Tensor, Tensor]:
        state, signal = glance(inputs)
        return signal, torch.stack([rung(state).float() for rung in rungs], 1)

    return run


@torch.no_grad()
def measure_outcomes(look: Look, batches: Iterable[tuple[Tensor, Tensor | None]], *, cost: Tensor) -> Outcomes:
    """Run every rung on every sample, the last rung being the full path; `cost` (k,) is relative to it.

    Without labels a path is correct where it agrees with the full path, and its loss is the cross-entropy with the full path's answer.
    """
    columns: dict[str, list[Tensor]] = {name: [] for name in ("signal", "correct", "agree", "loss", "margin")}
    for inputs, labels in batches:
        signal, logits = look(inputs)
        answer = logits.argmax(-1)
        truth = answer[:, -1] if labels is None else labels
        columns["signal"].append(signal)
        columns["agree"].append(answer == answer[:, -1:])
        columns["correct"].append(answer == truth[:, None])
        columns["loss"].append(F.cross_entropy(logits.transpose(1, 2), truth[:, None].expand_as(answer), reduction="none"))
        columns["margin"].append(ops.margin(logits))
    return Outcomes(**{name: torch.cat(parts) for name, parts in columns.items()}, cost=cost)
