"""What stands for blocks that paths leave out: maps fitted in closed form to what these blocks do on the full path."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from apportion.errors import DataError, PathError, PlanError
from apportion.methods import find
from apportion.network.model import Network, Run, gaps
from apportion.vocab import Path, Tokens

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Shares of the mean variance of what a map reads: few samples have few means, and then a weak ridge fits noise."""


Apart = Callable[[Tensor, Tensor], Tensor]
"""How far answers (b, ...) are from those of the full path, as a mean over samples, ()."""


class Bridge(NamedTuple):
    """What was found for one run, on held-out inputs."""

    run: Run
    ridge: float
    error: float  # of the map's tokens, as a share of the norm of what the run adds to them: leaving the run out has 1
    mapped: float  # how far answers are from the full path's with the map
    skipped: float  # and with nothing in place of the run

    @property
    def pays(self) -> bool:
        return self.mapped < self.skipped


def squared(answers: Tensor, full: Tensor) -> Tensor:
    """Mean squared difference."""
    return (answers - full).square().mean()


def left_out(network: Network, paths: Iterable[Path]) -> tuple[Run, ...]:
    """Every run of blocks that one of these paths leaves out."""
    return tuple(sorted({run for path in paths for run in gaps(path.blocks, network.architecture.depth)}))


@torch.no_grad()
def fit_bridges(
    network: Network, runs: Iterable[Run], batches: Iterable[Tensor], *, held_out: Sequence[Tensor], apart: Apart = squared, ridges: Sequence[float] = RIDGES
) -> tuple[Bridge, ...]:
    """Put a map for each run of blocks into the network's bridge (in place), fitted on the full path's tokens; a run (i, j) is blocks i to j - 1.

    Ridge regression in closed form (Hoerl and Kennard 1970, Technometrics 12) of what the run adds, y - x, on x, the mean of the tokens and a constant; of
    `ridges` the one with the least error on the tokens of `held_out`. Tokens that are nearer need not give better answers: a map stays only where it brings
    those of `held_out` nearer to the full path's than leaving the run out does. What was in the bridge before is forgotten. The full path leaves nothing
    out and stays what it was, bit for bit.

    Cost: one pass over both, and for each token 4 d^2 multiply-adds for each block at which a run begins and 2 d^2 for each run, in double precision; as many
    numbers of memory; and for each run two passes of the held-out inputs through the blocks behind it. Raises PlanError where no surrogate is in the plan
    and for ridges that are not positive, PathError for a run that is none, DataError without inputs.
    """
    method, depth, wanted = find("bridge", "surrogate"), network.architecture.depth, tuple(sorted(set(runs)))
    if type(network) is not Network or not isinstance(network.bridge, method):
        found = f"{type(network.bridge).__name__} in the bridge of a {type(network).__name__}"
        raise PlanError(found, wanted="a surrogate", do='Put Choice("bridge", "surrogate") into the network.')
    if wrong := [run for run in wanted if not 0 <= run[0] < run[1] <= depth]:
        raise PathError(f"blocks {wrong[0][0]} up to {wrong[0][1]}", wanted=f"a run within 0 to {depth}", do="Correct the run.")
    if not ridges or min(ridges) <= 0:
        raise PlanError(f"ridges {tuple(ridges)}", wanted="positive ones", do="Correct them.")
    fit, held = Moments.of(network, wanted, batches, "calibration"), Moments.of(network, wanted, held_out, "held-out")
    found, solved = list[Bridge](), dict[Run, Tensor]()
    for run in wanted:
        tried = {ridge: fit.solved(run, ridge) for ridge in ridges}
        errors = {ridge: held.error(run, weights) for ridge, weights in tried.items()}
        best = min(errors, key=errors.__getitem__)
        solved[run] = tried[best]
        found.append(Bridge(run, best, errors[best], 0.0, 0.0))
    _fill(network, solved)
    judged = _judged(network, found, held_out, apart)
    keep_bridges(network, (each.run for each in judged if each.pays))
    return judged


def _judged(network: Network, found: Sequence[Bridge], batches: Sequence[Tensor], apart: Apart) -> tuple[Bridge, ...]:
    """The same with what their answers are worth."""
    full, count, sums = network.space.full, sum(map(len, batches)), {each.run: [0.0, 0.0] for each in found}
    for inputs in batches:
        states = list(_states(network, inputs))
        wanted = network.finish(states[-1])
        for (first, last), sum_of in sums.items():
            for place, start in enumerate((network.bridge(states[first], first, last), states[first])):
                answers = network.finish(network.run(start, full.steps[last:]))
                sum_of[place] += apart(answers, wanted).item() * len(inputs) / count
    return tuple(each._replace(mapped=sums[each.run][0], skipped=sums[each.run][1]) for each in found)


def keep_bridges(network: Network, runs: Iterable[Run]) -> None:
    """Forget all maps but those for these runs (in place)."""
    kept = set(runs)
    if network.bridge.runs:
        _fill(network, {run: _weights(network, run) for run in network.bridge.runs if run in kept})  # pyright: ignore[reportGeneralTypeIssues]


def _weights(network: Network, run: Run) -> Tensor:
    part = network.bridge.maps[f"{run[0]}-{run[1]}"]  # pyright: ignore
    return torch.cat((part.token.weight.T, part.mean.weight.T, part.token.bias[None]))


def _fill(network: Network, maps: dict[Run, Tensor]) -> None:
    d, like, training = network.architecture.dim, next(network.parameters()), network.bridge.training
    made = find("bridge", "surrogate")(d, maps).to(like).requires_grad_(like.requires_grad).train(training)
    for run, weights in maps.items():
        part = made.maps[f"{run[0]}-{run[1]}"]
        for into, value in ((part.token.weight, weights[:d].T), (part.mean.weight, weights[d : 2 * d].T), (part.token.bias, weights[2 * d])):
            into.copy_(value)
    network.bridge = made


class Moments:
    """Second moments of what maps read, for each block at which runs begin, and with what the runs add; padding counts for nothing."""

    def __init__(self, network: Network, runs: Sequence[Run]) -> None:
        d, self.runs, self.count = network.architecture.dim, runs, 0
        self.read = {first: torch.zeros(2 * d + 1, 2 * d + 1, dtype=torch.float64) for first, _ in runs}
        self.cross = {run: torch.zeros(2 * d + 1, d, dtype=torch.float64) for run in runs}
        self.added = dict.fromkeys(runs, 0.0)

    @classmethod
    def of(cls, network: Network, runs: Sequence[Run], batches: Iterable[Tensor], which: str) -> Moments:
        made = cls(network, runs)
        for inputs in batches:
            made._add(list(_states(network, inputs)))
        if not made.count:
            raise DataError(f"no {which} inputs", wanted="at least one batch", do="Give batches that can be iterated over.")
        return made

    def _add(self, states: Sequence[Tokens]) -> None:
        real = states[0].size > 0
        x = [state.x[real].double() for state in states]
        self.count += len(x[0])
        for first in self.read:
            seen = _seen(states[first])[real]
            self.read[first] += (seen.T @ seen).cpu()
            for run in self.runs:
                if run[0] == first:
                    change = x[run[1]] - x[first]
                    self.cross[run] += (seen.T @ change).cpu()
                    self.added[run] += change.square().sum().item()

    def solved(self, run: Run, ridge: float) -> Tensor:
        """Weights (2 d + 1, d); the constant is not shrunk."""
        read, cross = self.read[run[0]] / self.count, self.cross[run] / self.count
        mean, change = read[-1, :-1], cross[-1]
        covariance = read[:-1, :-1] - mean.outer(mean)
        shrunk = covariance + ridge * covariance.diagonal().mean() * torch.eye(len(mean), dtype=torch.float64)
        weights = torch.linalg.lstsq(shrunk, cross[:-1] - mean.outer(change), driver="gelsd").solution
        return torch.cat((weights, (change - mean @ weights)[None]))

    def error(self, run: Run, weights: Tensor) -> float:
        """What these weights leave of what the run adds to tokens, as a share of its norm."""
        missed = self.added[run] - 2 * (weights * self.cross[run]).sum() + (weights * (self.read[run[0]] @ weights)).sum()
        return math.sqrt(max(0.0, float(missed)) / self.added[run]) if self.added[run] else 1.0


def _states(network: Network, inputs: Tensor) -> Iterator[Tokens]:
    """Tokens before the first block, and after each."""
    full = network.space.full
    tokens = network.tokeniser(inputs, full.patch)
    yield tokens
    for step in full.steps:
        tokens = network.run(tokens, (step,))
        yield tokens


def _seen(tokens: Tokens) -> Tensor:
    """What a map reads of each token, (b, n, 2 d + 1): itself, the mean and a constant."""
    x, own = tokens.x.double(), tokens.size[:, tokens.prefix :, None].double()
    mean = (x[:, tokens.prefix :] * own).sum(1, keepdim=True) / own.sum(1, keepdim=True).clamp_min(1e-6)
    return torch.cat((x, mean.expand_as(x), torch.ones_like(x[..., :1])), -1)
