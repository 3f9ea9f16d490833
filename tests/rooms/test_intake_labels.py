"""Labels of every task, from cells as tables hold them to the tensor that is learned from."""

from __future__ import annotations

import json

import pytest
import torch

from apportion.errors import DataError
from apportion.intake.labels import numbered, parsed, span
from apportion.intake.texts import TextSet, read_texts
from tests.rooms.test_deliver_texts import tokenise

pytest.importorskip("tokenizers")


@pytest.mark.parametrize(
    ("value", "task", "words", "wanted"),
    [
        ("good", "classification", 0, "good"),
        (3.0, "classification", 0, 3),
        ("a|b", "multilabel", 0, ["a", "b"]),
        ("", "multilabel", 0, []),
        ([1, 2.0], "multilabel", 0, [1, 2]),
        ("1.5", "regression", 0, [1.5]),
        ([1, 2.5], "regression", 0, [1.0, 2.5]),
        ("O B-X", "token_classification", 2, ["O", "B-X"]),
        ([0, 1, 1], "token_classification", 3, [0, 1, 1]),
    ],
)
def test_a_cell_is_read_as_its_task_wants(value, task, words, wanted):
    assert parsed(value, task, words) == (wanted, "")


@pytest.mark.parametrize(
    ("value", "task", "why"),
    [
        (None, "multilabel", "no label"),
        (float("nan"), "regression", "no label"),
        ("high", "regression", "a number was wanted"),
        ("inf", "regression", "a finite number"),
        ([[1]], "multilabel", "a list of labels"),
        (["O"], "token_classification", "1 labels for 2 words"),
        (7, "token_classification", "a list of labels"),
        ([1], "classification", "list where a label"),
    ],
)
def test_what_is_no_label_is_named(value, task, why):
    assert why in parsed(value, task, 2)[1]


def test_several_labels_become_rows_of_0_and_1():
    names, table = numbered([["b"], [], ["a", "c"]], [["b"], [], ["a", "c"]], None, "multilabel")
    assert names == ("a", "b", "c") and table is not None and table.tolist() == [[0, 1, 0], [0, 0, 0], [1, 0, 1]]
    assert numbered([["b"]], [["b"]], ("a", "b"), "multilabel")[1].tolist() == [[0, 1]]  # pyright: ignore[reportOptionalMemberAccess]
    with pytest.raises(DataError, match="'d'"):
        numbered([["d"]], [["d"]], ("a", "b"), "multilabel")


def test_numbers_have_a_span_and_rows_of_one_width():
    table = numbered([[1.0], [4.0]], [[1.0], [4.0]], None, "regression")[1]
    assert table is not None and table.dtype == torch.float32 and span([table, None]) == 3.0 and span([None]) == 0.0
    with pytest.raises(DataError, match="as many"):
        numbered([[1.0], [1.0, 2.0]], [[1.0], [1.0, 2.0]], None, "regression")


def test_labels_of_words_stand_at_the_first_token_of_each(tmp_path):
    rows = [{"text": ["the", "film", "was"], "label": ["O", "X", "O"]}, {"text": "good  bad", "label": "X O"}, {"text": "bad", "label": ["O", "O"]}]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = read_texts(tmp_path / "d.jsonl", task="token_classification")
    assert found.texts == ("the film was", "good  bad") and found.skipped[0][1] == "2 labels for 1 words"
    assert found.labels is not None and found.labels.tolist() == [[0, 1, 0], [1, 0, -100]]
    ((inputs, labels),) = list(found.batches(2, tokenise()))
    assert labels is not None and labels.tolist() == [[0, 1, 0], [1, 0, -100]] and inputs.shape == labels.shape
    rest, held = TextSet(found.texts * 10, found.labels.repeat(10, 1), found.classes).split(0.2)
    assert (len(rest), len(held)) == (16, 4)
    found.check(2)
    with pytest.raises(DataError, match=r"label 1 at .*line 1"):
        found.check(1)


def test_a_word_in_several_pieces_has_its_label_once():
    from tokenizers import Tokenizer, models, pre_tokenizers

    from apportion.intake import Tokenise

    made = Tokenizer(models.WordPiece({"[UNK]": 0, "[PAD]": 1, "un": 2, "##happy": 3, "film": 4, ",": 5}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    feed = Tokenise(made.to_str(), length=9, padding=1)
    assert feed.words("unhappy film, film") == [0, -100, 1, -100, 2]
    assert feed.labelled(["unhappy film, film", "film"], torch.tensor([[5, 6, 7], [8, -100, -100]])).tolist() == [[5, -100, 6, -100, 7], [8] + [-100] * 4]
