"""Sort hidden units and heads by importance, so that a prefix is the best subset; the output does not change."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from apportion.methods.slots import FeedForward, Mixer
from apportion.network.model import Network


@torch.no_grad()
def sort_by_importance(network: Network, batches: Iterable[Tensor]) -> None:
    """Put the units that contribute most first, in every FFN and mixer (in place).

    Importance of a unit is the root mean square of its activation times the norm of its outgoing weights, over the calibration batches
    (after Sun et al. 2024, "Wanda", arXiv 2306.11695, section 3, summed over a unit's outgoing weights). Cost: one full forward pass over the batches.
    """
    parts: list[Mixer | FeedForward] = [part for block in network.blocks for part in (block.mixer, block.ffn)]  # pyright: ignore
    squares = _squares(network, parts, batches)
    for part, square in zip(parts, squares, strict=True):
        contribution = part.contribution()
        importance = (square * contribution.strength).view(-1, contribution.unit).sum(1)
        part.permute(importance.argsort(descending=True, stable=True))


def _squares(network: Network, parts: list[Mixer | FeedForward], batches: Iterable[Tensor]) -> list[Tensor]:
    """Sum of squares of every input channel of the module where a part's units show."""
    watched = [part.contribution() for part in parts]
    sums = [torch.zeros_like(contribution.strength) for contribution in watched]

    def watch(index: int):
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict) -> None:
            sums[index] += args[0].float().square().flatten(0, -2).sum(0)

        return hook

    handles = [contribution.into.register_forward_pre_hook(watch(i), with_kwargs=True) for i, contribution in enumerate(watched)]
    try:
        for inputs in batches:
            network(inputs, network.space.full)
    finally:
        for handle in handles:
            handle.remove()
    return sums
