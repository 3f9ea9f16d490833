"""How good answers are, task by task, each sample by itself between 0 and 1: so that a controller can be taught and a bound be held for every task alike."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from apportion.errors import DataError
from apportion.methods.task import UNKNOWN, over_pixels, said, sureness
from apportion.vocab import Task

METRICS: dict[Task, str] = {
    "classification": "accuracy",
    "multilabel": "F1 over the labels of a sample",
    "regression": "1 - error / span",
    "embedding": "cosine with the full path",
    "token_classification": "share of tokens right",
    "segmentation": "share of pixels right",
}
"""What a mean quality is called, in percent; a point is a hundredth of it."""
CLOSE = 0.01  # numbers and directions that count as the same answer


class Judged(NamedTuple):
    """Columns of a table of outcomes, (b, k) each."""

    quality: Tensor
    agree: Tensor
    loss: Tensor
    margin: Tensor


def judge(answers: Tensor, truth: Tensor | None, *, task: Task, span: float = 0.0) -> Judged:
    """Answers (b, k, ...) of k paths, the last being the full one, against labels; without labels against what the full path says.

    Labels: a class (b,); 0 or 1 for each label (b, classes); numbers (b, outputs), an error of `span` being worth nothing; the class of each token (b, n) or
    pixel (b, rows, columns), -100 for what does not count. An embedding has none. Classes of patches are spread over the pixels between them (bilinear).
    Raises DataError for numbers without a span. Cost: one pass over the answers.
    """
    if task == "regression" and not span > 0:
        raise DataError(f"a span of {span}", wanted="how far the numbers range, above 0", do="Give labels that differ.")
    truth = said(answers[:, -1], task) if truth is None else truth
    quality, loss = {
        "classification": _class,
        "multilabel": _labels,
        "regression": lambda a, t: _numbers(a, t, span),
        "embedding": _directions,
        "token_classification": _places,
        "segmentation": _pixels,
    }[task](answers.float(), truth)
    return Judged(quality, _agree(answers, task, span), loss, sureness(answers, task))


def _agree(answers: Tensor, task: Task, span: float) -> Tensor:
    """Where a path says what the full path says."""
    if task == "regression":
        return (answers - answers[:, -1:]).abs().amax(-1) <= CLOSE * span
    if task == "embedding":
        return F.cosine_similarity(answers, answers[:, -1:], dim=-1) >= 1 - CLOSE
    words = said(answers, task)
    same = words == words[:, -1:]
    return same if task == "classification" else same.flatten(2).all(-1)


def _class(answers: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    right = answers.argmax(-1) == truth[:, None]
    return right.float(), F.cross_entropy(answers.transpose(1, 2), truth[:, None].expand_as(right), reduction="none")


def _labels(answers: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """F1 of the labels of each sample (van Rijsbergen, 1979), 1 where there is none and none is named."""
    named, wanted = answers > 0, truth[:, None] > 0.5
    both, all_of_them = (named & wanted).sum(-1), named.sum(-1) + wanted.sum(-1)
    wide = truth[:, None].float().expand_as(answers)
    return torch.where(all_of_them > 0, 2 * both / all_of_them.clamp_min(1), 1.0), F.binary_cross_entropy_with_logits(answers, wide, reduction="none").mean(-1)


def _numbers(answers: Tensor, truth: Tensor, span: float) -> tuple[Tensor, Tensor]:
    error = (answers - truth[:, None]).abs().mean(-1) / span
    return 1 - error.clamp(max=1), error.square()


def _directions(answers: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    cosine = F.cosine_similarity(answers, truth[:, None], dim=-1)
    return cosine.clamp(0, 1), 1 - cosine


def _places(answers: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Answers (b, k, n, classes), labels (b, n); a sample without any counts as right."""
    known, wide = truth[:, None] != UNKNOWN, truth[:, None].expand(answers.shape[:-1])
    count = known.sum(-1)
    right = ((answers.argmax(-1) == wide) & known).sum(-1)
    each = F.cross_entropy(answers.movedim(-1, 1), wide, reduction="none", ignore_index=UNKNOWN).sum(-1)
    return torch.where(count > 0, right / count.clamp_min(1), 1.0), each / count.clamp_min(1)


def _pixels(answers: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    if truth.ndim == 2:  # of patches: what another network says
        return _places(answers, truth)
    found = [_places(over_pixels(path, truth.shape[-2:]).flatten(2).transpose(1, 2)[:, None], truth.flatten(1)) for path in answers.unbind(1)]
    return torch.cat([quality for quality, _ in found], 1), torch.cat([loss for _, loss in found], 1)
