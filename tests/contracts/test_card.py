"""What every method says of itself."""

from __future__ import annotations

import re

import pytest

from apportion.methods import SLOTS, card, find, names, summary

every = pytest.mark.parametrize(("slot", "name"), [(slot, name) for slot in SLOTS for name in names(slot)])


@every
def test_the_card_is_whole(slot, name):
    it = card(slot, name)
    assert it.title and re.fullmatch(r"(\d{4}\.\d{4,5})?", it.arxiv), it.arxiv
    assert bool(it.source) == bool(it.arxiv), "a source and its arXiv number come together"
    assert not it.source or re.search(r" (19|20)\d\d$", it.source), f"no year in {it.source!r}"
    assert it.needs in ("nothing", "calibration", "healing", "training")


@every
def test_the_file_says_in_one_sentence_what_it_does(slot, name):
    assert 20 <= len(summary(slot, name)) <= 160 and find(slot, name).__module__ == f"apportion.methods.{slot}.{name}"


def test_every_slot_has_a_method():
    assert all(names(slot) for slot in SLOTS)
