"""What was read is written back: the full path bit for bit, a cut path as a smaller model of the same class with the same answers."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from apportion.errors import PathError, Refused
from apportion.intake import _torchvision
from apportion.network import Network, put, sort_by_importance
from apportion.vocab import Choice
from tests.conftest import PLAN

_torchvision.ready()
timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
from apportion.intake.export_dense import dense_model, export_dense  # noqa: E402
from apportion.intake.hf_text import Answering, examples, read_text  # noqa: E402
from apportion.intake.timm_vit import read_vit  # noqa: E402
from tests.rooms import test_intake_models as vision  # noqa: E402
from tests.rooms import test_intake_text_models as text  # noqa: E402

CUTS_HEADS = ("vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_giant_patch14_dinov2", "vit_small_patch16_rope_224", "vit_base_patch16_rpn_224")
KEEPS_HEADS = ("beit_base_patch16_224", "eva02_base_patch16_clip_224", "eva02_tiny_patch14_224", "vit_small_plus_patch16_dinov3_qkvb")


def shaken(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def adapted(network, inputs):
    for choice in PLAN:
        put(network, choice)
    sort_by_importance(network, [inputs])
    return network


QUICK = ("deit3_small_patch16_224", "vit_base_patch16_clip_224", "vit_base_patch16_siglip_224", "beit_large_patch16_384", "vit_small_patch16_dinov3")


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in vision.FAMILIES])
def test_the_full_path_comes_back_bit_for_bit(name):
    source = shaken(vision.tiny(name, **vision.FAMILIES[name]))
    state = export_dense(read_vit(source), source)
    assert state.keys() == source.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in source.state_dict().items())


def test_what_has_no_source_to_go_back_to_is_refused():
    source = vision.tiny(QUICK[0], **vision.FAMILIES[QUICK[0]])
    a = replace(read_vit(source).architecture, image_size=0, patch=0, numbers=3, categories=(4,))
    with pytest.raises(Refused, match="a network of rows of a table; wanted one of images or texts"):
        export_dense(Network(a), source)


def test_a_path_with_a_fitted_map_is_refused_and_others_leave_it_behind():
    source = shaken(vision.tiny(QUICK[0], **vision.FAMILIES[QUICK[0]]))
    network = read_vit(source)
    for choice in (Choice("depth", "skip"), Choice("bridge", "surrogate", options={"runs": "1-2"})):
        put(network, choice)
    with pytest.raises(Refused, match="in which a fitted map stands for blocks 1 to 1"):
        export_dense(network, source, network.space.path(blocks=[0, *range(2, network.architecture.depth)]))
    state = export_dense(network, source)
    assert all(torch.equal(value, state[key]) for key, value in source.state_dict().items())


@pytest.mark.parametrize("name", [name if "tiny" in name else pytest.param(name, marks=pytest.mark.slow) for name in CUTS_HEADS + KEEPS_HEADS])
def test_a_cut_path_is_a_smaller_model_of_the_same_class(name):
    source = shaken(vision.tiny(name, **vision.FAMILIES.get(name, {})))
    network = read_vit(source)
    inputs = vision.noise(network)
    network = adapted(network, inputs)
    widths = network.space.width
    heads = (2, 1, 3) if name in CUTS_HEADS else 3
    path = network.space.path(blocks=(0, 2), width=(widths[1], widths[2]), heads=heads if heads == 3 else heads[:2])
    made = dense_model(network, source, path)
    blocks: Any = made.get_submodule("blocks")
    assert type(made) is type(source) and len(blocks) == 2
    with torch.no_grad():
        assert torch.allclose(made(inputs), network(inputs, path), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(made(inputs), source(inputs), atol=1e-2)
    ours = sum(part.numel() for part in network.parameters())
    assert sum(part.numel() for part in made.parameters()) < 0.8 * ours and blocks[0].mlp.fc2.in_features == widths[1]
    again = vision.tiny(name, **vision.FAMILIES.get(name, {}))
    with pytest.raises(RuntimeError):
        again.load_state_dict(made.state_dict())


def test_a_uniform_path_loads_into_the_class_as_it_is_made():
    source = shaken(vision.tiny("deit3_small_patch16_224", mlp_ratio=4.0))
    network = adapted(read_vit(source), vision.noise(read_vit(source)))
    path = network.space.path(blocks=(0, 2), width=network.space.width[2])
    again = vision.tiny("deit3_small_patch16_224", depth=2, mlp_ratio=2.0)
    again.load_state_dict(export_dense(network, source, path))
    with torch.no_grad():
        assert torch.allclose(again(vision.noise(network)), network(vision.noise(network), path), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name if name in ("DistilBert", "Ernie") else pytest.param(name, marks=pytest.mark.slow) for name in text.FAMILIES])
def test_texts_come_back_too(name):
    source = text.tiny(name)
    network = read_text(source)
    refused = {"Ernie": r"tokeniser\.kind, which is read from several", "Albert": "which several blocks share", "Deberta": "found", "DebertaV2": "found"}
    if name in refused:
        with pytest.raises(Refused, match=refused[name]):
            export_dense(network, source)
        return
    state = export_dense(network, source)
    assert all(torch.equal(value, state[key]) for key, value in source.state_dict().items())
    network = adapted(network, examples(network.architecture)[0]) if name != "MPNet" else network
    if name == "MPNet":
        for choice in PLAN:
            put(network, choice)
    path = network.space.path(blocks=(0, 2), width=24, heads=2)
    made = dense_model(network, source, path)
    with torch.no_grad():
        for inputs in examples(network.architecture):
            assert torch.allclose(Answering(made)(inputs), network(inputs, path), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("pooling", "unit"), [("mean", True), ("pooler", False)])
def test_an_encoder_without_a_head(pooling, unit):
    source = text.tiny("Bert", "Model")
    state = export_dense(read_text(source, pooling=pooling, unit=unit, length=20), source)
    assert all(torch.equal(value, state[key]) for key, value in source.state_dict().items())


def test_trained_weights_are_what_is_written():
    source = shaken(vision.tiny("vit_tiny_patch16_224"))
    network = read_vit(source)
    with torch.no_grad():
        network.head.project.weight.mul_(2)
    assert torch.equal(export_dense(network, source)["head.weight"], 2 * source.head.weight)


def _added(network, source):
    put(network, Choice("residual", "layerscale"))


def _merging(network, source):
    put(network, Choice("reducer", "tome"))
    return network.space.path(tokens=4)


def _heads(network, source):
    put(network, Choice("mixer", "head_prefix"))
    return network.space.path(heads=1)


def _keys(network, source):
    with torch.no_grad():
        network.blocks[1].mixer.qkv.bias[16:32] = 1


def _folded(network, source):
    from apportion.network import fold

    fold(network)


def _other(network, source):
    source.head = torch.nn.Linear(48, 3)


def _shared(network, source):
    network.blocks[1].mixer.permute(torch.tensor([2, 0, 1]))


@pytest.mark.parametrize(
    ("name", "change", "what"),
    [
        ("vit_tiny_patch16_224", _added, "residual1.scale, which a method added"),
        ("vit_tiny_patch16_224", _merging, "takes tokens away"),
        ("beit_base_patch16_224", _heads, "full heads"),
        ("eva02_tiny_patch14_224", _heads, "full heads"),
        ("eva02_tiny_patch14_224", _keys, "keys with a bias"),
        ("deit3_small_patch16_224", _folded, "folded away"),
        ("deit3_small_patch16_224", _other, "classes 3"),
        ("beit_large_patch16_384", _shared, "which blocks share"),
    ],
)
def test_what_the_class_cannot_hold_is_refused(name, change, what):
    source = shaken(vision.tiny(name, **vision.FAMILIES[name]))
    network = read_vit(source)
    path = change(network, source)
    with pytest.raises(Refused, match=what):
        export_dense(network, source, path)


def test_a_bias_of_keys_that_says_nothing_is_left_out():
    source = shaken(vision.tiny("beit_base_patch16_224"))
    network = read_vit(source)
    _keys(network, source)
    state = export_dense(network, source)
    assert all(torch.equal(value, state[key]) for key, value in source.state_dict().items())


def test_nothing_is_changed_and_a_wrong_path_is_refused():
    source = shaken(vision.tiny("vit_tiny_patch16_224"))
    network, before = read_vit(source), copy.deepcopy(source.state_dict())
    with pytest.raises(PathError):
        export_dense(network, source, replace(network.space.full, width=(7, 7, 7)))
    export_dense(network, source)
    assert all(torch.equal(value, before[key]) for key, value in source.state_dict().items())


def test_a_wrong_answer_is_caught(monkeypatch):
    from apportion.intake import export_dense as room

    source = shaken(vision.tiny("vit_tiny_patch16_224"))
    network = adapted(read_vit(source), vision.noise(read_vit(source)))
    plain = room._gathered
    monkeypatch.setattr(room, "_gathered", lambda *given: {name: value.flip(0) if "fc1" in name else value for name, value in plain(*given).items()})
    with pytest.raises(Refused, match="difference of"):
        export_dense(network, source, network.space.path(width=network.space.width[1]))
