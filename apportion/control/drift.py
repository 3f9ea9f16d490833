"""When inputs are not what they were: a score of how unfamiliar one signal is, and an alarm on the choices of a whole stream."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apportion.control.labels import FEWEST_ROWS
from apportion.errors import ControlError

BINS = 8  # of the ranks that the alarm bets on
WINDOWS = (64, 512)  # recent choices that a bet is learned from: a short window sees a large change soon, a long one a small change at all
PRIOR = 4.0  # choices per bin that a bet is told were even: an empty window bets on nothing


@final
class Familiar(nn.Module):
    """How far a signal lies from those it was fitted on: squared Mahalanobis distance over the number of features, about 1 for a familiar one.

    Source: Mahalanobis distance as an out-of-distribution score after Lee et al. (2018, arXiv 1807.03888), here one Gaussian for all classes,
    because what is asked is whether the controller has seen such signals, not which class they are of.
    Shapes: signal (b, f) -> (b,). Cost: f^2 multiply-adds per sample and as many stored numbers. A sample's score depends on that sample alone.
    Catches what is far in some direction; where a shift makes all signals alike (fog, less contrast, pure noise) they come out nearer to the middle than
    the familiar ones, and single samples pass. The alarm on a stream of such scores, sorted into bins, sees those soon: docs/shift.md has figures.
    """

    mean: Tensor
    whiten: Tensor
    threshold: Tensor

    def __init__(self, *, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("whiten", torch.eye(features))
        self.register_buffer("threshold", torch.tensor(torch.inf))

    @property
    def macs(self) -> int:
        """Multiply-adds per sample, closed form."""
        return self.whiten.numel()

    def forward(self, signal: Tensor) -> Tensor:
        return F.linear(signal.float() - self.mean, self.whiten).square().mean(1)


def ledoit_wolf(standard: Tensor) -> tuple[Tensor, float]:
    """Covariance shrunk towards a multiple of the identity, and how much: the closed form that minimises the expected squared error.

    Source: Ledoit and Wolf, 2004, Journal of Multivariate Analysis 88. Shapes: (n, f), columns of mean zero -> (f, f). Cost: n f^2.
    """
    rows, features = standard.shape
    sample = standard.T @ standard / rows
    even = torch.eye(features, dtype=standard.dtype) * sample.trace() / features
    spread = (sample - even).square().sum()
    error = (standard.square().sum(1).square().sum() / rows - sample.square().sum()) / rows
    shrink = float((error / spread).clamp(0, 1)) if spread > 0 else 0.0
    return torch.lerp(sample, even, shrink), shrink


def fit_familiar(signal: Tensor, *, fit_rows: Tensor, calibrate_rows: Tensor, quantile: float = 0.995) -> Familiar:
    """Fit the distance on `fit_rows`, and the threshold on `calibrate_rows`, so that at most 1 - quantile of such samples pass it.

    The threshold is the conformal one (Vovk et al., 2005): the share holds in expectation for every distribution and any number of features, because the
    calibration rows had no part in the fit; on rows that had, distances in 200 dimensions come out too small. Shapes: signal (n, f).
    Raises ControlError on rows used twice, too few rows for the quantile, or a signal that is not finite. Cost: n f^2 + f^3.
    """
    shared, fewest = torch.isin(fit_rows, calibrate_rows), math.ceil(quantile / (1 - quantile)) if 0 < quantile < 1 else 0
    if not fewest:
        raise ControlError(f"a quantile of {quantile}", wanted="a share between 0 and 1", do="Give the share of familiar samples, such as 0.995.")
    if bool(shared.any()):
        raise ControlError(f"row {int(fit_rows[shared][0])} in both parts", wanted="disjoint rows", do="Split the samples once.")
    if len(fit_rows) < FEWEST_ROWS or len(calibrate_rows) < fewest:
        found = f"{len(fit_rows)} rows to fit and {len(calibrate_rows)} to calibrate on"
        raise ControlError(found, wanted=f"at least {FEWEST_ROWS} and {fewest}", do="Measure more samples, or ask for a lower quantile.")
    broken = (~signal.isfinite()).any(1).nonzero()
    if len(broken):
        raise ControlError(f"a signal that is not finite in row {int(broken[0])}", wanted="finite numbers", do="Look at this sample.")
    rows = signal[fit_rows].double()
    mean, std = rows.mean(0), rows.std(0)
    # A feature that never varied must not turn rounding into distance.
    std = std.maximum(1e-5 * (1 + mean.abs()))
    covariance, _ = ledoit_wolf((rows - mean) / std)
    familiar = Familiar(features=signal.shape[1])
    familiar.mean.copy_(mean)
    familiar.whiten.copy_(torch.linalg.inv(torch.linalg.cholesky(covariance)) / std)
    rank = math.ceil((len(calibrate_rows) + 1) * quantile)
    familiar.threshold.copy_(familiar(signal[calibrate_rows]).sort().values[rank - 1])
    return familiar.eval()


def guarded(choice: Tensor, score: Tensor, threshold: Tensor, *, cost: Tensor, cap: Tensor) -> Tensor:
    """The same rungs, but the dearest one within the cap (the full path where there is none) for every sample whose score is over the threshold.

    A score that is not a number counts as over. Where it is used, mean cost rises by the share of such samples; whoever can make inputs look strange can
    make them dear, so serve it with a cap. Shapes: choice (b,), score (b,), threshold (), cost (k,) ascending, cap () -> (b,).
    """
    dearest = (cost <= cap).sum() - 1
    return torch.where(score <= threshold, choice, choice.maximum(dearest))


@final
@dataclass(frozen=True, slots=True, eq=False)
class Alarm:
    """A drift alarm on the rungs taken, that may be looked at after every choice: state in, state out.

    Each choice becomes its rank among all choices before it, the calibration's included, ties broken by a seeded draw. While choices stay exchangeable,
    these ranks are independent and uniform, whatever the histogram and however few rows it was calibrated on. Bets against that are learned from windows
    of recent ranks, and a Shiryaev-Roberts sum of the bets started at every choice is the evidence of a change at any time. The alarm rings when it reaches
    `run_length`: without drift that takes at least `run_length` choices on average, and happens within n choices with probability at most n / run_length.
    Source: conformal test martingales, Vovk et al. (2021, arXiv 2102.10439); e-detectors, Shin, Ramdas, Rinaldo (2022, arXiv 2203.03532).

    Feed it choices at one budget and one cap, in random order: another budget is a change, and neighbouring frames of a film are not exchangeable.
    Since later choices join the calibration's, a change that comes slower than it can be noticed becomes the new normal.
    """

    seen: Tensor  # (k,) float64: choices of each rung so far, the calibration's included
    recent: Tensor  # (w,) int64: bins of the latest ranks, oldest first
    evidence: Tensor  # (windows,) float64: logarithm
    run_length: float
    seed: int
    count: int = 0  # choices since the start
    raised_at: int | None = None  # the count at which it rang first; it stays so until a new one is started

    @classmethod
    def start(cls, calibrated: Tensor, *, rungs: int, run_length: float = 100_000, seed: int = 0) -> Alarm:
        """From the rungs that the calibration samples took, (n,). Raises ControlError on too few of them or a run length below 2."""
        if len(calibrated) < FEWEST_ROWS or not run_length >= 2:
            found = f"{len(calibrated)} calibration choices and a run length of {run_length}"
            raise ControlError(found, wanted=f"at least {FEWEST_ROWS} and 2", do="Decide for more samples, or accept fewer false alarms.")
        return cls(_counts(calibrated, rungs).sum(0), torch.empty(0, dtype=torch.int64), torch.full((len(WINDOWS),), -torch.inf).double(), run_length, seed)

    @property
    def level(self) -> float:
        """Evidence of a change as a share of what rings the alarm."""
        return float(self.evidence.exp().mean() / self.run_length)

    def after(self, choice: Tensor) -> Alarm:
        """The state after these choices (b,), in order of arrival; how a stream is cut into calls makes no difference. Cost: O(b)."""
        taken = _counts(choice, len(self.seen))
        if not len(choice):
            return self
        seen = self.seen + taken.cumsum(0)
        ties = seen.gather(1, choice[:, None])[:, 0]
        below = seen.cumsum(1).gather(1, choice[:, None])[:, 0] - ties
        # The draw belongs to the place in the stream, hence the jump ahead.
        draw = torch.from_numpy(np.random.Generator(np.random.PCG64(self.seed).advance(self.count)).random(len(choice)))
        bins = ((below + draw * ties) / seen.sum(1) * BINS).long().clamp_max(BINS - 1)
        history = torch.cat([self.recent, bins])
        evidence = torch.stack([_evidence(history, len(bins), window, before) for window, before in zip(WINDOWS, self.evidence, strict=True)])
        over = (evidence.logsumexp(0) - math.log(len(WINDOWS)) >= math.log(self.run_length)).nonzero()
        raised = self.count + int(over[0]) + 1 if self.raised_at is None and len(over) else self.raised_at
        recent = history[-max(WINDOWS) :]
        return replace(self, seen=seen[-1], recent=recent, evidence=evidence[:, -1], count=self.count + len(choice), raised_at=raised)


def _counts(choice: Tensor, rungs: int) -> Tensor:
    """One row for each choice, a one in its column. Raises ControlError on a rung that is not there."""
    if choice.ndim != 1 or bool(((choice < 0) | (choice >= rungs)).any()):
        raise ControlError(f"choices of shape {tuple(choice.shape)} beyond the ladder", wanted=f"rungs 0 to {rungs - 1}, (n,)", do="Give one rung per sample.")
    return F.one_hot(choice, rungs).double()


def _evidence(history: Tensor, new: int, window: int, before: Tensor) -> Tensor:
    """Logarithm of the sum after each of the `new` latest ranks: R <- (R + 1) * bet, where the bet knows the `window` ranks before only."""
    total = F.pad(F.one_hot(history, BINS).double().cumsum(0), (0, 0, 1, 0))
    place = torch.arange(len(history) - new, len(history))
    known = total[place] - total[(place - window).clamp_min(0)]
    bet = BINS * (known.gather(1, history[place, None])[:, 0] + PRIOR) / (known.sum(1) + BINS * PRIOR)
    wealth = bet.log().cumsum(0)
    return wealth + torch.logaddexp(before, F.pad(-wealth[:-1], (1, 0)).logcumsumexp(0))
