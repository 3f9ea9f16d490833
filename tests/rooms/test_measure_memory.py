"""The ledger of memory against tensors whose bytes are known."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from apportion.engine import Graph
from apportion.measure.memory import Memory, memory, process_peak_bytes, weight_bytes
from tests.rooms.test_engine_engine import engine


class Tied(nn.Module):
    """20 * 6 weights, used twice, a buffer of 5 int64, and a parameter that is a view of a larger storage."""

    def __init__(self) -> None:
        super().__init__()
        self.word, self.out = nn.Embedding(20, 6), nn.Linear(6, 20)
        self.out.weight = self.word.weight
        self.register_buffer("count", torch.zeros(5, dtype=torch.int64))
        self.cut = nn.Parameter(torch.zeros(100)[:10])


def test_weights_are_counted_once() -> None:
    module = Tied()
    alone = 4 * (20 * 6 + 20 + 100) + 8 * 5
    assert weight_bytes([module]) == weight_bytes([module, module.word]) == alone
    assert weight_bytes([module, nn.Linear(3, 2)]) == alone + 4 * 8


@pytest.mark.parametrize("batch", [1, 7])
def test_the_ledger_of_a_known_module(batch: int) -> None:
    module, x = nn.Sequential(nn.Linear(10, 100), nn.ReLU(), nn.Linear(100, 2)), torch.zeros(batch, 10)
    found = memory([module], [5, 6], lambda: module(x), batch=batch)
    weights = 4 * (10 * 100 + 100 + 100 * 2 + 2)
    # The widest moment: what goes into the ReLU and what comes out of it.
    assert found == Memory(weights, 11, 2 * 4 * 100 * batch, batch, found.process_peak_bytes, found.device_peak_bytes)
    assert set(found.how) == {name for name in Memory.__slots__ if name != "batch"} and f"of {batch}," in found.how["activation_bytes"]


@pytest.mark.skipif(sys.platform == "win32", reason="the system does not say")
def test_the_peak_of_the_process_grows_with_what_it_touches_and_never_falls() -> None:
    before = process_peak_bytes()
    assert before is not None
    held = torch.ones(before // 4 + (32 << 20) // 4)  # more than all that was there
    after = process_peak_bytes()
    assert after is not None and after > before + (16 << 20)
    del held
    last = process_peak_bytes()
    assert last is not None and last >= after


def test_copies_of_all_graphs_are_summed() -> None:
    """Each graph of a made-up back-end holds three bytes."""
    made_up = engine()
    made_up._table._make = lambda module, example, /, *, backend, name: Graph(module, 3)
    made_up.warm()
    assert made_up.weight_bytes == 3 * made_up.wanted > 0
