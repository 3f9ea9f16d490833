"""Teaching learners and gates in three stages: each module by itself, its gate by itself, then all together under a random budget.

Wójcik et al. 2023, "Adaptive Computation Modules", arXiv 2312.10193, section 3.2. `teach` runs the stages through the one loop. The last one may also be
`sandwich`, where a plan adapts other axes too: the gate then learns from the task alone, as the served form keeps the budget by itself.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path as File
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apportion.errors import PlanError
from apportion.methods import find
from apportion.methods.ffn.acm import AdaptiveComputation, grouped, straight_through, weighed
from apportion.network import Network
from apportion.train.data import Data
from apportion.train.loop import Fitted, Objective, fit
from apportion.train.recipe import Recipe
from apportion.vocab import Notes

LEARNERS_SHARE, GATES_SHARE = 0.2, 0.2  # of the epochs; published: 0.02 and 0.01 of a hundred, which are more steps than a short run has
LEARNERS_RATE, GATES_RATE = 1e-3, 1e-2  # learning rates, as published


class PerToken(nn.Module):
    """The published rule: each token gets what its own logits say. Eager only, and no closed-form cost: shapes follow the data."""

    def __init__(self, of: AdaptiveComputation) -> None:
        super().__init__()
        self.of, self.choices = of, of.choices

    def forward(self, x: Tensor, width: int, notes: Notes | None = None, size: Tensor | None = None) -> Tensor:
        logits = self.of.logits(x, width, notes)
        if logits is None:
            return self.of.part(x, width, notes, size)
        counts = logits.argmax(-1)
        if logits.requires_grad:
            return weighed(self.of.part, x, straight_through(logits, counts))
        flat = counts.flatten()
        return grouped(self.of.part, x, flat.argsort(stable=True), flat.bincount(minlength=self.of.learners + 1).tolist())


class Seen(NamedTuple):
    """A module to be taught, and what the teacher's module in the same place was given and gave; of texts without padding, all words in one row."""

    ffn: AdaptiveComputation
    x: Tensor  # (b, n, d)
    y: Tensor  # (b, n, d)


def per_token(network: Network) -> Network:
    """The same network, with the same weights, in which every token decides for itself."""
    alike = copy.deepcopy(network, {id(parameter): parameter for parameter in network.parameters()})
    for block in alike.blocks:
        if isinstance(block.ffn, AdaptiveComputation):
            block.ffn = PerToken(block.ffn)
    return alike


def adaptive(network: Network) -> dict[int, AdaptiveComputation]:
    """The modules to be taught, by block. Raises PlanError where there are none."""
    found = {place: block.ffn for place, block in enumerate(network.blocks) if isinstance(block.ffn, AdaptiveComputation)}
    if not found:
        raise PlanError("a network without learners", wanted="ffn `acm` in some block", do="Put it there first.")
    return found


@torch.no_grad()
def watched(network: Network, teacher: Network, inputs: Tensor) -> list[Seen]:
    """One pass of the teacher's full path, and what its FFNs saw."""
    modules, seen = adaptive(network), list[Seen]()

    def watch(ffn: AdaptiveComputation):
        def look(module, args: tuple, out: Tensor) -> None:
            x, size = args[0], args[3]
            real = None if size is None else size > 0
            seen.append(Seen(ffn, x, out) if real is None else Seen(ffn, x[real][None], out[real][None]))

        return look

    handles = [teacher.blocks[place].ffn.register_forward_hook(watch(ffn)) for place, ffn in modules.items()]  # pyright: ignore
    try:
        teacher.to(inputs.device)(inputs, teacher.space.full)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def errors(seen: Seen) -> Tensor:
    """Squared distance of h_0, ..., h_N to the teacher's output, (b, n, N + 1)."""
    return torch.stack([(seen.ffn.part(seen.x, k * seen.ffn.unit) - seen.y).square().sum(-1) for k in range(seen.ffn.learners + 1)], -1)


def learners(teacher: Network) -> Objective[Network]:
    """Stage I: every h_k of every module is drawn to the output of the teacher's module, on the teacher's own inputs.

    Loss: mean over k = 0..N of the squared error as a share of the output's variance, mean over modules (the paper leaves the error unscaled and
    k = 0, which has no bias there, out). Cost: a forward pass of the teacher, and (N + 1) / 2 times the FFNs.
    """

    def objective(network: Network, inputs: Tensor, labels: Tensor | None, rng: random.Random) -> Tensor:
        return torch.stack([errors(seen).mean() / (seen.y.shape[-1] * seen.y.var()) for seen in watched(network, teacher, inputs)]).mean()

    return objective


def gates(teacher: Network, *, tau: float | None = None) -> Objective[Network]:
    """Stage II: every gate learns, for every budget, which tokens profit from more learners; cross-entropy with labels from the errors of stage I's learners.

    Labels are those of `least_error` at the budget; with `tau` those of `relative_gain`, as published, which know of no budget. Raises PlanError where no
    module has a gate.
    """

    def objective(network: Network, inputs: Tensor, labels: Tensor | None, rng: random.Random) -> Tensor:
        losses = []
        for seen in watched(network, teacher, inputs):
            if seen.ffn.gate is None:
                continue
            with torch.no_grad():
                error = errors(seen).flatten(0, 1)
            for k in range(1, seen.ffn.learners):
                wanted = least_error(error, k) if tau is None else relative_gain(error.sqrt(), tau)
                losses.append(F.cross_entropy(seen.ffn.gate(seen.x, k).flatten(0, 1), wanted))
        if not losses:
            raise PlanError("learners without a gate", wanted="a gate of at least 1 hidden unit", do="Set the option `gate`, or leave this stage out.")
        return torch.stack(losses).mean()

    return objective


def relative_gain(error: Tensor, tau: float = 1.2) -> Tensor:
    """How many learners (tokens,): up to the first that makes the error, (tokens, N + 1) norms, smaller by less than the factor `tau`; all where none does.

    "None does" and "the first does" are kept apart: taking the place of a maximum for both sends the easiest tokens to all learners.
    """
    little = error[:, :-1] / error[:, 1:].clamp_min(torch.finfo(error.dtype).tiny) < tau
    return torch.where(little.any(-1), little.int().argmax(-1) + 1, error.shape[1] - 1)


def least_error(error: Tensor, mean: float) -> Tensor:
    """How many learners (tokens,) for the least sum of squared errors (tokens, N + 1) at `mean` learners a token, or a few more: one price for all."""
    count, low, high = torch.arange(error.shape[1], device=error.device), error.new_zeros(()), error.max()
    for _ in range(40):
        price = (low + high) / 2
        spends = (error + price * count).argmin(-1).float().mean() >= mean
        low, high = torch.where(spends, price, low), torch.where(spends, high, price)
    return (error + low * count).argmin(-1)


def spending(logits: Sequence[Tensor], share: float) -> Tensor:
    """The three terms (3,) of per-token choices in a batch, from each module's logits (b, n, N + 1); all are to be small.

    How far the mean share of learners is from the budget; minus the entropy of the choices within a sample, as a share of the greatest; minus twice the mean
    difference between two samples' shares. Budget alone would give every token the same. (As printed, the last term lacks its sign.)
    """
    used, tokens, entropies = logits[0].new_zeros(len(logits[0])), 0, []
    for each in logits:
        choice, n = straight_through(each, each.argmax(-1)), each.shape[-1] - 1
        used = used + (choice * torch.arange(n + 1, device=each.device)).sum((1, 2)) / n
        tokens += each.shape[1]
        histogram = choice.mean(1)
        entropies.append(-(histogram * (histogram + 1e-6).log()).sum(-1).mean() / math.log(n + 1))
    used = used / tokens
    return torch.stack(((used.mean() - share).abs(), -torch.stack(entropies).mean(), -2 * (used[:, None] - used).abs().mean()))


def end_to_end(
    teacher: Network | None = None,
    *,
    free: float = 0.0,
    weights: tuple[float, float, float] = (1.0, 0.05, 0.05),
    temperature: float = 1.0,
    label_smoothing: float = 0.1,
) -> Objective[Network]:
    """Stage III: the task at one random budget in every step; in `free` ones with `weights` for budget, entropy and diversity.

    A share `free` of the steps runs the published per-token rule, and `weights` are for these: the served rule keeps budget and variety by itself. The loss
    is cross-entropy where there are labels, plus distillation where there is a teacher (frozen, in eval mode). Cost: one full forward and backward pass,
    and the teacher's forward pass. The objective raises TrainError where there are neither labels nor a teacher.
    """
    soft, hard = find("objective", "distil")(temperature=temperature), find("objective", "cross_entropy")(smoothing=label_smoothing)

    def objective(network: Network, inputs: Tensor, labels: Tensor | None, rng: random.Random) -> Tensor:
        if free and network.architecture.words:
            raise PlanError(f"free = {free:g} for texts", wanted="0: padding would count in the budget of tokens that decide alone", do="Leave it out.")
        width, alone, notes = rng.choice(network.space.width), rng.random() < free, Notes()
        logits = (per_token(network) if alone else network)(inputs, network.space.path(width=width), notes)
        loss = hard(logits, target=labels) if labels is not None or teacher is None else logits.new_zeros(())
        if teacher is not None:
            with torch.no_grad():
                answer = teacher.to(inputs.device)(inputs, teacher.space.full)
            loss = loss + soft(logits, teacher=answer)
        if alone and "gate" in notes:
            loss = loss + (spending(notes["gate"], width / network.space.width[-1]) * logits.new_tensor(weights)).sum()
        return loss

    return objective


def teach(
    network: Network, data: Data, *, teacher: Network, last: Objective[Network], recipe: Recipe, folder: File | None = None, progress: bool = True
) -> tuple[Fitted, ...]:
    """The three stages, in place: learners, gates where there are any, and `last` on everything, for the recipe's epochs in all.

    `teacher` is a frozen copy in eval mode from before; without one for the last stage, give it labels. Each stage has a folder of its own and goes on where it
    was cut off. Raises what `fit` raises, and PlanError where no block has learners. Not after the learners were taught once: units must not be sorted then.
    """
    modules = adaptive(network).values()
    parts = [parameter for ffn in modules for parameter in ffn.part.parameters()]  # pyright: ignore
    gating = [parameter for ffn in modules if ffn.gate is not None for parameter in ffn.gate.parameters()]
    first = replace(recipe, epochs=LEARNERS_SHARE * recipe.epochs, learning_rate=LEARNERS_RATE, weight_decay=0.0)
    second = replace(recipe, epochs=GATES_SHARE * recipe.epochs, learning_rate=GATES_RATE, weight_decay=0.0)
    third = replace(recipe, epochs=(1 - LEARNERS_SHARE - GATES_SHARE) * recipe.epochs)
    stages = [("learners", first, learners(teacher), parts), ("gates", second, gates(teacher), gating), ("all", third, last, list(network.parameters()))]
    fitted = []
    for name, part, objective, turned in stages:
        if turned:
            with only(network, turned):
                fitted.append(fit(network, data, objective, recipe=part, folder=None if folder is None else folder / name, progress=progress))
    return tuple(fitted)


@contextmanager
def only(network: Network, turned: Sequence[nn.Parameter]) -> Iterator[None]:
    """Gradients for these parameters alone; afterwards for those that had them before."""
    before = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    network.requires_grad_(False)
    for parameter in turned:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)
