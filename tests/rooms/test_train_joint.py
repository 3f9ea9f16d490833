"""Network and policy taught together: the loss term by term, who learns from what, and that both get better."""

from __future__ import annotations

import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apportion.errors import PlanError, TrainError
from apportion.train import Images, Joint, Recipe, fit, joint
from apportion.train.joint import SHARED
from apportion.train.sandwich import features, run
from apportion.vocab import Ladder
from tests.rooms.test_train_sandwich import batch, network


class Linear(nn.Module):
    """The smallest controller there is."""

    cost: Tensor

    def __init__(self, features: int, cost: list[float]) -> None:
        super().__init__()
        self.worth_of = nn.Linear(features + 1, len(cost))
        self.register_buffer("cost", torch.tensor(cost))

    def worth(self, signal: Tensor, budget: Tensor) -> Tensor:
        return self.worth_of(torch.cat([signal, budget.expand(len(signal), 1)], 1))

    def price(self, budget: Tensor) -> Tensor:
        return 0.5 * (1 - budget)


def made(seed: int = 0) -> Joint:
    of = network(seed)
    ladder = Ladder((of.space.path(blocks=(0, 2), width=8, heads=1), of.space.path(width=16), of.space.full), 0)
    wide = of.glance(0)(batch(2)[0])[1].shape[1]
    return Joint(of, ladder, Linear(wide, [0.3, 0.7, 1.0]))


def test_loss_is_the_sum_over_samples_and_paths() -> None:
    both, teacher = made(), network(3).eval()
    inputs, labels = batch(5)
    rng = random.Random(7)
    budget = 0.3 + random.Random(7).random() * 0.7
    found = joint(teacher=teacher, temperature=0.2, feature_weight=0.4, label_smoothing=0.1)(both, inputs, labels, rng)

    pi = both.policy(inputs, torch.tensor(budget), temperature=0.2)
    by = run(teacher, inputs, teacher.space.full)
    seen = [run(both.network, inputs, path) for path in both.ladder.paths]
    total = 0.4 * sum(features(one, by) for one in seen) / 3
    for b in range(5):
        for a, cost in enumerate((0.3, 0.7, 1.0)):
            log_p, soft = seen[a].logits[b].log_softmax(0), by.logits[b].softmax(0)
            loss = (soft * (soft.log() - log_p)).sum() + F.cross_entropy(seen[a].logits[b], labels[b], label_smoothing=0.1)
            use = SHARED / 3 + (1 - SHARED) * pi[b, a].detach()
            reward = log_p.exp()[labels[b]].detach() - 0.5 * (1 - budget) * cost
            total += ((use + (a == 2)) * loss - pi[b, a] * reward + 0.2 * pi[b, a] * pi[b, a].log()) / 5
    assert found.item() == pytest.approx(total.item(), rel=1e-4)  # pyright: ignore[reportAttributeAccessIssue]
    for name, weight in both.named_parameters():  # who learns from what: the network not from its own use, the policy not by making answers surer
        ours, theirs = (torch.autograd.grad(loss, weight, retain_graph=True, allow_unused=True, materialize_grads=True)[0] for loss in (found, total))  # pyright: ignore
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5, msg=name)


def test_both_learn() -> None:
    both = made()
    inputs, labels = batch(6)
    loss = joint(temperature=0.2)(both, inputs, labels, random.Random(0))
    grads = dict(zip(dict(both.named_parameters()), torch.autograd.grad(loss, list(both.parameters()), allow_unused=True, materialize_grads=True), strict=True))
    assert all(float(grads[name].abs().max()) > 0 for name in ("decider.worth_of.weight", "network.tokeniser.project.weight", "network.head.project.weight"))


@pytest.mark.slow
def test_training_raises_what_the_policy_earns_and_annealing_settles_it() -> None:
    both = made()
    images, labels = batch(256)
    data = Images(((images * 0.1 + 0.5).clamp(0, 1) * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous(), labels, mean=(0.5,) * 3, std=(0.1,) * 3)

    def judged() -> tuple[float, float]:
        both.eval()
        earned, entropy = 0.0, 0.0
        with torch.no_grad():
            for budget in (0.4, 0.6, 0.8):
                pi = both.policy(images, torch.tensor(budget), temperature=0.05)
                right = torch.stack([both.network(images, path).softmax(-1).gather(1, labels[:, None])[:, 0] for path in both.ladder.paths], 1)
                price = both.decider.price(torch.tensor(budget))  # pyright: ignore[reportCallIssue]
                earned += (pi * (right - price * both.decider.cost)).sum(1).mean().item()  # pyright: ignore[reportOperatorIssue]
                entropy -= (pi * pi.clamp_min(1e-9).log()).sum(1).mean().item()
        return earned, entropy / 3

    start = judged()
    for temperature in (0.3, 0.1, 0.03):
        recipe = Recipe(epochs=3, batch=32, learning_rate=3e-3, crop_padding=0, seed=0)
        fit(both, data, joint(temperature=temperature), recipe=recipe, progress=False)
    end = judged()
    assert end[0] > start[0] + 0.5
    assert end[1] < 0.5 * math.log(3)


def test_refusals() -> None:
    both = made()
    with pytest.raises(PlanError, match="temperature"):
        joint(temperature=0.0)
    with pytest.raises(TrainError, match="neither labels nor a teacher"):
        joint()(both, batch(4)[0], None, random.Random(0))
    with pytest.raises(PlanError, match="at least two"):
        Joint(both.network, Ladder((both.network.space.full,), 0), both.decider)
