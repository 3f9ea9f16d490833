"""What a network is taught by, task by task: what a teacher says, and what the labels say."""

from __future__ import annotations

from typing import NamedTuple

from apportion.errors import PlanError
from apportion.methods import find
from apportion.methods.slots import Objective
from apportion.vocab import Task


class TaughtBy(NamedTuple):
    """Losses of an answer against a teacher's, and against labels."""

    teacher: Objective
    labels: Objective


def taught_by(task: Task, *, span: float = 0.0, temperature: float = 1.0, label_smoothing: float = 0.0) -> TaughtBy:
    """`span`: how far numbers range that are foretold. Raises PlanError where it is not above 0 for a regression."""
    if task == "classification":
        return TaughtBy(find("objective", "distil")(temperature=temperature), find("objective", "cross_entropy")(smoothing=label_smoothing))
    if task in ("token_classification", "segmentation"):
        both = find("objective", "every_place")(smoothing=label_smoothing, temperature=temperature)
    elif task == "regression":
        if not span > 0:
            raise PlanError(f"a span of {span}", wanted="how far the numbers range, above 0", do="Give labels that differ.")
        both = find("objective", "error")(span=span)
    else:
        both = find("objective", {"multilabel": "binary", "embedding": "cosine"}[task])()
    return TaughtBy(both, both)
