"""How many tokens each sample gets, from how much there is to say of it: more where it is harder to foresee, and in the mean exactly what was asked for.

Ye et al. 2025, "InfoTok: Adaptive Discrete Video Tokenizer via Information-Theoretic Compression", arXiv 2512.16975; lengths in proportion to information:
Shannon 1948; integers by largest remainders: Hamilton 1792; by the largest gain: Fox 1966, "Discrete Optimization via Marginal Analysis". A rate is a share of
the tokens, from `least` to 1. The information is any number above 0 that is known before the tokens are spent: loss of a cheap reconstruction, or of an early
exit. All functions are per row: clips of a batch, or parts of a clip. Where the gain of every count can be measured, `allotted` needs no such stand-in.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from apportion.errors import ControlError

LEAST = 1 / 16
MEMORY = 0.95  # share of the old mean that a stream keeps


def spread(information: Tensor, rate: float) -> Tensor:
    """Rates (..., t) that differ from `rate` as the information does from its mean, all scaled down alike until none is above 1: the mean is `rate` exactly.

    The published rule within a clip. Rates can come near to 0; to hold a floor too, use `proportional`.
    """
    checked(information, rate)
    apart = information / information.mean(-1, keepdim=True) - 1
    most = apart.amax(-1, keepdim=True)
    scale = torch.where(most > 1 / rate - 1, (1 / rate - 1) / most, 1)
    return rate * (1 + scale * apart)


def proportional(information: Tensor, rate: float, *, least: float = LEAST) -> Tensor:
    """Rates (..., t) in proportion to the information, cut to `least` and 1, whose mean is `rate` exactly: of all such rates the largest
    sum of information times log(rate).

    The factor solves a piecewise linear equation, whose corners are where a rate reaches an end. Cost: O(t log t). Raises ControlError below `least`.
    """
    checked(information, rate, least)
    x = information.double()
    corners, order = torch.cat((least / x, 1 / x), -1).sort(dim=-1)
    slope = torch.cat((x, -x), -1).gather(-1, order).cumsum(-1)
    sums = least * x.shape[-1] + F.pad((slope[..., :-1] * corners.diff(dim=-1)).cumsum(-1), (1, 0))
    above = (sums < rate * x.shape[-1]).sum(-1, keepdim=True).clamp(1, sums.shape[-1] - 1)
    (low, high), (start, end) = ((table.gather(-1, above - 1), table.gather(-1, above)) for table in (sums, corners))
    share = ((rate * x.shape[-1] - low) / torch.where(high > low, high - low, 1)).clamp(0, 1)
    return ((start + share * (end - start)) * x).clamp(least, 1).to(information)


def running(information: Tensor, mean: Tensor, rate: float, *, least: float = LEAST) -> Tensor:
    """Rates (n,) of samples that come one by one, against the `mean` () of the information of those before: none depends on its batch.

    The published rule between clips. The mean rate is `rate` while nothing is cut and `mean` is right; `followed` keeps it so.
    """
    checked(information, rate, least)
    return (rate * information / mean).clamp(least, 1)


def followed(mean: Tensor, information: Tensor, *, memory: float = MEMORY) -> Tensor:
    """The running mean () after these samples (n,), oldest first."""
    weight = (1 - memory) * memory ** torch.arange(len(information) - 1, -1, -1, dtype=information.dtype, device=information.device)
    return mean * memory ** len(information) + (weight * information).sum()


def counts(rates: Tensor, tokens: int) -> Tensor:
    """Rates (..., t) as whole tokens of `tokens` each, int64: their sum is that of the rates, rounded, and none is off by 1 or more (largest remainders)."""
    exact = rates.double() * tokens
    whole = (exact + 1e-9).floor()
    missing = (exact.sum(-1, keepdim=True).round() - whole.sum(-1, keepdim=True)).long()
    rank = (exact - whole).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return whole.long() + (rank < missing)


def first(count: Tensor, tokens: int) -> Tensor:
    """Which of a row's tokens stay, (...) -> (..., tokens) bool: the first `count`."""
    return torch.arange(tokens, device=count.device) < count[..., None]


def hardest(loss: Tensor, count: Tensor) -> Tensor:
    """Which tokens stay, (..., tokens) bool: the `count` (...) whose loss (..., tokens) is largest, the first of several."""
    return loss.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1) < count[..., None]


def allotted(value: Tensor, tokens: Tensor, budget: float) -> Tensor:
    """Which column of `value` (n, k) each sample gets, (n,) int64: the largest total whose mean of `tokens` (k,), ascending, is at most `budget`.

    Steps are taken along each sample's concave envelope, the steepest first (gain for each token). With gains that diminish and columns evenly apart it
    is the optimum; else it may lack less than what its first step left out would gain. Raises ControlError where not even the first column fits.
    """
    n, k = value.shape
    if tokens.shape != (k,) or bool((tokens.diff() <= 0).any()) or budget < float(tokens[0]):
        wanted = f"{k} counts in order, and a budget of at least {tokens[0].item():.4g}"
        raise ControlError(f"a budget of {budget:.4g} for counts {tokens.tolist()}", wanted=wanted, do="Correct the table, or raise the budget.")
    if not bool(value.isfinite().all()):
        raise ControlError("a table that is not finite", wanted="finite values", do="Look at the rows that are not.")
    cost, gain, row, column = steps(value.double(), tokens.double())
    order = (gain / cost).argsort(descending=True, stable=True)
    order = order[gain[order] > 0]
    fits = cost[order].cumsum(0) <= n * (budget - float(tokens[0])) + 1e-9
    taken = order[: int(fits.long().cumprod(0).sum())]
    return torch.zeros(n, dtype=torch.int64, device=value.device).scatter_reduce(0, row[taken], column[taken], "amax")


def steps(value: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Each step between neighbouring vertices of the rows' concave envelopes: tokens, gain, the row, the column reached; in a row left to right."""
    found: list[tuple[float, float, int, int]] = []
    for row, values in enumerate(value.tolist()):
        at = 0
        while at < len(values) - 1:
            slopes = [(values[to] - values[at]) / (float(tokens[to]) - float(tokens[at])) for to in range(at + 1, len(values))]
            best = max(range(len(slopes)), key=lambda index: (slopes[index], index))
            to = at + 1 + best
            found.append((float(tokens[to] - tokens[at]), values[to] - values[at], row, to))
            at = to
    cost, gain, rows, columns = zip(*found, strict=True) if found else ((), (), (), ())
    return value.new_tensor(cost), value.new_tensor(gain), torch.tensor(rows, device=value.device).long(), torch.tensor(columns, device=value.device).long()


def checked(information: Tensor, rate: float, least: float = 0.0) -> None:
    """Raises ControlError for a rate that no rates between `least` and 1 have as their mean, and for information that is not finite and above 0."""
    if not 0 < rate <= 1 or rate < least:
        raise ControlError(f"a mean rate of {rate:.4g}", wanted=f"one from {least:.4g} to 1, above 0", do="Correct the rate.")
    if not bool((information.isfinite() & (information > 0)).all()):
        raise ControlError("information that is not finite and above 0", wanted="losses above 0", do="Look at the samples that have none.")
