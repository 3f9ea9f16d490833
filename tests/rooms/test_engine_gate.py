"""No rung is served that is slower than the dense network; nothing else is dropped."""

from __future__ import annotations

import pytest

from apportion.engine import never_slower
from apportion.errors import EngineError

DENSE = {1: 10.0, 8: 6.0}


def test_rungs_that_are_faster_at_every_bucket_all_stay():
    gate = never_slower({1: [3.0, 6.0, 10.5], 8: [2.0, 4.0, 6.3]}, DENSE)
    assert gate.served == (0, 1, 2) and gate.remap == (0, 1, 2) and not gate.dropped and gate.adapts


def test_a_planted_slow_rung_is_dropped_and_its_samples_go_to_the_next_dearer():
    gate = never_slower({1: [3.0, 11.0, 6.0, 10.5], 8: [2.0, 3.0, 4.0, 6.3]}, DENSE)
    assert gate.served == (0, 2, 3) and gate.remap == (0, 1, 1, 2)
    (dropped,) = gate.dropped
    assert dropped.rung == 1 and dropped.ratios == {1: pytest.approx(1.1)}
    assert dropped.reason == "rung 1 takes 1.100 of the dense time at batch 1"


def test_one_bucket_at_hand_is_judged_by_itself():
    times = {1: [11.0, 10.5], 8: [2.0, 6.3]}
    assert never_slower(times, DENSE).served == (1,)
    assert never_slower({8: times[8]}, {8: DENSE[8]}).served == (0, 1)


def test_with_only_full_left_nothing_adapts():
    gate = never_slower({1: [10.0, 9.9, 10.5]}, {1: 10.0})
    assert gate.served == (2,) and gate.remap == (0, 0, 0) and not gate.adapts and [entry.rung for entry in gate.dropped] == [0, 1]


def test_the_limit_itself_is_fast_enough_and_full_stays_however_slow():
    assert never_slower({1: [9.8, 30.0]}, {1: 10.0}).served == (0, 1)
    assert never_slower({1: [9.8001, 30.0]}, {1: 10.0}).served == (1,)
    assert never_slower({1: [9.8, 30.0]}, {1: 10.0}, limit=0.9).served == (1,)


def test_whatever_is_not_remapped_to_full_never_takes_longer_than_before():
    """The reason for going up and not down: a dropped rung took more than the limit, and what is served takes less."""
    times = {1: [9.9, 4.0, 12.0, 9.0, 10.4], 8: [3.0, 5.0, 5.0, 5.5, 6.3]}
    gate = never_slower(times, DENSE)
    for rung, place in enumerate(gate.remap):
        kept = gate.served[place]
        slow = next((entry.ratios for entry in gate.dropped if entry.rung == rung), {})
        assert kept >= rung and all(times[bucket][kept] <= times[bucket][rung] for bucket in slow if kept != 4)
    assert gate.served == (1, 3, 4)


@pytest.mark.parametrize(
    ("times", "dense", "limit"),
    [
        ({}, {}, 0.98),
        ({1: []}, {1: 1.0}, 0.98),
        ({1: [1.0]}, {8: 1.0}, 0.98),
        ({1: [1.0], 8: [1.0, 2.0]}, {1: 1.0, 8: 1.0}, 0.98),
        ({1: [float("nan"), 1.0]}, {1: 1.0}, 0.98),
        ({1: [0.0, 1.0]}, {1: 1.0}, 0.98),
        ({1: [1.0]}, {1: float("inf")}, 0.98),
        ({1: [1.0]}, {1: 1.0}, 1.5),
    ],
)
def test_tables_that_do_not_fit_are_refused(times, dense, limit):
    with pytest.raises(EngineError, match="dense"):
        never_slower(times, dense, limit=limit)
