"""Streams: exact where everything or nothing changes, near where a few tokens do, and paid for by what was computed; the caller holds the state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

from apportion.errors import PathError, PlanError
from apportion.measure.macs import executed_macs
from apportion.network import Architecture, Network, eventful
from apportion.network.eventful import Eventful, Gate, Passed, exchanged, gated, renewed
from tests.conftest import PLAN, assert_same_state, images, state_of, tiny

N = 17
flavours = pytest.mark.parametrize("flavour", ["class_token", "registers", "mean", "qk_norm", "layer_scale", "attention_pool"])


def frames(count: int, *, patches: int, side: int = 16, patch: int = 4, streams: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """A stream of images in which each frame exchanges so many patches of the one before."""
    draw, grid = torch.Generator().manual_seed(seed), side // patch
    now = [torch.randn(streams, 3, side, side, generator=draw, dtype=dtype)]
    for _ in range(count - 1):
        frame = now[-1].clone()
        for place in torch.randperm(grid**2, generator=draw)[:patches].tolist():
            row, column = place // grid * patch, place % grid * patch
            frame[:, :, row : row + patch, column : column + patch] = torch.randn(streams, 3, patch, patch, generator=draw, dtype=dtype)
        now.append(frame)
    return now


@flavours
@pytest.mark.parametrize("threshold", [0.0, 1e-300])
def test_where_everything_is_computed_again_it_is_the_network(flavour, threshold):
    """By a first frame each time, and (a threshold above 0) by way of what changed."""
    network = tiny(flavour).double()
    stream, state = Eventful(network), None
    for frame in frames(12, patches=16, dtype=torch.float64):
        n = network.space.tokens
        logits, state = stream.start(frame) if state is None else stream(frame, state, n, threshold)
        assert_close(logits, network(frame, network.space.full), rtol=1e-9, atol=1e-9)


def test_the_same_frame_gives_the_same_bits_and_the_same_state():
    stream, frame = Eventful(tiny()), images(2)
    logits, state = stream.start(frame)
    for recompute in (2, 5, N - 1, N):
        for threshold in (0.0, 0.5):
            again, after = stream(frame, state, recompute, threshold)
            assert torch.equal(again, logits)
            assert all(torch.equal(old, new) for old, new in zip(tree_leaves(state), tree_leaves(after), strict=True))


def test_what_stays_below_the_threshold_is_not_computed_and_drift_passes_when_it_has_added_up():
    ran = []

    def counted(x: Tensor) -> Tensor:
        ran.append(x)
        return 2 * x

    x = torch.zeros(1, 6, 4)
    gate = Gate(x, 2 * x)
    for frame in range(1, 9):
        now = x.clone()
        now[0, 3, 0] = 0.3 * frame
        gate, passed = gated(counted, now, gate, 6, 1.0, 0)
        assert passed.changed.sum() == (frame in (4, 8)) and not passed.changed[passed.where != 3].any()
        assert float(gate.reference[0, 3, 0]) == pytest.approx(0.3 * (frame // 4 * 4)) and torch.equal(gate.result, 2 * gate.reference)
    _, exactly = gated(counted, gate.reference + torch.tensor([1.0, 0, 0, 0]) * (torch.arange(6) == 2)[:, None], gate, 6, 1.0, 0)
    assert not exactly.changed.any(), "as far as the threshold is not beyond it"
    assert [len(calls[0]) for calls in ran] == [6] * 9


def test_scores_and_sums_are_exact_where_only_what_passed_has_changed():
    draw = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    index = torch.stack([torch.randperm(9, generator=draw)[:4] for _ in range(2)])
    passed, mask = Passed(index, torch.ones(2, 4, dtype=torch.bool)), torch.zeros(2, 9).scatter(1, index, 1.0)[:, None, :, None]
    query, key, value, weight = drawn(2, 3, 9, 5), drawn(2, 3, 9, 5), drawn(2, 3, 9, 5), drawn(2, 3, 9, 9)
    new_query, new_key, new_value = (old + mask * drawn(2, 3, 9, 5) for old in (query, key, value))
    new_weight = weight + mask.transpose(2, 3) * drawn(2, 3, 9, 9)
    assert_close(renewed(query @ key.mT, new_query, new_key, passed), new_query @ new_key.mT, rtol=0, atol=1e-12)
    none = passed._replace(changed=torch.zeros(2, 4, dtype=torch.bool))
    assert torch.equal(renewed(query @ key.mT, new_query, new_key, none), query @ key.mT)
    for now, changed in ((new_value, new_weight), (value, new_weight), (new_value, weight)):
        attention, values, mixed = exchanged(changed, now, weight, value, weight @ value, 4)
        assert_close(mixed, changed @ now, rtol=0, atol=1e-12)
        assert torch.equal(attention, changed) and torch.equal(values, now), "the columns that changed have been found"
    assert torch.equal(exchanged(weight, value, weight, value, weight @ value, 4)[2], weight @ value)
    attention, values, mixed = exchanged(drawn(2, 3, 9, 9), drawn(2, 3, 9, 5), weight, value, weight @ value, 4)
    assert_close(mixed, attention @ values, rtol=0, atol=1e-12)


def test_multiply_adds_are_those_that_run_and_products_with_weights_are_the_share_of_the_tokens():
    network = tiny("layer_scale")
    stream, (one, two) = Eventful(network), frames(2, patches=3, streams=1)
    _, state = stream.start(one)
    assert executed_macs(lambda: stream.start(one)) == network.macs(network.space.full) == stream.macs(N)
    for recompute in (2, 4, 8, 16):
        assert executed_macs(lambda r=recompute: stream(two, state, r)) == stream.macs(recompute)
    block = stream.blocks[0]
    alone = {r: block.macs(N, r) - 4 * N * r * 32 for r in (1, 8)}  # without scores and sums
    dense = network.blocks[0].macs(N, network.space.full.steps[0], 1) - 2 * N * N * 32
    assert alone[8] == 8 * alone[1] and alone[1] * N == dense


def errors(network: Network, stream: list[Tensor], recompute: int) -> float:
    """The largest distance of the logits, as a share of the network's, after the first frame."""
    gates, full = Eventful(network), network.space.full
    _, state = gates.start(stream[0])
    worst = 0.0
    for frame in stream[1:]:
        logits, state = gates(frame, state, recompute)
        wanted = network(frame, full)
        worst = max(worst, float(((logits - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max()))
    return worst


def test_the_more_tokens_the_nearer_and_a_quarter_of_them_is_near():
    """Six patches of 49 exchanged in each frame; weights as large as they are before training."""
    torch.manual_seed(0)
    shape = {"image_size": 28, "patch": 4, "dim": 64, "depth": 3, "heads": 4, "hidden": 128, "classes": 10}
    network = Network(Architecture(**shape)).eval().requires_grad_(False)
    for weight in (parameter for parameter in network.parameters() if parameter.ndim > 1):
        weight.normal_(std=0.02)
    stream = frames(10, patches=6, side=28)
    found = [errors(network, stream, recompute) for recompute in (2, 6, 12, 24, 50)]
    assert found == sorted(found, reverse=True) and found[0] > 0.1 and found[2] <= 0.05 and found[4] <= 1e-5, found


def test_a_stream_does_not_depend_on_the_others_and_nothing_is_remembered():
    network = tiny()
    stream, (one, two, three) = Eventful(network), frames(3, patches=4, streams=3)
    before = state_of(stream)
    _, state = stream.start(one)
    kept = [leaf.clone() for leaf in tree_leaves(state)]
    logits, after = stream(two, state, 5)
    assert torch.equal(stream(two, state, 5)[0], logits), "the same call twice"
    assert all(torch.equal(old, new) for old, new in zip(kept, tree_leaves(state), strict=True)), "the caller's state is as it was"
    assert_same_state(before, state_of(stream))
    assert not torch.allclose(stream(three, after, 5)[0], stream(three, state, 5)[0], rtol=0, atol=1e-5)
    for row in range(3):
        _, own = stream.start(one[row : row + 1])
        assert_close(stream(two[row : row + 1], own, 5)[0], logits[row : row + 1], rtol=1e-4, atol=1e-5)


def test_starting_again_forgets():
    stream, (one, two, three) = Eventful(tiny()), frames(3, patches=16)
    state = stream.start(one)[1]
    late = stream(two, state, 2)[1]
    assert torch.equal(stream.start(three)[0], stream(three, late, N)[0])
    assert not torch.allclose(stream(three, late, 2)[0], stream.start(three)[0], atol=1e-3)


@pytest.mark.slow
def test_it_compiles_whole():
    stream, (one, two) = Eventful(tiny()), frames(2, patches=3)
    _, state = stream.start(one)
    torch.compiler.reset()
    logits, _ = torch.compile(lambda x, s: stream(x, s, 6), fullgraph=True, backend="eager")(two, state)
    assert_close(logits, stream(two, state, 6)[0])


def test_it_has_no_weights_of_its_own():
    network = tiny()
    assert sum(p.numel() for p in Eventful(network).parameters()) == sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("choice", PLAN, ids=lambda choice: choice.name)
def test_a_network_that_adapts_is_refused(choice):
    with pytest.raises(PlanError, match="stream"):
        Eventful(tiny("class_token", choice))


def test_other_networks_and_states_are_refused():
    with pytest.raises(PlanError):
        Eventful(tiny("post_norm"))
    stream, frame = Eventful(tiny()), images(2)
    _, state = stream.start(frame)
    for call in (
        lambda: stream(frame, state, 1),
        lambda: stream(frame, state, N + 1),
        lambda: stream(frame[:1], state, 4),
        lambda: stream(frame, state[1:], 4),
    ):
        with pytest.raises(PathError, match="start"):
            call()


@pytest.mark.parametrize("fault", ["columns", "reference"])
def test_the_checks_catch(fault, monkeypatch):
    if fault == "columns":
        monkeypatch.setattr(eventful, "exchanged", lambda attention, value, before, values, mixed, r: (attention, value, mixed + attention @ (value - values)))
    else:
        plain = eventful.gated
        monkeypatch.setattr(eventful, "gated", lambda f, now, *rest: (plain(f, now, *rest)[0]._replace(reference=now), plain(f, now, *rest)[1]))
    with pytest.raises(AssertionError):
        if fault == "columns":
            test_where_everything_is_computed_again_it_is_the_network("class_token", 1e-300)
        else:
            test_a_frame_that_stays_comes_nearer_with_every_look_at_it()


def test_a_frame_that_stays_comes_nearer_with_every_look_at_it():
    network, (one, two) = tiny(), frames(2, patches=16)
    stream, wanted = Eventful(network), network(two, network.space.full)
    _, state = stream.start(one)
    error = []
    for _ in range(30):
        logits, state = stream(two, state, 6)
        error.append(float((logits - wanted).norm()))
    assert error[-1] < 1e-3 * error[0], error
