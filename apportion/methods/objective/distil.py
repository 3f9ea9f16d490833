"""Distillation: the student's answer is drawn to the teacher's whole answer, not to its winner alone.

Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531, section 2: T^2 KL(teacher / T || student / T), mean over the
samples, in nats; the factor T^2 keeps gradients of one size for every T. No gradient reaches the teacher. 0 where both are equal.
"""

from __future__ import annotations

from torch import Tensor, nn

from apportion.errors import TrainError
from apportion.vocab import Card


class Distil(nn.Module):
    card = Card("Knowledge distillation", "Hinton et al. 2015", "1503.02531", None, exact=True, needs="training")

    def __init__(self, *, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, student: Tensor, *, teacher: Tensor | None = None, target: Tensor | None = None) -> Tensor:
        if teacher is None:
            raise TrainError("no teacher", wanted="the logits of a teacher", do="Run the full path or a frozen network first.")
        wanted = (teacher.detach().float() / self.temperature).log_softmax(-1)
        given = (student.float() / self.temperature).log_softmax(-1)
        return self.temperature**2 * (wanted.exp() * (wanted - given)).sum(-1).mean()


METHOD = Distil
