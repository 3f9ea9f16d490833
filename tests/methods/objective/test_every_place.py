"""A class for each place: only what has a label or a token counts, and patches answer for the pixels between them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from apportion.errors import TrainError
from apportion.methods.objective.every_place import EveryPlace

STUDENT, TEACHER = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).unbind(0)


def test_only_labelled_places_count():
    target = torch.full((3, 4), -100)
    target[0, 1], target[2, 3] = 2, 4
    wanted = -(STUDENT[0, 1].log_softmax(-1)[2] + STUDENT[2, 3].log_softmax(-1)[4]) / 2
    assert_close(EveryPlace()(STUDENT, target=target), wanted)


def test_only_places_with_a_token_are_distilled():
    teacher = TEACHER.clone()
    teacher[1, 2:] = 0  # padding
    total = sum(
        float((t.softmax(-1) * (t.log_softmax(-1) - s.log_softmax(-1))).sum())
        for b in range(3)
        for t, s in zip(teacher[b], STUDENT[b], strict=True)
        if bool((t != 0).any())
    )
    assert float(EveryPlace()(STUDENT, teacher=teacher)) == pytest.approx(total / 10, rel=1e-5)


def test_pixels_are_answered_for_by_the_patches_around_them():
    target = torch.randint(0, 5, (3, 8, 8), generator=torch.Generator().manual_seed(1))
    wide = F.interpolate(STUDENT.transpose(1, 2).reshape(3, 5, 2, 2), size=(8, 8), mode="bilinear", align_corners=False)
    assert_close(EveryPlace()(STUDENT, target=target), F.cross_entropy(wide, target))
    flat = torch.ones(2, 4, 5)
    assert float(EveryPlace()(flat, target=target[:2])) == pytest.approx(math.log(5), rel=1e-6)


def test_without_either_it_says_what_is_missing():
    with pytest.raises(TrainError, match="no labels"):
        EveryPlace()(STUDENT)
