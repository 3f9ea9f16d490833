"""Embeddings: the angle with the teacher's, whatever the lengths."""

from __future__ import annotations

import pytest
import torch

from apportion.errors import TrainError
from apportion.methods.objective.cosine import Cosine


def test_it_is_0_along_1_across_and_2_against():
    x = torch.tensor([[3.0, 0.0]])
    for other, wanted in (([5.0, 0.0], 0.0), ([0.0, 0.1], 1.0), ([-1.0, 0.0], 2.0)):
        assert float(Cosine()(x, teacher=torch.tensor([other]))) == pytest.approx(wanted, abs=1e-6)


def test_no_gradient_reaches_the_teacher_and_there_must_be_one():
    student, teacher = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    Cosine()(student, teacher=teacher).backward()
    assert teacher.grad is None and student.grad is not None
    with pytest.raises(TrainError, match="no teacher"):
        Cosine()(student, target=torch.zeros(4))
