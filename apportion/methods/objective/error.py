"""Numbers: the mean square of the error as a share of their spread, against labels or a teacher's numbers.

Legendre 1805; a quarter of `span`, how far the numbers range, stands for their standard deviation, so that the loss has the size of others. (b, outputs).
"""

from __future__ import annotations

from torch import Tensor, nn

from apportion.errors import TrainError
from apportion.vocab import Card


class SquaredError(nn.Module):
    card = Card("Squared error", "", "", None, exact=True, needs="training")

    def __init__(self, *, span: float = 4.0) -> None:
        super().__init__()
        self.span = span

    def forward(self, student: Tensor, *, teacher: Tensor | None = None, target: Tensor | None = None) -> Tensor:
        wanted = target if teacher is None else teacher.detach()
        if wanted is None:
            raise TrainError("no numbers", wanted="a number for each output", do="Give labels, or distil from a frozen teacher.")
        return (4 * (student.float() - wanted.float()) / self.span).square().mean()


METHOD = SquaredError
