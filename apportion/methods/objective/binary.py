"""Several labels at once: for each a cross-entropy of its own, with the label or with what a teacher says of it; mean over labels and samples, in nats.

Distillation of each label by itself: Yang et al. 2023, "Multi-label knowledge distillation", arXiv 2308.06453, section 3 (there called one-vs-rest).
Targets and teachers (b, classes); less its own entropy a teacher's part is 0 where both are equal. No gradient reaches the teacher.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from apportion.errors import TrainError
from apportion.vocab import Card


class Binary(nn.Module):
    card = Card("Cross-entropy of each label", "Yang et al. 2023", "2308.06453", None, exact=True, needs="training")

    def forward(self, student: Tensor, *, teacher: Tensor | None = None, target: Tensor | None = None) -> Tensor:
        if teacher is not None:
            chance = teacher.detach().float().sigmoid()
            own = F.binary_cross_entropy_with_logits(teacher.detach().float(), chance)
            return F.binary_cross_entropy_with_logits(student.float(), chance) - own
        if target is None:
            raise TrainError("no labels", wanted="0 or 1 for each label", do="Give labels, or distil from a frozen teacher.")
        return F.binary_cross_entropy_with_logits(student.float(), target.float())


METHOD = Binary
