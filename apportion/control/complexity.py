"""How much compute an input needs: the probability, for each rung, that its answer is right, read off the glance."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apportion.control.labels import check_table, folds
from apportion.control.ordinal import Predictor, cheapest, running_maximum
from apportion.errors import ControlError
from apportion.vocab import Outcomes

HIDDEN = 64
REACH = 6.0  # standard deviations beyond which a feature says nothing more: one outlier must not decide


class Complexity(nn.Module):
    """The chance that each rung answers correctly, from the signal of the glance.

    Design: one trunk and one logit for each rung, trained on the whole row of right and wrong answers, instead of an ordinal regression
    on the single label k*. Rungs that merge tokens are not nested in dearer ones, so "rung k is right" is a fact of its own, and it is
    what a price on compute must be weighed against. The ordinal reading is kept beside it, monotone by construction: `sufficient` is the
    running maximum of these chances, and `rung` is the cheapest that reaches a share of what the dearest promises.
    Source: the complexity predictor of Transformer^-1 (2025, arXiv 2501.16394), whose form is not public; temperature scaling after
    Guo et al. (2017, arXiv 1706.04599), here with one shift for each rung, because asymmetric training moves the rungs unequally.

    Shapes: signal (b, f) -> (b, k). Cost: f h + h k multiply-adds per sample. A sample's answer depends on that sample alone.
    """

    mean: Tensor
    std: Tensor
    temperature: Tensor
    shift: Tensor

    def __init__(self, *, features: int, rungs: int, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.inner = nn.Linear(features, hidden)
        self.outer = nn.Linear(hidden, rungs)
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.ones(features))
        self.register_buffer("temperature", torch.ones(()))
        self.register_buffer("shift", torch.zeros(rungs))

    @property
    def macs(self) -> int:
        """Multiply-adds per sample, closed form."""
        return self.inner.weight.numel() + self.outer.weight.numel()

    def standardise(self, signal: Tensor) -> Tensor:
        """Zero mean and unit variance on the rows it was fitted on, without outliers."""
        return ((signal.float() - self.mean) / self.std).clamp(-REACH, REACH)

    def logits(self, standard: Tensor) -> Tensor:
        """Before calibration, from a standardised signal."""
        return self.outer(self.hidden(standard))

    def hidden(self, standard: Tensor) -> Tensor:
        """What all rungs are read off, (b, h)."""
        return F.gelu(self.inner(standard))

    def forward(self, signal: Tensor) -> Tensor:
        """Calibrated chance that each rung is right, (b, k)."""
        return torch.sigmoid(self.logits(self.standardise(signal)) / self.temperature + self.shift)

    def sufficient(self, signal: Tensor) -> Tensor:
        """Chance that some rung up to each one is right: the running maximum, non-decreasing along the ladder, (b, k)."""
        return running_maximum(self(signal))

    def rung(self, signal: Tensor, *, share: float = 0.95) -> Tensor:
        """The cheapest rung that reaches this share of the best chance: the complexity class that is reported, (b,)."""
        return cheapest(self.sufficient(signal), share=share)


def fit_complexity(
    outcomes: Outcomes, *, seed: int, epochs: int = 60, under_weight: float = 1.0, targets: Tensor | None = None, target_weight: float = 0.3
) -> Complexity:
    """Fit on these rows, stopping early on a fifth of them; the result is not calibrated yet.

    Loss: binary cross-entropy over all rungs, a rung that fails where the full path is right weighing `under_weight` times. Above 1 it
    makes spending too little cost more here; the policy's reward already says so, and on planted tables 3 lost 0.1 to 0.8 points of
    accuracy at equal cost, hence 1. `calibrate` takes the bias that a weight leaves out of the probabilities.
    `targets` (n, m): more that the trunk shall know of each sample, such as how alike a text's tokens after each block are to the last ones. A second head
    learns them, each brought to variance 1, by their squared error, `target_weight` times; it is dropped afterwards, so that what is served stays as it was.
    Raises ControlError on a table nothing can be learned from and on targets that do not fit it.
    Cost: about a second for 5000 rows and 200 features on one core.
    """
    check_table(outcomes)
    held, *rest = folds(len(outcomes.signal), 5, seed=seed)
    train = torch.cat(rest)
    target = outcomes.quality
    weight = 1.0 + (under_weight - 1.0) * (target[:, -1:] - target).clamp_min(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Complexity(features=outcomes.signal.shape[1], rungs=target.shape[1])
        model.mean.copy_(outcomes.signal[train].float().mean(0))
        model.std.copy_(outcomes.signal[train].float().std(0).clamp_min(1e-6))
        standard = model.standardise(outcomes.signal)
        aside = None if targets is None else _Aside(targets, outcomes, hidden=model.inner.out_features, train=train)
        optimiser = torch.optim.AdamW([*model.parameters(), *(() if aside is None else aside.parameters())], lr=2e-3, weight_decay=0.1)
        best, kept, waited = torch.inf, deepcopy(model.state_dict()), 0
        for _ in range(epochs):
            for rows in train[torch.randperm(len(train))].split(128):
                hidden = model.hidden(F.dropout(standard[rows], 0.2))
                loss = F.binary_cross_entropy_with_logits(model.outer(hidden), target[rows], weight[rows])
                if aside is not None:
                    loss = loss + target_weight * aside(hidden, rows)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            with torch.no_grad():
                now = F.binary_cross_entropy_with_logits(model.logits(standard[held]), target[held], weight[held]).item()
            waited += 1
            if now < best:
                best, kept, waited = now, deepcopy(model.state_dict()), 0
            if waited == 8:
                break
        model.load_state_dict(kept)
    return model.requires_grad_(False)


class _Aside(nn.Module):
    """The second head, in training alone: the mean squared error of what the trunk (b, h) tells it of these rows' targets. It begins at nothing."""

    def __init__(self, targets: Tensor, outcomes: Outcomes, *, hidden: int, train: Tensor) -> None:
        super().__init__()
        if targets.ndim != 2 or len(targets) != len(outcomes.signal) or not bool(targets.isfinite().all()):
            raise ControlError(
                f"targets of shape {tuple(targets.shape)} for {len(outcomes.signal)} samples" + ("" if targets.isfinite().all() else ", not all finite"),
                wanted="finite numbers, one row for each sample",
                do="Measure them on the same samples as the outcomes.",
            )
        self.weight, self.bias = nn.Parameter(torch.zeros(targets.shape[1], hidden)), nn.Parameter(torch.zeros(targets.shape[1]))
        known = targets[train].float()
        self.target = (targets.float() - known.mean(0)) / known.std(0).clamp_min(1e-6)

    def forward(self, hidden: Tensor, rows: Tensor) -> Tensor:
        return F.mse_loss(F.linear(hidden, self.weight, self.bias), self.target[rows])


def calibrate(complexity: Predictor, outcomes: Outcomes) -> None:
    """Set one temperature and a shift for each rung, so that the probabilities are true on these rows, which it was not fitted on."""
    logits, target = complexity.logits(complexity.standardise(outcomes.signal)).detach(), outcomes.quality
    sharpness = torch.zeros((), requires_grad=True)
    shift = torch.zeros_like(complexity.shift, requires_grad=True)
    optimiser = torch.optim.LBFGS([sharpness, shift], max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        # The last term keeps the shift of a rung that is always right finite.
        loss = F.binary_cross_entropy_with_logits(logits * sharpness.exp() + shift, target) + (shift.square().mean() + sharpness.square()) / len(target)
        loss.backward()
        return loss

    optimiser.step(closure)  # pyright: ignore[reportArgumentType]
    complexity.temperature.copy_((-sharpness).exp().detach())
    complexity.shift.copy_(shift.detach())


def expected_calibration_error(p: Tensor, ok: Tensor, *, bins: int = 15) -> float:
    """Mean gap between stated and observed probability over equal bins, all rungs pooled (Naeini et al., 2015). Shapes: (n, k) both."""
    index = (p.flatten() * bins).long().clamp(0, bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, (p.flatten() - ok.flatten().float()).double())
    return (gap.abs().sum() / p.numel()).item()
