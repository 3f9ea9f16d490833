"""How alike the tokens after each block are to those after the last one: what a text still gains from going on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from apportion.errors import DataError


class Matching(NamedTuple):
    """How well two sets of tokens cover each other, (b,) each; 1 where they are alike, at least -1."""

    precision: Tensor
    recall: Tensor
    f1: Tensor


def matching(candidate: Tensor, reference: Tensor, *, size: Tensor | None = None, reference_size: Tensor | None = None) -> Matching:
    """Greedy matching of tokens by cosine: each token of one side is paired with the likest of the other, and the cosines are averaged.

    BERTScore (Zhang et al. 2020, arXiv 1904.09675, section 3), without weights by word frequency and without rescaling: recall is the mean over the tokens of
    the reference, precision that over the candidate's, f1 their harmonic mean, 0 where their sum is not above 0. A token of size 0 is padding and left out;
    other sizes do not weigh. Order does not matter, so two texts of the same tokens match fully.

    Shapes: candidate (b, n, d), reference (b, m, d), size (b, n), reference_size (b, m) -> (b,). Cost: n m d multiply-adds a row. Raises DataError for shapes
    that do not fit and for a row that is all padding.
    """
    n, m = candidate.shape[1], reference.shape[1]
    size = candidate.new_ones(len(candidate), n) if size is None else size
    reference_size = reference.new_ones(len(reference), m) if reference_size is None else reference_size
    fits = candidate.shape[::2] == reference.shape[::2] and size.shape == candidate.shape[:2] and reference_size.shape == reference.shape[:2]
    if not fits:
        found = f"tokens {tuple(candidate.shape)} and {tuple(reference.shape)}, sizes {tuple(size.shape)} and {tuple(reference_size.shape)}"
        raise DataError(found, wanted="(b, n, d) and (b, m, d), (b, n) and (b, m)", do="Match the same texts in the same network.")
    ours, theirs = size > 0, reference_size > 0
    empty = (~(ours.any(1) & theirs.any(1))).nonzero().flatten()
    if len(empty):
        raise DataError(f"row {int(empty[0])} without a token", wanted="at least one that is not padding", do="Leave it out.")
    cosine = F.normalize(candidate.float(), dim=-1) @ F.normalize(reference.float(), dim=-1).mT
    cosine = cosine.masked_fill(~(ours[:, :, None] & theirs[:, None]), -2.0)  # below every cosine: never the likest
    precision, recall = _mean(cosine.amax(2), ours), _mean(cosine.amax(1), theirs)
    total = precision + recall
    return Matching(precision, recall, torch.where(total > 0, 2 * precision * recall / total.clamp_min(1e-12), 0.0))


def likeness(states: Sequence[Tensor], size: Tensor | None = None, *, maps: Sequence[Tensor] | None = None) -> Tensor:
    """The f1 of the tokens after each block with those after the last, (b, k); the last column is 1.

    Says how much a network still changes, not whether it is right: a target beside right and wrong answers, for texts, never a signal that is served, since
    it takes the whole network. `maps` (d, d) lead from each block's tokens to the last one's, as `linear_map` finds them. Raises DataError as `matching`.
    Shapes: k states (b, n, d), size (b, n) shared by all.
    """
    last = states[-1]
    mapped = states if maps is None else [*(state.float() @ each for state, each in zip(states[:-1], maps, strict=True)), last]
    return torch.stack([matching(state, last, size=size, reference_size=size).f1 for state in mapped], 1)


def linear_map(x: Tensor, y: Tensor, *, ridge: float = 1e-3) -> Tensor:
    """The matrix (d, e) whose products with tokens x (t, d) are nearest to y (t, e): least squares, `ridge` times the mean square of x on the diagonal.

    Fit it on other texts than those it is used on. Cost: t d^2 and d^3.
    """
    x, y = x.double(), y.double()
    gram = x.mT @ x
    weight = ridge * gram.diagonal().mean() + torch.finfo(torch.float64).tiny
    return torch.linalg.solve(gram + weight * torch.eye(len(gram), dtype=gram.dtype), x.mT @ y).float()


def _mean(values: Tensor, kept: Tensor) -> Tensor:
    return (values * kept).sum(1) / kept.sum(1)
