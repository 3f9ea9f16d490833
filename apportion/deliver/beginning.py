"""What comes before the work: words that were asked for by their names, a network as it begins, and how good the one is that was read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from apportion.deliver.costs import chosen_lengths
from apportion.deliver.ranking import Tell, Wanted
from apportion.engine import Backend
from apportion.engine.graph import ALONE
from apportion.errors import EngineError, PlanError
from apportion.intake import Feed, Parts, Samples, Tokenise
from apportion.measure.judge import METRICS
from apportion.network import Architecture, Network, Perceiver, PerceiverArchitecture
from apportion.vocab import Task


def foreseen(quality: Tensor, samples: Samples, task: Task, tell: Tell) -> None:
    """How good the model is that was read, said before anything takes long; one that is worse than guessing was given labels that mean something else."""
    good, labels = float(quality.double().mean()), samples.labels
    tell(f"the dense model: {METRICS[task]} {100 * good:.2f} % on the {len(samples)} samples for the test")
    if task == "classification" and labels is not None and good < 1 / len(labels.unique()):
        tell("which is less than guessing: do these labels mean its outputs? A classes.json (name to number) beside class folders says which output each is")


Stem = Literal["conv", "patch"]
"""How pictures begin: with convolutions, or with one product for each patch."""


def begin_with(a: Architecture, stem: Stem | None) -> Architecture:
    """This shape with that stem; the shape as it is for None. Raises PlanError where there are no pictures."""
    if stem is not None and not a.image_size:
        raise PlanError(f"a stem of {stem!r} for what is no picture", wanted="pictures", do="Leave it out, or use another method than `apt`.")
    return a if stem is None else replace(a, stem=stem)


def perceiver_of(a: Architecture, task: Task) -> Perceiver:
    """One of this shape, whose latents are a sixteenth, an eighth, a quarter and half of the patches. Raises PlanError for other than classes of pictures."""
    if not a.image_size or task != "classification":
        raise PlanError(f"a perceiver for {task}, image size {a.image_size}", wanted="classes of pictures", do="Leave the method out.")
    patches = (a.image_size // a.patch) ** 2
    shared = {name: getattr(a, name) for name in ("image_size", "patch", "dim", "depth", "heads", "hidden", "classes", "channels", "stem", "activation", "eps")}
    return Perceiver(PerceiverArchitecture(**shared, latents=tuple(sorted({max(1, patches // part) for part in (16, 8, 4, 2)}))))


def to_scale(network: Network, numbers: Tensor) -> None:
    """Answers of an untrained network as far apart, and about as large, as these numbers (n, outputs): steps of a thousandth would not get there in time."""
    project: Any = network.head.project
    last = [part for part in project.modules() if isinstance(part, nn.Linear)][-1]
    with torch.no_grad():
        last.weight.mul_(numbers.std(0, correction=0).clamp_min(torch.finfo(numbers.dtype).tiny)[:, None])
        if last.bias is not None:
            last.bias.copy_(numbers.mean(0))


def backend(name: str) -> Backend:
    """A back-end by name. Raises EngineError."""
    for known in get_args(Backend):
        if name == known:
            return known
    raise EngineError(f"back-end {name!r}", wanted=f"one of {', '.join(get_args(Backend))}", do="Name one of these.")


def at_once(backend: Wanted, buckets: Sequence[int] | None) -> Sequence[int] | None:
    """The batch sizes asked for, or one sample at a time where the back-end runs no more at once."""
    return (1,) if buckets is None and backend in ALONE else buckets


def wanted(name: str) -> Wanted:
    """A back-end by name, or `auto`. Raises EngineError."""
    return "auto" if name == "auto" else backend(name)


def one_of(kind: Any, name: str | None) -> Any:
    """A word of a Literal, such as Task or Pooling, by name; None for none. Raises PlanError."""
    if name is not None and name not in get_args(kind):
        raise PlanError(f"{name!r}", wanted=f"one of {', '.join(get_args(kind))}", do="Name one of these.")
    return name


def graph_lengths(network: Network, parts: Parts, feed: Feed, tell: Tell) -> tuple[int, ...]:
    """Lengths of text to build graphs for, none where it is doubled ones, or no texts."""
    found, saved = chosen_lengths(network, parts.decide, parts.place, feed)
    if isinstance(feed, Tokenise):
        tell(f"graphs for texts of {', '.join(map(str, found))} tokens" if found else "graphs for doubled lengths of text")
        tell(f"lengths from traffic {'save' if found else 'would save'} {100 * saved:.1f} % of the tokens that doubled ones run")
    return found
