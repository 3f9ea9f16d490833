"""A class for each token or patch: cross-entropy with its label, or distillation from a teacher's whole answer, mean over the places that count.

Long et al. 2015, "Fully Convolutional Networks for Semantic Segmentation", arXiv 1411.4038, section 3.4; distilled place by place as in Liu et al. 2019,
"Structured Knowledge Distillation", arXiv 1903.04197, section 3.1. Answers (b, n, classes), 0 for every class where there is no token. Labels (b, n), or of
pixels (b, rows, columns), over which answers are spread (bilinear); -100 does not count. No gradient reaches the teacher.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from apportion.errors import TrainError
from apportion.methods.task import UNKNOWN, over_pixels, there
from apportion.vocab import Card


class EveryPlace(nn.Module):
    card = Card("Cross-entropy at each place", "Long et al. 2015", "1411.4038", None, exact=True, needs="training")

    def __init__(self, *, smoothing: float = 0.0, temperature: float = 1.0) -> None:
        super().__init__()
        self.smoothing, self.temperature = smoothing, temperature

    def forward(self, student: Tensor, *, teacher: Tensor | None = None, target: Tensor | None = None) -> Tensor:
        student = student.float()
        if teacher is not None:
            wanted, given = ((of.float() / self.temperature).log_softmax(-1) for of in (teacher.detach(), student))
            known = there(teacher)
            each = (wanted.exp() * (wanted - given)).sum(-1) * known
            return self.temperature**2 * each.sum() / known.sum().clamp_min(1)
        if target is None:
            raise TrainError("no labels", wanted="a class for each token or pixel", do="Give labels, or distil from a frozen teacher.")
        logits = student.transpose(1, 2) if target.ndim == 2 else over_pixels(student, target.shape[-2:])
        return F.cross_entropy(logits, target, label_smoothing=self.smoothing, ignore_index=UNKNOWN)


METHOD = EveryPlace
