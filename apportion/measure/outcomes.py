"""The table that control learns from: every sample along every path, the glance taken once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from apportion.measure.judge import judge
from apportion.vocab import Outcomes, Task, Tokens

Look = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Inputs -> the signal (b, f) and every rung's answer (b, k, classes), or (b, k, n, classes)."""


def look(glance: Callable[[Tensor], tuple[Tokens, Tensor]], rungs: Sequence[Callable[[Tokens], Tensor]]) -> Look:
    """The modules as they are, the glance taken once. Cost of a call: one full forward pass per sample and rung."""

    def run(inputs: Tensor) -> tuple[Tensor, Tensor]:
        state, signal = glance(inputs)
        return signal, torch.stack([rung(state).float() for rung in rungs], 1)

    return run


def relayed(glance: Callable[[Tensor], tuple[Tokens, Tensor]], stations: Sequence[Callable[[Tokens], tuple[Tokens, Tensor]]]) -> Look:
    """The same for rungs of which each goes on where the one before it ended. Cost of a call: one full forward pass per sample, however many rungs."""

    def run(inputs: Tensor) -> tuple[Tensor, Tensor]:
        (state, signal), answers = glance(inputs), list[Tensor]()
        for station in stations:
            state, answer = station(state)
            answers.append(answer.float())
        return signal, torch.stack(answers, 1)

    return run


@torch.no_grad()
def measure_outcomes(
    look: Look, batches: Iterable[tuple[Tensor, Tensor | None]], *, cost: Tensor, task: Task = "classification", span: float = 0.0
) -> Outcomes:
    """Run every rung on every sample, the last rung being the full path; `cost` (k,) is relative to it.

    Without labels a path is as good as it agrees with the full path, and its loss is against the full path's answer.
    """
    columns: dict[str, list[Tensor]] = {name: [] for name in ("signal", "quality", "agree", "loss", "margin")}
    for inputs, labels in batches:
        signal, answers = look(inputs)
        for name, column in judge(answers, labels, task=task, span=span)._asdict().items():
            columns[name].append(column)
        columns["signal"].append(signal)
    return Outcomes(**{name: torch.cat(parts) for name, parts in columns.items()}, cost=cost)
