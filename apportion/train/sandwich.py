"""Teaching many paths at once: the full path, the smallest and some between in every step, the full one teaching the others.

Yu and Huang 2019, "Universally Slimmable Networks", arXiv 1903.05134, sections 3.3 (sandwich rule) and 3.4 (in-place distillation).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from apportion.errors import PlanError
from apportion.methods import find, ops
from apportion.network import Network
from apportion.train.loop import Objective
from apportion.vocab import Notes, Path, Tokens


class Seen(NamedTuple):
    """What one pass gave: its answer, and its tokens after each step."""

    path: Path
    logits: Tensor
    notes: Notes


def draw(paths: Sequence[Path], macs: Sequence[int], rng: random.Random, extra: int = 1) -> list[Path]:
    """The cheapest path and `extra` random others (all of them where there are fewer), without repeats. Raises PlanError where there is none."""
    if not paths:
        raise PlanError("no path beside the full one", wanted="at least one to teach", do="Put methods that adapt an axis into the network.")
    smallest = min(range(len(paths)), key=macs.__getitem__)
    others = [path for index, path in enumerate(paths) if index != smallest]
    return [paths[smallest], *rng.sample(others, min(extra, len(others)))]


def sandwich(
    paths: Sequence[Path],
    *,
    extra: int = 1,
    teacher: Network | None = None,
    temperature: float = 1.0,
    feature_weight: float = 1.0,
    label_smoothing: float = 0.1,
) -> Objective[Network]:
    """The objective whose loss is that of the full path, plus the mean over its exits, plus the cheapest other path of `paths` and `extra` more.

    Each path goes on from the full path's own pass where the two part, so that work they share is done, and learns, once. An exit (a beginning of the
    full path) costs only a head: all exits are taught in every step. Of the other paths the cheapest and `extra` random ones are.

    Without a teacher the full path learns from the labels and, held constant, teaches the others; with one (frozen, in eval mode, of the same width) every
    path learns from it, the full one too, so that it does not drift, and labels may be missing. A taught path's loss is
    `distil(logits) + feature_weight * features(...)`, plus cross-entropy where there are labels.

    Cost per step: (1 + cost of the drawn paths after their parting) forward and backward passes, and one forward pass of the teacher. Raises PlanError where
    there is no path but the full one or the teacher is the network itself; the objective raises TrainError where there are neither labels nor a teacher.
    """
    soft, hard = find("objective", "distil")(temperature=temperature), find("objective", "cross_entropy")(smoothing=label_smoothing)

    def taught(student: Seen, by: Seen, labels: Tensor | None) -> Tensor:
        loss = soft(student.logits, teacher=by.logits) + feature_weight * features(student, by)
        return loss if labels is None else loss + hard(student.logits, target=labels)

    def objective(network: Network, inputs: Tensor, labels: Tensor | None, rng: random.Random) -> Tensor:
        if teacher is network:
            raise PlanError("a teacher that is the network being taught", wanted="a frozen copy", do="Copy the network before it is trained.")
        full = network.space.full
        exits = [path for path in paths if path != full and shared(path, full) == len(path.steps)]
        others = [path for path in paths if path != full and path not in exits]
        if not exits and not others:
            raise PlanError("no path beside the full one", wanted="at least one to teach", do="Put methods that adapt an axis into the network.")
        trunk = run(network, inputs, full)
        if teacher is None:
            by, loss = trunk, hard(trunk.logits, target=labels)
        else:
            with torch.no_grad():
                by = run(teacher.to(inputs.device), inputs, teacher.space.full)
            loss = taught(trunk, by, labels)
        if exits:
            loss = loss + torch.stack([taught(branch(network, inputs, trunk, path), by, labels) for path in exits]).mean()
        for path in draw(others, [network.macs(path) for path in others], rng, extra) if others else ():
            loss = loss + taught(branch(network, inputs, trunk, path), by, labels)
        return loss

    return objective


def run(network: Callable[[Tensor, Path, Notes], Tensor], inputs: Tensor, path: Path) -> Seen:
    notes: Notes = {}
    return Seen(path, network(inputs, path, notes), notes)


def shared(path: Path, other: Path) -> int:
    """How many first steps two paths have in common."""
    pairs = zip(path.steps, other.steps, strict=False)
    return next((place for place, (mine, theirs) in enumerate(pairs) if mine != theirs), min(len(path.steps), len(other.steps)))


def branch(network: Network, inputs: Tensor, trunk: Seen, path: Path) -> Seen:
    """What `run` gives, going on from a pass that is there already."""
    start = shared(path, trunk.path)
    if start == 0:
        return run(network, inputs, path)
    notes = {name: values[:start] for name, values in trunk.notes.items()}
    tokens = Tokens(notes["feature"][-1], notes["size"][-1], notes["origin"][-1], network.space.prefix)
    return Seen(path, network.finish(network.run(tokens, path.steps[start:], notes)), notes)


def features(student: Seen, teacher: Seen) -> Tensor:
    """How far a path's tokens are from the teacher's after the same blocks: 0.9 (1 - cosine) + 0.1 smooth L1, mean over source tokens.

    Mix as in the feature loss of AdaPerceiver (Jajal et al. 2025, arXiv 2511.18105). Blocks are matched by their number, so a path that leaves some out is
    compared where both have been; weights rise linearly over the matched blocks and sum to 1, since early blocks are means and the last is the end. A merged
    token is compared with the mean of the teacher's tokens that it stands for, and counts as often: with nothing merged this is token by token.
    """
    place = {block: step for step, block in enumerate(teacher.path.blocks)}
    steps = len(student.path.blocks)
    distances = []
    for step, block in enumerate(student.path.blocks):
        x, size, origin = (student.notes[name][step] for name in ("feature", "size", "origin"))
        distances.append((step + 1) * distance(x.float(), gathered(sources(teacher, place[block]), size, origin), size))
    return torch.stack(distances).sum() / (steps * (steps + 1) / 2)


def sources(teacher: Seen, step: int) -> Tensor:
    """What the teacher, which is full, made of every source, (b, n0, d): its tokens, for images.

    The tokens of a text lie otherwise than its sources: padding comes last, is worth nothing here, and one source more stands for no token.
    """
    x, size, origin = (teacher.notes[name][step].detach() for name in ("feature", "size", "origin"))
    n = x.shape[1]
    return x.float() if origin.shape[1] == n else F.pad(ops.take(x.float() * size[..., None], origin[:, :n]), (0, 0, 0, 1))


def gathered(x: Tensor, size: Tensor, origin: Tensor) -> Tensor:
    """Means (b, n, d) of the source tokens x (b, n0, d) that went into each of n tokens, 0 for padding (size 0); x itself where nothing was merged."""
    if size.shape == origin.shape:
        return x
    return ops.add_at(x.new_zeros(*size.shape, x.shape[-1]), origin, x) / torch.where(size > 0, size, 1)[..., None]


def distance(x: Tensor, target: Tensor, size: Tensor) -> Tensor:
    """Mean over source tokens of what parts two sets of tokens, (b, n, d) each; 0 where they are equal."""
    each = 0.9 * (1 - F.cosine_similarity(x, target, dim=-1)) + 0.1 * F.smooth_l1_loss(x, target, reduction="none").mean(-1)
    return (each * size).sum() / size.sum()
