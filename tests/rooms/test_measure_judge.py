"""How good answers are, against the definition of each measure, row by row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from torch.testing import assert_close

from apportion.errors import DataError
from apportion.measure.judge import METRICS, judge
from apportion.methods.task import UNKNOWN, said, sight, sureness


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_one_class_is_right_or_wrong_and_agrees_or_not():
    answers, truth = drawn(20, 3, 4), torch.randint(0, 4, (20,), generator=torch.Generator().manual_seed(1))
    found = judge(answers, truth, task="classification")
    for row in range(20):
        for path in range(3):
            best = int(answers[row, path].argmax())
            assert found.quality[row, path] == (best == truth[row]) and found.agree[row, path] == (best == int(answers[row, -1].argmax()))
            assert float(found.loss[row, path]) == pytest.approx(-float(answers[row, path].log_softmax(-1)[truth[row]]), rel=1e-5)
    assert judge(answers, None, task="classification").quality[:, -1].eq(1).all()


def test_several_labels_by_the_f1_of_each_sample():
    answers, truth = drawn(30, 2, 5), (drawn(30, 5, seed=1) > 0.3).float()
    answers[0], truth[0] = -1.0, 0.0  # none, and none named
    found = judge(answers, truth, task="multilabel")
    for path in range(2):
        each = [f1_score(t, p, zero_division=1.0) for t, p in zip(truth.numpy(), (answers[:, path] > 0).numpy().astype(float), strict=True)]
        assert found.quality[:, path].tolist() == pytest.approx(each)
    assert torch.equal(found.agree[:, 0], ((answers[:, 0] > 0) == (answers[:, 1] > 0)).all(-1))


def test_numbers_by_their_error_as_a_share_of_the_span():
    answers, truth = torch.tensor([[[1.0], [2.0]], [[9.0], [2.02]]]), torch.tensor([[2.0], [2.0]])
    found = judge(answers, truth, task="regression", span=4.0)
    assert found.quality.tolist() == [[0.75, 1.0], [0.0, pytest.approx(0.995)]] and found.agree.tolist() == [[False, True], [False, True]]
    with pytest.raises(DataError, match="span"):
        judge(answers, truth, task="regression")


def test_embeddings_by_their_angle_with_the_full_path():
    x = torch.tensor([[[1.0, 1.0], [1.0, 0.0]], [[-1.0, 0.0], [2.0, 0.0]]])
    found = judge(x, None, task="embedding")
    assert found.quality.tolist() == [[pytest.approx(2**-0.5), 1.0], [0.0, 1.0]] and found.agree.tolist() == [[False, True], [False, True]]


def test_words_by_the_share_that_is_right_where_there_is_a_label():
    answers, truth = drawn(6, 2, 7, 3), torch.randint(0, 3, (6, 7), generator=torch.Generator().manual_seed(2))
    truth[0], truth[1, 3:] = UNKNOWN, UNKNOWN
    found = judge(answers, truth, task="token_classification")
    for row in range(6):
        for path in range(2):
            known = [i for i in range(7) if truth[row, i] != UNKNOWN]
            right = [bool(answers[row, path, i].argmax() == truth[row, i]) for i in known]
            assert float(found.quality[row, path]) == pytest.approx(np.mean(right) if right else 1.0)
    answers[:, :, 5:] = 0  # no token there
    own = judge(answers, None, task="token_classification")
    assert own.quality[:, -1].eq(1).all() and own.agree[:, -1].all()
    before = own.margin
    assert_close(judge(answers[:, :, :5], None, task="token_classification").margin, before)


def test_pixels_by_the_share_that_is_right_after_spreading():
    answers = drawn(3, 2, 16, 4)
    truth = torch.randint(0, 4, (3, 12, 12), generator=torch.Generator().manual_seed(3))
    truth[0, :5] = UNKNOWN
    found = judge(answers, truth, task="segmentation")
    for path in range(2):
        wide = torch.nn.functional.interpolate(answers[:, path].transpose(1, 2).reshape(3, 4, 4, 4), size=(12, 12), mode="bilinear").argmax(1)
        for row in range(3):
            known = truth[row] != UNKNOWN
            assert float(found.quality[row, path]) == pytest.approx(float((wide[row] == truth[row])[known].double().mean()))


@pytest.mark.parametrize("task", list(METRICS))
def test_rows_are_judged_alone_and_sureness_lies_between_0_and_1(task):
    shape = (5, 2, 9, 3) if task in ("token_classification", "segmentation") else (5, 2, 3)
    answers = drawn(*shape)
    whole = judge(answers, None, task=task, span=1.0)
    for row in range(5):
        for column, one in zip(whole, judge(answers[row : row + 1], None, task=task, span=1.0), strict=True):
            assert_close(column[row : row + 1], one)
    sure = sureness(answers, task)
    assert sure.shape == (5, 2) and bool(((sure >= 0) & (sure <= 1)).all())
    assert sight(answers[:, 0], task).shape[0] == 5 and sight(answers[:, 0], task).isfinite().all()
    assert said(answers[:, -1], task).shape == (answers[:, -1].shape if task in ("regression", "embedding", "multilabel") else answers.shape[:1] + shape[2:-1])
