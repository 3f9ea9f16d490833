"""Tables for control: what samples are answered on every rung, and what that costs."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from apportion.deliver.deciding import looked
from apportion.measure.macs import executed_macs
from apportion.measure.outcomes import look
from apportion.vocab import Ladder
from tests.conftest import DEPTH, PLAN, images, tiny


@pytest.mark.parametrize(("glance", "first"), [(0, 1), (1, 1), (1, 2)])
def test_exits_share_the_work_that_they_have_in_common(glance, first):
    network = tiny("class_token", *PLAN)
    space = network.space
    paths = [*(space.path(blocks=range(depth)) for depth in range(first, DEPTH)), space.full]
    each = look(network.glance(glance), [network.segment(glance, len(path.steps), path) for path in paths])
    once, x = looked(network, Ladder(tuple(paths), glance)), images(3)
    with torch.no_grad():
        for ours, theirs in zip(once(x), each(x), strict=True):
            assert_close(ours, theirs, rtol=0, atol=1e-6)
        heads = (len(paths) - 1) * network.head.macs(space.tokens, space.prefix) + network.glance(glance).macs()
        assert executed_macs(lambda: once(images(1))) == network.macs(space.full) + heads
        assert executed_macs(lambda: each(images(1))) > executed_macs(lambda: once(images(1)))


def test_what_is_no_exit_goes_its_own_way():
    network = tiny("class_token", *PLAN)
    space = network.space
    merged = space.path(tokens=space.merging(2, start=1))
    paths = (*sorted((space.path(blocks=range(2)), merged), key=network.macs), space.full)
    with torch.no_grad():
        answers = looked(network, Ladder(paths, 1))(images(2))[1]
        for place, path in enumerate(paths):
            assert_close(answers[:, place], network(images(2), path), rtol=0, atol=1e-5)
