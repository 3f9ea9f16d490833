"""What the numbers that a network answers with mean, task by task: what they say, how sure they are, and what of that can be seen at a glance.

Answers have any leading axes. One class, or labels that may be several: (..., classes) logits. Numbers: (..., outputs). An embedding: (..., d). A class for
each token of a text or each patch of an image: (..., n, classes); a place without a token answers 0 for every class.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from apportion.methods.ops import margin
from apportion.vocab import Task

UNKNOWN = -100  # the label of what is not to be judged, as PyTorch has it
TOP = 5
SURE: tuple[Task, ...] = ("classification", "multilabel", "token_classification", "segmentation")
"""Tasks whose answers say how sure they are: what a checkpoint asks for."""


def said(answers: Tensor, task: Task) -> Tensor:
    """What answers say, in the form of labels: int64 without the last axis for classes, 0 and 1 for several labels, else the numbers themselves."""
    if task in ("regression", "embedding"):
        return answers.float()
    if task == "multilabel":
        return (answers > 0).float()
    return answers.argmax(-1) if task == "classification" else torch.where(there(answers), answers.argmax(-1), UNKNOWN)


def there(answers: Tensor) -> Tensor:
    """Which places hold a token, (..., n, classes) -> (..., n) bool."""
    return (answers != 0).any(-1)


def sureness(answers: Tensor, task: Task) -> Tensor:
    """How sure an answer is, 0 to 1, (...): the margin of the first class over the second; its mean over places; the geometric mean of the labels' chances.

    0 for numbers and embeddings, which do not say.
    """
    if task == "classification":
        return margin(answers)
    if task == "multilabel":
        return F.logsigmoid(answers.float().abs()).mean(-1).exp()
    if task in ("regression", "embedding"):
        return answers.new_zeros(answers.shape[:-1], dtype=torch.float32)
    return _mean(margin(answers), there(answers))


def sight(answers: Tensor, task: Task) -> Tensor:
    """What a controller sees of one answer for each sample, (b, f): the largest chances, the margin, the entropy; over places their mean, least and spread."""
    answers = answers.float()
    if task in ("regression", "embedding"):
        return answers[:, :TOP]
    if task == "multilabel":
        top = answers.sigmoid().topk(min(TOP, answers.shape[-1]), -1).values
        return torch.cat([top, sureness(answers, task)[:, None], _binary_entropy(answers).mean(-1, keepdim=True)], -1)
    entropy = -(answers.log_softmax(-1) * answers.softmax(-1)).sum(-1)
    if task == "classification":
        top = answers.softmax(-1).topk(min(TOP, answers.shape[-1]), -1).values
        return torch.cat([top, top[:, :1] - top[:, 1:2], entropy[:, None]], -1)
    sure, known = margin(answers), there(answers)
    mean = _mean(sure, known)
    spread = _mean((sure - mean[:, None]).square(), known).sqrt()
    return torch.stack([mean, torch.where(known, sure, 1.0).amin(-1), spread, _mean(entropy, known)], -1)


def over_pixels(answers: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Answers of the patches of a square grid (b, n, classes), spread over pixels: (b, classes, rows, columns)."""
    side = round(answers.shape[1] ** 0.5)
    return F.interpolate(answers.transpose(1, 2).unflatten(2, (side, side)), size=tuple(size), mode="bilinear", align_corners=False)


def _mean(values: Tensor, known: Tensor) -> Tensor:
    return (values * known).sum(-1) / known.sum(-1).clamp_min(1)


def _binary_entropy(logits: Tensor) -> Tensor:
    chance = logits.sigmoid()
    return -(chance * F.logsigmoid(logits) + (1 - chance) * F.logsigmoid(-logits))
