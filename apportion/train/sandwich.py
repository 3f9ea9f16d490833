"""Teaching many paths at once: the full path, the smallest and some between in every step, the full one teaching the others.

Yu and Huang 2019, "Universally Slimmable Networks", arXiv 1903.05134, sections 3.3 (sandwich rule) and 3.4 (in-place distillation).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from apportion.errors import PlanError
from apportion.methods import ops
from apportion.network import Network
from apportion.train.loop import Objective
from apportion.train.tasks import taught_by
from apportion.vocab import Notes, Path, Task, Tokens


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
    logit_weight: float = 1.0,
    label_weight: float = 1.0,
    excess_weight: float = 0.0,
    slack: float = 0.0,
    label_smoothing: float = 0.1,
    task: Task = "classification",
    span: float = 0.0,
) -> Objective[Network]:
    """The objective whose loss is that of the full path, plus the mean over its exits, plus the cheapest other path of `paths` and `extra` more.

    Each path goes on from the full path's own pass where the two part, so that work they share is done, and learns, once. An exit (a beginning of the
    full path) costs only a head: all exits are taught in every step. Of the other paths the cheapest and `extra` random ones are.

    Without a teacher the full path learns from the labels and, held constant, teaches the others; with one (frozen, in eval mode, of the same width) every
    path learns from it, the full one too, so that it does not drift, and labels may be missing. A taught path's loss is
    `logit_weight * distil(logits) + feature_weight * features(...) + excess_weight * max(0, excess(...) - slack)^2`, plus `label_weight` times
    the task's own loss where there are labels. `excess` bounds how much oftener a path errs than what it learns from, `slack` what it may.

    Cost per step: (1 + cost of the drawn paths after their parting) forward and backward passes, and one forward pass of the teacher. Raises PlanError where
    there is no path but the full one or the teacher is the network itself; the objective raises TrainError where there are neither labels nor a teacher.
    """
    soft, hard = taught_by(task, span=span, temperature=temperature, label_smoothing=label_smoothing)
    if excess_weight > 0 and task != "classification":
        raise PlanError(f"excess_weight {excess_weight:g} for {task}", wanted="0: the bound is on one class for each sample", do="Leave it out.")

    def taught(student: Seen, by: Seen, labels: Tensor | None) -> Tensor:
        loss = logit_weight * soft(student.logits, teacher=by.logits)
        if feature_weight > 0:
            loss = loss + feature_weight * features(student, by)
        if excess_weight > 0:
            loss = loss + excess_weight * (excess(student.logits, by.logits, labels) - slack).clamp_min(0).square()
        return loss if labels is None else loss + label_weight * hard(student.logits, target=labels)

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
    tokens = network.run(tokens, path.steps[start:], notes, after=path.blocks[start - 1])
    return Seen(path, network.finish(tokens, after=path.blocks[-1]), notes)


def excess(student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
    """An upper bound on how much oftener a path errs than its teacher, (): a share of the samples, differentiable in the path's logits.

    Whoever answers wrong gives the right class at most 1/2, so -log2 p(right) is at least 1 there, and nowhere below 0. Its mean over all samples, taken as 0
    where the teacher errs, is hence no less than the share which the teacher gets right and the path does not. Without labels the teacher is always right.
    Shapes: (b, classes) both; labels (b,) class numbers, or (b, classes) shares, of which the largest counts. Loose where answers are right but unsure.
    """
    answer = teacher.argmax(-1)
    right = answer if labels is None else labels if labels.ndim == 1 else labels.argmax(-1)
    bits = -student.float().log_softmax(-1).gather(1, right[:, None])[:, 0] / math.log(2)
    return (bits * (answer == right)).mean()


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
