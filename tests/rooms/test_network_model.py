"""The one transformer, against stock layers, and in pieces: segments, glance, one path as a module."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from apportion.errors import PathError, PlanError
from apportion.measure.macs import executed_macs
from apportion.network import Architecture, Network
from apportion.vocab import Ladder, Step
from tests.conftest import DEPTH, DIM, FLAVOURS, HEADS, HIDDEN, PLAN, assert_same_state, images, random_paths, state_of, tiny, tokens_of

flavours = pytest.mark.parametrize("flavour", list(FLAVOURS))


def copied_into_stock(block: nn.Module, *, norm_first: bool) -> nn.TransformerEncoderLayer:
    """torch's own layer with a block's weights: rows of q, k and v one after another, where ours lie head by head."""
    stock = nn.TransformerEncoderLayer(DIM, HEADS, HIDDEN, 0.0, "gelu", 1e-6, batch_first=True, norm_first=norm_first).requires_grad_(False)
    w, c = block.state_dict(), DIM // HEADS

    def unnested(value: Tensor) -> Tensor:
        return value.view(HEADS, 3, c, -1).transpose(0, 1).reshape(value.shape)

    names = {"linear1": "ffn.up", "linear2": "ffn.down", "self_attn.out_proj": "mixer.proj", "norm1": "norm1", "norm2": "norm2"}
    state = {f"{theirs}.{kind}": w[f"{ours}.{kind}"] for theirs, ours in names.items() for kind in ("weight", "bias")}
    stock.load_state_dict({**state, **{f"self_attn.in_proj_{kind}": unnested(w[f"mixer.qkv.{kind}"]) for kind in ("weight", "bias")}})
    return stock


@pytest.mark.parametrize("flavour", ["class_token", "post_norm"])
def test_a_block_is_the_stock_encoder_layer(flavour):
    network, tokens = tiny(flavour), tokens_of(3, 17)
    for block in network.blocks:
        stock = copied_into_stock(block, norm_first=flavour == "class_token")
        assert_close(block(tokens, Step(0, 17, HEADS, HIDDEN)).x, stock(tokens.x), rtol=1e-4, atol=1e-5)


@flavours
def test_pieces_make_the_whole(flavour):
    network = tiny(flavour, *PLAN)
    for path in random_paths(network, 4):
        whole, last = network(images(2), path), len(path.steps)
        start = network.tokeniser(images(2), path.patch)
        for cut in range(last + 1):
            state = network.segment(0, cut, path)(start) if cut < last else network.run(start, path.steps)
            assert torch.equal(network.segment(cut, last, path)(state), whole)
        assert torch.equal(network.segment(0, last, path)(start), whole) and torch.equal(network.at(path)(images(2)), whole)


@flavours
def test_the_glance_is_where_every_rung_goes_on_from(flavour):
    network, notes = tiny(flavour, *PLAN), {}
    full = network.space.full
    whole = network(images(3), full, notes)
    for steps in (0, 1, 2):
        state, signal = network.glance(steps)(images(3))
        wanted = notes["feature"][steps - 1] if steps else network.tokeniser(images(3), 4).x
        assert torch.equal(state.x, wanted) and signal.shape[0] == 3 and signal.isfinite().all() and signal.dtype == torch.float32
        assert torch.equal(network.segment(steps, DEPTH, full)(state), whole)
    n = network.space.tokens
    small = network.space.path(tokens=(n, n - 4, n - 4, n - 6), width=(HIDDEN, 16, 16, 16))
    state, _ = network.glance(1)(images(3))
    assert Ladder((small, full), 1).glance == 1 and torch.equal(network.segment(1, DEPTH, small)(state), network(images(3), small))


def test_the_signal_of_a_sample_is_its_own_and_says_how_sure_the_head_is():
    network = tiny()
    glance = network.glance(1)
    (_, signal), (state, _) = glance(images(4)), glance(images(4))
    assert_close(torch.cat([glance(image[None])[1] for image in images(4)]), signal, rtol=1e-3, atol=1e-4)
    shares = network.finish(state).softmax(-1)
    top, margin, entropy = signal[:, -7:-2], signal[:, -2], signal[:, -1]
    assert_close(top, shares.sort(-1, descending=True).values)
    assert_close(margin, top[:, 0] - top[:, 1])
    assert_close(entropy, -(shares * shares.log()).sum(-1))


def test_notes_are_written_for_who_asks_and_change_nothing():
    network = tiny("registers", *PLAN)
    path, notes = random_paths(network, 2)[1], {}
    assert torch.equal(network(images(2), path, notes), network(images(2), path))
    assert set(notes) == {"feature", "size", "origin"}
    for step, tokens in enumerate(path.tokens):
        assert notes["feature"][step].shape == (2, tokens, DIM) and notes["size"][step].shape == (2, tokens) and notes["origin"][step].shape == (2, 20)


@pytest.mark.parametrize("steps", [-1, DEPTH, DEPTH + 1])
def test_a_glance_leaves_something_to_decide(steps):
    with pytest.raises(PathError, match="glance"):
        tiny().glance(steps)


@pytest.mark.parametrize(("first", "last"), [(-1, 2), (3, 2), (0, DEPTH + 1)])
def test_a_segment_lies_within_the_path(first, last):
    network = tiny()
    with pytest.raises(PathError, match="steps"):
        network.segment(first, last, network.space.full)


def test_without_classes_the_answer_is_the_pooled_feature():
    network = Network(Architecture(image_size=16, patch=4, dim=DIM, depth=1, heads=HEADS, hidden=HIDDEN, classes=0)).eval()
    with torch.no_grad():
        assert network(images(2), network.space.full).shape == (2, DIM) and network.glance(0)(images(2))[1].shape == (2, 3 * DIM)
    assert network.glance(0).macs() == 0 and executed_macs(lambda: network(images(1), network.space.full)) == network.macs(network.space.full)


@pytest.mark.parametrize("flavour", ["class_token", pytest.param("attention_pool", marks=pytest.mark.slow), pytest.param("post_norm", marks=pytest.mark.slow)])
def test_one_path_compiles_whole(flavour):
    network = tiny(flavour, *PLAN)
    path = random_paths(network, 3)[2]
    before = state_of(network)
    compiled = torch.compile(network.at(path), fullgraph=True, backend="eager")(images(2))
    assert_close(compiled, network(images(2), path), rtol=1e-4, atol=1e-5)
    state = network.glance(1)(images(2))[0]
    full = network.segment(1, DEPTH, network.space.full)
    assert_close(torch.compile(full, fullgraph=True, backend="eager")(state), full(state), rtol=1e-4, atol=1e-5)
    assert_same_state(before, state_of(network))


@pytest.mark.parametrize("more", [{"tape": 6, "tape_rows": 40}, {"tape_key": 8}, {"grey_level": 0.1}])
@pytest.mark.parametrize("kind", [{"words": 9, "length": 8, "positions": 8}, {"frames": 8, "bands": 4}])
def test_what_only_images_have_is_refused_for_texts_and_sound(kind: dict, more: dict):
    shape = {"image_size": 0, "patch": 0, "dim": DIM, "depth": 1, "heads": HEADS, "hidden": HIDDEN, "classes": 2, "class_token": False, "pool": "mean"}
    Network(Architecture(**shape, **kind))
    with pytest.raises(PlanError, match=next(iter(more))):
        Network(Architecture(**shape, **kind, **more))


def test_classes_are_no_embedding():
    with pytest.raises(PlanError, match="3 classes for an embedding"):
        Network(Architecture(8, 4, 8, 1, 2, 16, 3, task="embedding"))
