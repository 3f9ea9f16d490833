"""Teaching a perceiver every setting at once: its latents are such that one pass with all of them holds what fewer latents and fewer blocks would answer.

Jajal et al. 2025, "AdaPerceiver", arXiv 2511.18105, joint training; terms and weights as in its public recipes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from apportion.errors import TrainError
from apportion.methods import find
from apportion.network.perceiver import Perceiver, placed
from apportion.train.loop import Objective
from apportion.train.sandwich import distance
from apportion.vocab import Tokens

Loss = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
"""(what one setting answers, what a teacher answers, labels) -> loss, a scalar."""


def nested(loss: Loss, *, teacher: Callable[[Tensor], Tensor] | None = None) -> Objective[Perceiver]:
    """The objective  mean over counts t of loss(t, L)  +  sum over depths l of l loss(t_l, l) / sum l,  each sample at one width; L is the full depth.

    t_l is drawn anew for each depth and step. The batch is dealt out evenly over the widths, in an order drawn for each step, and every share runs its blocks
    with smaller products: as with the paper's masks of hidden units each sample sees one width, but none is computed to be thrown away. The teacher (frozen)
    answers as the network does. Cost per step: one forward and backward pass with all latents at the mean width, and an answer for every count and depth.
    """

    def objective(network: Perceiver, inputs: Tensor, labels: Tensor | None, rng: random.Random) -> Tensor:
        with torch.no_grad():
            by = None if teacher is None else teacher(inputs)
        space = network.space
        states = passed(network, inputs, rng.sample(space.width, len(space.width)))

        def at(state: Tokens, count: int) -> Tensor:
            return loss(network.finish(network.first(state, count)), by, labels)

        counts = torch.stack([at(states[-1], count) for count in space.counts])
        depths = torch.stack([number * at(state, rng.choice(space.counts)) for number, state in enumerate(states, 1)])
        return counts.mean() + depths.sum() / (space.depth * (space.depth + 1) / 2)

    return objective


def passed(network: Perceiver, inputs: Tensor, widths: Sequence[int]) -> list[Tokens]:
    """All latents after each block, the first share of the batch at the first of the widths, and so on; a batch smaller than that leaves out the last ones."""
    parts, states = [network.tokeniser(share, network.space.patch) for share in inputs.chunk(len(widths))], []
    for steps in zip(*(network.space.path(width=width).steps for width in widths), strict=True):
        parts = [network.run(part, (step,)) for part, step in zip(parts, steps, strict=False)]
        states.append(placed(torch.cat([part.x for part in parts]), parts[0].prefix))
    return states


def classes(*, temperature: float = 1.0, label_smoothing: float = 0.1) -> Loss:
    """Cross-entropy where there are labels plus distillation where there is a teacher, for each sample or for each of its patches (labels (b, patches)).

    The loss raises TrainError where there is neither.
    """
    soft, hard = find("objective", "distil")(temperature=temperature), find("objective", "cross_entropy")(smoothing=label_smoothing)

    def loss(answer: Tensor, teacher: Tensor | None, labels: Tensor | None) -> Tensor:
        if teacher is None and labels is None:
            raise TrainError("neither labels nor a teacher", wanted="one of them", do="Give labels, or a frozen network that answers.")
        parts = [] if teacher is None else [soft(answer, teacher=teacher)]
        if labels is not None:
            parts.append(hard(answer.flatten(0, -2), target=labels.flatten(0, -2) if labels.ndim == answer.ndim else labels.flatten()))
        return torch.stack(parts).sum()

    return loss


def alike() -> Loss:
    """How far features (b, n, d) are from the teacher's, 0.9 (1 - cosine) + 0.1 smooth L1: for a network with `per_patch` whose classes are the teacher's
    channels. The loss raises TrainError where there is no teacher; labels are not looked at.
    """

    def loss(answer: Tensor, teacher: Tensor | None, labels: Tensor | None) -> Tensor:
        if teacher is None:
            raise TrainError("no teacher", wanted="one that gives features for every patch", do="Give a frozen network.")
        return distance(answer.float(), teacher.float(), answer.new_ones(answer.shape[:-1]))

    return loss
