"""Teaching network and policy together: every path learns from the inputs that the policy sends it, and the policy from what every path earns.

The last stage of Transformer^-1 (2025, arXiv 2501.16394), whose form is not public; the expectation over paths is exact here, since all of them are run.
"""

from __future__ import annotations

import random
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apportion.errors import PlanError, TrainError
from apportion.network import Network
from apportion.train.loop import Objective
from apportion.train.sandwich import Seen, branch, features, run
from apportion.vocab import Ladder

SHARED = 0.5  # of a path's weight that does not depend on the policy: a path that is hardly taken is not forgotten


class Decider(Protocol):
    """What is asked of a controller: costs of the paths (k,), what each is worth to each input (b, k) at a budget (), and the price on compute there."""

    cost: Tensor

    def worth(self, signal: Tensor, budget: Tensor) -> Tensor: ...
    def price(self, budget: Tensor) -> Tensor: ...


class Joint(nn.Module):
    """A network and the module that decides over its ladder, as one thing to train."""

    def __init__(self, network: Network, ladder: Ladder, decider: nn.Module) -> None:
        super().__init__()
        if len(ladder.paths) < 2:
            raise PlanError(f"a ladder of {len(ladder.paths)} path", wanted="at least two to decide between", do="Serve more paths.")
        self.network, self.ladder, self.decider = network, ladder, decider

    def policy(self, inputs: Tensor, budget: Tensor, *, temperature: float) -> Tensor:
        """Chance of each path for each input, (b, k): soft where a served controller takes the largest."""
        decider: Decider = self.decider  # pyright: ignore[reportAssignmentType]
        signal = self.network.glance(self.ladder.glance)(inputs)[1]
        return ((decider.worth(signal, budget) - decider.price(budget) * decider.cost) / temperature).softmax(-1)


def joint(*, teacher: Network | None = None, temperature: float = 0.1, feature_weight: float = 0.1, label_smoothing: float = 0.1) -> Objective[Joint]:
    """The objective  E_x[ sum_a q_a(x) loss_a(x) ] + loss_full - E_x[ sum_a pi_a(x) (p_a(y|x) - price c_a) ] - temperature H(pi).

    q is half pi, held constant, and half even; p_a(y|x) is what path a gives to the right class, held constant, on the scale of the controller's own reward;
    the budget is drawn for each step between the cheapest and the dearest path, and the price is the one that keeps it. Labels, or where there are none the
    teacher's answer, say what is right. The temperature is annealed by calling `fit` again with a lower one. Afterwards outcomes are
    measured again on rows that nothing was taught on and the controller is fitted anew: on the rows it was taught on the network flatters itself.

    Cost per step: every path of the ladder forwards and backwards, from where it parts from the full one. Raises PlanError for a temperature that is not
    above 0; the objective TrainError where there are neither labels nor a teacher. Not for paths
    that have not been taught yet (`sandwich`).
    """
    if not temperature > 0:
        raise PlanError(f"temperature {temperature}", wanted="a number above 0", do="Anneal towards 0 and deploy the largest.")

    def objective(both: Joint, inputs: Tensor, labels: Tensor | None, rng: random.Random) -> Tensor:
        if teacher is None and labels is None:
            raise TrainError("neither labels nor a teacher", wanted="one of them", do="Give labels, or a frozen copy of the network.")
        network, paths = both.network, both.ladder.paths
        trunk = run(network, inputs, paths[-1])
        seen = [*(branch(network, inputs, trunk, path) for path in paths[:-1]), trunk]
        if teacher is None:
            by = trunk
        else:
            with torch.no_grad():
                by = run(teacher.to(inputs.device), inputs, teacher.space.full)
        soft = by.logits.detach().float().softmax(-1)
        target = soft.argmax(-1) if labels is None else labels
        losses = torch.stack([fit_of(one, soft, labels, own=one is by, smoothing=label_smoothing) for one in seen], 1)
        earned = torch.stack([one.logits.detach().float().softmax(-1).gather(1, target[:, None])[:, 0] for one in seen], 1)
        cost: Tensor = both.decider.cost  # pyright: ignore[reportAssignmentType]
        budget = cost[0] + rng.random() * (cost[-1] - cost[0])
        pi = both.policy(inputs, budget, temperature=temperature)
        price = both.decider.price(budget)  # pyright: ignore[reportCallIssue]
        use = SHARED / len(paths) + (1 - SHARED) * pi.detach()
        entropy = -(pi * pi.clamp_min(1e-12).log()).sum(1)
        aligned = torch.stack([features(one, by) for one in seen if one is not by]).mean()
        network_loss = (use * losses).sum(1).mean() + losses[:, -1].mean() + feature_weight * aligned
        return network_loss - (pi * (earned - price * cost)).sum(1).mean() - temperature * entropy.mean()

    return objective


def fit_of(one: Seen, soft: Tensor, labels: Tensor | None, *, own: bool, smoothing: float) -> Tensor:
    """Loss of each sample, (b,): divergence from the teaching answer (none from one's own), and cross-entropy where there are labels."""
    log_p = one.logits.float().log_softmax(-1)
    loss = log_p.new_zeros(len(log_p)) if own else F.kl_div(log_p, soft, reduction="none").sum(-1)
    return loss if labels is None else loss + F.cross_entropy(one.logits.float(), labels, label_smoothing=smoothing, reduction="none")
