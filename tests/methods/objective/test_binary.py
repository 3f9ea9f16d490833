"""Several labels: each by itself, and a teacher's chances in place of labels."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from apportion.errors import TrainError
from apportion.methods.objective.binary import Binary

STUDENT, TEACHER = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0)).unbind(0)


def test_it_is_the_mean_over_labels_of_two_class_cross_entropies():
    target = (TEACHER > 0).float()
    p = STUDENT.sigmoid()
    assert_close(Binary()(STUDENT, target=target), -(target * p.log() + (1 - target) * (1 - p).log()).mean())


def test_a_teacher_is_matched_label_by_label():
    p, q = TEACHER.sigmoid(), STUDENT.sigmoid()
    assert_close(Binary()(STUDENT, teacher=TEACHER), (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean())
    assert float(Binary()(TEACHER, teacher=TEACHER)) == pytest.approx(0, abs=1e-7)
    student, teacher = STUDENT.clone().requires_grad_(), TEACHER.clone().requires_grad_()
    Binary()(student, teacher=teacher).backward()
    assert teacher.grad is None and student.grad is not None


def test_without_either_it_says_what_is_missing():
    with pytest.raises(TrainError, match="no labels"):
        Binary()(STUDENT)
