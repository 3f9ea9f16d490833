"""Cross-entropy with the labels, of which a share is spread evenly over all classes.

Label smoothing: Szegedy et al. 2016, "Rethinking the Inception Architecture", arXiv 1512.00567, section 7.
Targets are class numbers (b,) or shares (b, classes). Not for data without labels.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from apportion.errors import TrainError
from apportion.vocab import Card


class CrossEntropy(nn.Module):
    card = Card("Cross-entropy with label smoothing", "Szegedy et al. 2016", "1512.00567", None, exact=True, needs="training")

    def __init__(self, *, smoothing: float = 0.0) -> None:
        super().__init__()
        self.smoothing = smoothing

    def forward(self, student: Tensor, *, teacher: Tensor | None = None, target: Tensor | None = None) -> Tensor:
        if target is None:
            raise TrainError("no labels", wanted="a class for each sample", do="Give labels, or distil from a frozen teacher.")
        return F.cross_entropy(student.float(), target, label_smoothing=self.smoothing)


METHOD = CrossEntropy
