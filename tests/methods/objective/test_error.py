"""Numbers: the square of the error in quarters of the span."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from apportion.errors import TrainError
from apportion.methods.objective.error import SquaredError


def test_an_error_of_a_quarter_of_the_span_counts_one():
    target = torch.tensor([[1.0], [3.0]])
    assert_close(SquaredError(span=8.0)(target + torch.tensor([[2.0], [-2.0]]), target=target), torch.tensor(1.0))
    assert_close(SquaredError(span=8.0)(target + 4.0, target=target), torch.tensor(4.0))


def test_a_teacher_stands_in_for_labels_and_learns_nothing():
    student, teacher = torch.randn(4, 2, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    loss = SquaredError()(student, teacher=teacher, target=torch.zeros(4, 2))
    assert_close(loss, (student - teacher).square().mean())
    loss.backward()
    assert teacher.grad is None
    with pytest.raises(TrainError, match="no numbers"):
        SquaredError()(student)
