"""The world of decisions in sequence as plain tables: where a sample may go, what that costs, and what it pays."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from apportion.control.labels import task_reward
from apportion.errors import ControlError

LEAVE = 0  # the first action everywhere: answer here
GRID = 2.0**30


@dataclass(frozen=True, slots=True)
class Graph:
    """Where each action leads and what it costs. Nodes are in order of work, so no action leads back; the last node is the full path's end.

    Costs are shares of the full path, from multiply-adds or from measured times alike. They are rounded up to multiples of 2^-30, so that
    their sums are exact in any order and a cap holds to the last bit. Raises ControlError on a table that is no such graph.
    """

    after: Tensor  # (nodes, actions) int64: the node reached, the node itself for LEAVE, -1 where illegal
    cost: Tensor  # (nodes, actions) float64

    def __post_init__(self) -> None:
        nodes, self_ = len(self.after), torch.arange(len(self.after))[:, None]
        wrong = (self.after >= nodes) | ((self.after >= 0) & (self.after <= self_)) | (self.after < -1)
        wrong[:, LEAVE] = (self.after[:, LEAVE] != self_[:, 0]) & (self.after[:, LEAVE] != -1)
        stuck = (self.after < 0).all(1)
        if self.cost.shape != self.after.shape or bool((wrong | stuck[:, None]).any()) or self.after[-1, LEAVE] < 0:
            where = (wrong | stuck[:, None]).any(1).nonzero().flatten().tolist()
            raise ControlError(
                f"actions {tuple(self.after.shape)} with costs {tuple(self.cost.shape)}; nodes {where} lead back, outside or nowhere",
                wanted="each action to lead to a later node, LEAVE to its own, the last node to have LEAVE",
                do="Build the graph with segments().",
            )
        cost = torch.where(self.after < 0, 0.0, self.cost.double())
        if not bool(((cost >= 0) & (cost < 2**12)).all()):
            raise ControlError(f"costs from {cost.min():.4g} to {cost.max():.4g}", wanted="shares of the full path, none negative", do="Divide by its cost.")
        object.__setattr__(self, "cost", (cost * GRID).ceil() / GRID)

    @property
    def depth(self) -> int:
        """The most actions from the first node to an answer, LEAVE counted."""
        steps = torch.zeros(len(self.after), dtype=torch.int64)
        for node in reversed(range(len(self.after))):
            onward = self.after[node, 1:]
            steps[node] = 1 + (int(steps[onward[onward >= 0]].max()) if bool((onward >= 0).any()) else 0)
        return int(steps[0])

    @property
    def least(self) -> Tensor:
        """The cheapest way to an answer that begins with each action, inf where illegal, (nodes, actions)."""
        return -best(self, torch.where(self.after < 0, -torch.inf, -self.cost)[None])[2][0]

    @property
    def dearest(self) -> float:
        """The most that any way to an answer costs."""
        return best(self, torch.where(self.after < 0, -torch.inf, self.cost)[None])[0][0, 0].item()


def segments(run: Tensor, leave: Tensor, *, glance: float = 0.0, skips: int = 0) -> tuple[Graph, tuple[tuple[int, ...], ...]]:
    """The graph over a network's segments, and the segments that have run at each node: what its signals and answers are measured on.

    Actions: leave; run the next segment; leave it out and run the one after, at most `skips` times (SkipNet: Wang et al., 2018,
    arXiv 1711.09485). A skip ends behind a segment that ran, since nothing new is seen before. Without skips it is a chain. Shapes: run (t,),
    the cost of each segment; leave (t + 1,), the cost of an answer after that many; glance, what was spent before.
    """
    count = len(run)
    ran = [
        tuple(block for block in range(end) if block not in out)
        for end in range(count + 1)
        for skipped in range(skips + 1)
        for out in combinations(range(end - 1), skipped)
        if all(later - earlier > 1 for earlier, later in pairwise(out))
    ]
    ran.sort(key=lambda done: (max(done, default=-1), len(done), done))
    place = {done: node for node, done in enumerate(ran)}
    after, cost = torch.full((len(ran), 3 if skips else 2), -1), torch.zeros(len(ran), 3 if skips else 2, dtype=torch.float64)
    for done, node in place.items():
        at = max(done, default=-1) + 1
        after[node, LEAVE], cost[node, LEAVE] = node, leave[at]
        for action in range(1, after.shape[1]):
            segment = at + action - 1
            if (onward := place.get((*done, segment))) is not None:
                after[node, action], cost[node, action] = onward, run[segment]
    cost[0] += glance
    return Graph(after, cost), tuple(ran)


@dataclass(frozen=True, slots=True)
class Episodes:
    """Samples by nodes: all that a sequential policy ever learns from."""

    signal: Tensor  # (n, nodes, f) what is seen at each node
    correct: Tensor  # (n, nodes) bool: an answer there is right
    log_p: Tensor  # (n, nodes) log-probability there of the true class, or of the full path's answer

    def __post_init__(self) -> None:
        shapes = {name: tuple(getattr(self, name).shape) for name in ("signal", "correct", "log_p")}
        if self.signal.ndim != 3 or any(shape[:2] != shapes["signal"][:2] for shape in shapes.values()) or not len(self.signal):
            raise ControlError(
                f"tables of shapes {shapes}", wanted="one row for each sample, one column for each node", do="Measure every node on every sample."
            )
        broken = (~self.signal.isfinite().all(2) | ~self.log_p.isfinite()).nonzero()
        if len(broken):
            row, node = broken[0].tolist()
            raise ControlError(
                f"a signal or log-probability that is not finite in row {row} at node {node}",
                wanted="finite numbers",
                do="Use log_softmax; look at this sample.",
            )

    def rows(self, index: Tensor) -> Episodes:
        """The same tables for some of the samples."""
        return replace(self, signal=self.signal[index], correct=self.correct[index], log_p=self.log_p[index])


class Reward(NamedTuple):
    """What a sample is paid for: the task's, the step's and the budget's terms."""

    penalty: float = 1.0  # for an error that the full path does not make
    shaping: float = 0.1  # weight of the potential

    def table(self, graph: Graph, episodes: Episodes, *, price: float = 0.0) -> Tensor:
        """What each action pays at each node, -inf where illegal, (n, nodes, actions).

        Task: `task_reward` on leaving. Step: -price * cost + shaping * (Phi(next) - Phi(here)), Phi = log_p, and 0 once an answer is given.
        The potential adds up to -shaping * Phi(start) along every way, so it tells earlier which way is good and moves no optimum (Ng, Harada
        and Russell, 1999). Budget: the price at which the mean cost is the budget is the dual variable of that constraint.
        """
        potential = self.shaping * episodes.log_p.float()
        table = potential[:, graph.after.clamp_min(0)] - potential[:, :, None]
        table[:, :, LEAVE] = task_reward(episodes.correct, penalty=self.penalty) - potential
        return (table - price * graph.cost.float()).masked_fill(graph.after < 0, -torch.inf)


def best(graph: Graph, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Backward induction: value (n, nodes), best action (n, nodes) and value of each action (n, nodes, actions) for this reward table.

    On one sample's own rewards it is foresight: what is best knowing the outcome. On expected rewards it is what a policy can reach.
    """
    value, worth = torch.zeros_like(table[:, :, 0]), table.clone()
    for node in reversed(range(len(graph.after))):
        worth[:, node, 1:] += value[:, graph.after[node, 1:].clamp_min(0)]
        value[:, node] = worth[:, node].amax(1)
    return value, worth.argmax(2), worth


def follow(graph: Graph, action: Tensor) -> tuple[Tensor, Tensor]:
    """Where this table of actions, (n, nodes), makes each sample answer, and what it spends: (n,) int64, (n,) float64."""
    rows = torch.arange(len(action))
    node, spent, alive = torch.zeros_like(rows), torch.zeros(len(rows), dtype=torch.float64), torch.ones_like(rows, dtype=torch.bool)
    for _ in range(graph.depth):
        taken = action[rows, node]
        spent = spent + graph.cost[node, taken] * alive
        node, alive = torch.where(alive, graph.after[node, taken], node), alive & (taken != LEAVE)
    return node, spent
