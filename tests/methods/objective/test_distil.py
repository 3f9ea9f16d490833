"""Distillation: Kullback and Leibler's divergence, the factor that keeps gradients of one size, and types."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from apportion.methods.objective.distil import Distil

STUDENT, TEACHER = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0)).unbind(0)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_it_is_the_divergence_of_the_softened_answers(temperature):
    total = 0.0
    for student, teacher in zip(STUDENT, TEACHER, strict=True):
        p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
        total += temperature**2 * sum(float(a * (a / b).log()) for a, b in zip(p, q, strict=True)) / 6
    assert_close(Distil(temperature=temperature)(STUDENT, teacher=TEACHER), torch.tensor(total))


def test_at_high_temperature_the_gradient_is_that_of_matching_centred_logits():
    student = STUDENT.clone().requires_grad_()
    Distil(temperature=1e3)(student, teacher=TEACHER).backward()
    centred = [x - x.mean(-1, keepdim=True) for x in (STUDENT, TEACHER)]
    assert_close(student.grad, (centred[0] - centred[1]) / 5 / 6, rtol=2e-2, atol=1e-3)


def test_an_offset_of_the_logits_is_nothing_and_half_precision_is_lifted():
    assert_close(Distil()(STUDENT + 7, teacher=TEACHER - 3), Distil()(STUDENT, teacher=TEACHER), rtol=1e-4, atol=1e-5)
    assert Distil()(STUDENT.bfloat16(), teacher=TEACHER.bfloat16()).dtype == torch.float32
