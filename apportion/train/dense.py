"""Training the full path from scratch on labels."""

from __future__ import annotations

import random

from torch import Tensor

from apportion.network import Network
from apportion.train.loop import Objective
from apportion.train.tasks import taught_by
from apportion.vocab import Task


def dense(*, label_smoothing: float = 0.1, task: Task = "classification", span: float = 0.0) -> Objective[Network]:
    """The task's own loss at the full path, and no other path is run. The objective raises TrainError where there are no labels."""
    hard = taught_by(task, span=span, label_smoothing=label_smoothing).labels

    def objective(network: Network, inputs: Tensor, labels: Tensor | None, rng: random.Random) -> Tensor:
        return hard(network(inputs, network.space.full), target=labels)

    return objective
