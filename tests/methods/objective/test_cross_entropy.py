"""Cross-entropy with smoothing against its definition."""

from __future__ import annotations

import torch
from torch.testing import assert_close

from apportion.methods.objective.cross_entropy import CrossEntropy

LOGITS, TARGET = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3, 4, 0])


def test_it_is_the_surprise_at_the_right_class():
    assert_close(CrossEntropy()(LOGITS, target=TARGET), -LOGITS.softmax(-1)[range(6), TARGET].log().mean())


def test_smoothing_spreads_a_share_over_all_classes():
    shares = 0.8 * torch.nn.functional.one_hot(TARGET, 5) + 0.2 / 5
    wanted = -(shares * LOGITS.log_softmax(-1)).sum(-1).mean()
    assert_close(CrossEntropy(smoothing=0.2)(LOGITS, target=TARGET), wanted)
    assert_close(CrossEntropy()(LOGITS, target=shares), wanted)
