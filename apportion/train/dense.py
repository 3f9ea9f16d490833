"""Training the full path from scratch on labels."""

from __future__ import annotations

import random

from torch import Tensor

from apportion.methods import find
from apportion.network import Network
from apportion.train.loop import Objective


def dense(*, label_smoothing: float = 0.1) -> Objective[Network]:
    """Cross-entropy at the full path, and no other path is run. The objective raises TrainError where there are no labels."""
    hard = find("objective", "cross_entropy")(smoothing=label_smoothing)

    def objective(network: Network, inputs: Tensor, labels: Tensor | None, rng: random.Random) -> Tensor:
        return hard(network(inputs, network.space.full), target=labels)

    return objective
