"""What every objective keeps to: it learns from a teacher or from labels, and refuses to learn from neither."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from apportion.errors import TrainError
from apportion.methods import find, names

every = pytest.mark.parametrize("name", names("objective"))


def lesson(name: str) -> tuple[dict[str, Tensor], Tensor]:
    """What this objective learns from, and the student that has learnt it."""
    logits = 2 * torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    try:
        find("objective", name)()(logits, teacher=logits)
    except TrainError:
        target = logits.argmax(-1)
        return {"target": target}, 100.0 * torch.nn.functional.one_hot(target, 5)
    return {"teacher": logits}, logits


@every
def test_it_is_zero_for_the_perfect_student_and_grows_with_the_distance(name):
    objective, (given, perfect) = find("objective", name)(), lesson(name)
    away = torch.randn(6, 5, generator=torch.Generator().manual_seed(1)) * perfect.abs().amax()
    losses = [float(objective(perfect + share * away, **given)) for share in (0.0, 0.2, 1.0, 5.0)]
    assert abs(losses[0]) < 1e-6 and losses == sorted(losses) and losses[2] > 1e-4


@every
def test_following_the_gradient_lowers_it(name):
    objective, (given, perfect) = find("objective", name)(), lesson(name)
    student = torch.randn(perfect.shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    before = objective(student, **given)
    assert before.ndim == 0
    (gradient,) = torch.autograd.grad(before, student)
    assert gradient.isfinite().all() and (gradient.abs().sum(-1) > 0).all()
    assert objective(student.detach() - 0.1 * gradient, **given) < before


@every
def test_it_is_the_mean_over_samples(name):
    objective, (given, perfect) = find("objective", name)(), lesson(name)
    student = torch.randn(perfect.shape, generator=torch.Generator().manual_seed(1))
    each = [objective(student[i : i + 1], **{key: value[i : i + 1] for key, value in given.items()}) for i in range(6)]
    torch.testing.assert_close(objective(student, **given), torch.stack(each).mean())


@every
def test_the_teacher_is_not_taught(name):
    given, perfect = lesson(name)
    teacher = perfect.float().clone().requires_grad_()
    student = torch.zeros(perfect.shape, requires_grad=True)
    find("objective", name)()(student, **{**given, "teacher": teacher}).backward()
    assert teacher.grad is None and student.grad is not None


@every
def test_without_a_lesson_it_refuses(name):
    with pytest.raises(TrainError):
        find("objective", name)()(torch.zeros(2, 5))
