"""Every family of timm models that is read equals its source; everything else is refused by name; a forgotten part does not pass."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from apportion.errors import DataError, PlanError, Refused
from apportion.intake import _torchvision
from apportion.intake.preprocess import Preprocess
from apportion.intake.read import read_model
from apportion.intake.verify import verify
from apportion.network import Network

_torchvision.ready()
timm = pytest.importorskip("timm")
from apportion.intake.timm_vit import describe, read_vit  # noqa: E402

TINY = {"embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 7}


def tiny(name, **options):
    torch.manual_seed(0)
    size = 28 if "patch14" in name else 64 if "patch32" in name else 32
    return timm.create_model(name, pretrained=False, **{"img_size": size, **TINY, **options}).eval()


def noise(network):
    side = network.architecture.image_size
    return torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(1))


FAMILIES = {
    "vit_tiny_patch16_224": {},
    "vit_base_patch32_224": {"qkv_bias": False},
    "vit_huge_patch14_224": {"qk_norm": True},
    "deit_tiny_patch16_224": {"num_classes": 0},
    "deit3_small_patch16_224": {},
    "vit_small_patch14_dinov2": {},
    "vit_small_patch14_reg4_dinov2": {},
    "vit_base_patch16_clip_224": {},
    "vit_base_patch16_clip_quickgelu_224": {},
    "vit_base_patch16_siglip_224": {},
    "vit_so400m_patch14_siglip_384": {},
    "vit_base_patch16_siglip_gap_224": {},
    "vit_medium_patch16_gap_240": {},
    "vit_mediumd_patch16_reg4_gap_256": {"act_layer": "gelu_tanh"},
    "test_vit3": {"img_size": 32},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_equals_its_source(name):
    source = tiny(name, **FAMILIES[name])
    network = read_vit(source)
    verified = verify(source, network, noise(network), reread=read_vit)
    assert verified.max_rel < 1e-5
    with torch.no_grad():
        wanted = source(noise(network))
        assert torch.allclose(network(noise(network), network.space.full), wanted, atol=1e-6, rtol=1e-5)


def test_what_the_families_look_like():
    deit3, clip, dino, siglip = (
        describe(tiny(name))
        for name in ("deit3_small_patch16_224", "vit_base_patch16_clip_quickgelu_224", "vit_small_patch14_reg4_dinov2", "vit_base_patch16_siglip_224")
    )
    assert deit3.layer_scale and not deit3.position_prefix and deit3.class_token
    assert clip.stem_norm and not clip.patch_bias and clip.eps == 1e-5 and clip.activation == "quick_gelu"
    assert dino.registers == 4 and dino.patch == 14 and dino.prefix == 5 and dino.layer_scale
    assert siglip.pool == "attention_pool" and siglip.prefix == 0


def forget(network, what):
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if what == "layer scale" and name.endswith(".scale"):
                parameter.fill_(1)
            if what == "biases" and name.endswith("ffn.down.bias"):
                parameter.zero_()
            if what == "class token" and name == "tokeniser.first":
                parameter.zero_()
            if what == "order of heads" and ".qkv." in name:
                rows = parameter.view(3, 3, 16, -1).clone()
                rows[:, :2] = rows[[1, 2, 0], :2]  # queries and keys of other heads than the values
                parameter.copy_(rows.view_as(parameter))
    return network


@pytest.mark.parametrize("what", ["layer scale", "biases", "class token", "order of heads"])
def test_a_forgotten_part_shows_when_shaken(what):
    source = tiny("deit3_small_patch16_224")
    with torch.no_grad():
        for block in source.blocks:
            block.ls1.gamma.fill_(1)
            block.ls2.gamma.fill_(1)
            block.mlp.fc2.bias.zero_()
        source.cls_token.zero_()
    network = read_vit(source)
    with pytest.raises(Refused, match=r"difference of .* with shaken weights"):
        verify(source, network, noise(network), reread=lambda model: forget(read_vit(model), what))
    if what != "order of heads":  # and without the shake it would have passed
        verify(source, forget(network, what), noise(network), reread=read_vit)


def test_a_nan_is_a_difference():
    source = tiny("vit_tiny_patch16_224")
    network = read_vit(source)
    with torch.no_grad():
        network.norm.bias[0] = float("nan")
    with pytest.raises(Refused, match="nan"):
        verify(source, network, noise(network), reread=read_vit)


REFUSED = {
    "deit_tiny_distilled_patch16_224": ({}, "VisionTransformerDistilled"),
    "naflexvit_base_patch16_gap": ({"img_size": None}, "NaFlexVit"),
    "vit_small_patch16_18x2_224": ({}, r"blocks\.0 of class .*ParallelThingsBlock"),
    "vit_pwee_patch16_reg1_gap_256": ({}, r"blocks\.0 of class .*ParallelScalingBlock"),
    "vit_base_patch16_rpn_224": ({}, r"blocks\.0 of class .*ResPostBlock"),
    "vit_giant_patch14_dinov2": ({}, r"blocks\.0\.mlp of class .*GluMlp"),
    "vit_dwee_patch16_reg1_gap_256": ({}, r"blocks\.0\.attn of class .*DiffAttention"),
    "vit_base_patch16_xp_224": ({}, r"norm_pre of class .*RmsNorm"),
    "vit_intern300m_patch14_448": ({}, "dynamic image size"),
    "vit_base_patch16_224": ({"global_pool": "avgmax"}, "avgmax"),
    "vit_base_patch8_224": ({"patch_drop_rate": 0.1}, r"patch_drop of class .*PatchDropout"),
    "vit_small_patch32_224": ({"scale_attn_norm": True, "img_size": 64}, r"blocks\.0\.attn\.norm"),
    "vit_large_patch16_224": ({"scale_mlp_norm": True}, r"blocks\.0\.mlp\.norm"),
    "vit_small_patch16_224": ({"pos_embed": "none"}, "no pos_embed"),
    "vit_small_patch8_224": ({"img_size": (32, 64)}, "squares"),
    "vit_medium_patch16_reg4_gap_256": ({"pool_include_prefix": True}, "includes class or register"),
    "vit_base_patch16_siglip_256": ({"class_token": True}, "leaves out class"),
    "vit_base_patch16_384": ({"proj_bias": False}, r"mlp\.fc1\.bias"),
    "vit_base_patch16_plus_240": ({"embed_norm_layer": "layernorm"}, r"patch_embed\.norm"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_exactly_is_named(name):
    options, what = REFUSED[name]
    source = tiny(name, **options) if options.get("img_size", 0) is not None else timm.create_model(name, **TINY)
    with pytest.raises(Refused, match=what):
        read_vit(source)


@pytest.mark.parametrize(
    ("name", "what"), [("beit_base_patch16_224", "Beit"), ("eva02_tiny_patch14_224", "Eva"), ("swin_tiny_patch4_window7_224", "Swin"), ("resnet18", "ResNet")]
)
def test_other_architectures_are_named(name, what):
    with torch.device("meta"):
        source = timm.create_model(name)
    with pytest.raises(Refused, match=what):
        read_vit(source)


def _hook(model):
    model.blocks[1].mlp.register_forward_hook(lambda module, args, out: out * 2)


def _replaced(model):
    model.blocks[0].forward = lambda x: x


def _foreign(model):
    model.blocks[2].attn.qkv = nn.Sequential(model.blocks[2].attn.qkv)


def _own_linear(model):
    model.blocks[0].mlp.fc1.__class__ = type("Quantised", (nn.Linear,), {})


def _eps(model):
    model.norm.eps = 1e-3


def _scale(model):
    model.blocks[1].attn.scale = 1.0


def _one_layer_scale(model):
    model.blocks[1].ls2 = nn.Identity()


def _first_layer_scale(model):
    model.blocks[0].ls1 = nn.Identity()


def _activation(model):
    model.blocks[1].mlp.act = nn.ReLU()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (_hook, r"hooks .* blocks\.1\.mlp"),
        (_replaced, r"replaced forward on blocks\.0"),
        (_foreign, r"no blocks\.2\.attn\.qkv"),
        (_own_linear, r"blocks\.0\.mlp\.fc1 of class .*Quantised"),
        (_eps, "eps 0.001 in norm"),
        (_scale, r"blocks\.1"),
        (_one_layer_scale, r"blocks\.1\.ls2"),
        (_first_layer_scale, r"blocks\.0\.ls2\.gamma, which has no place"),
        (_activation, r"blocks\.1\.mlp\.act"),
    ],
)
def test_a_changed_model_is_refused(change, what):
    model = tiny("deit3_small_patch16_224")
    change(model)
    with pytest.raises(Refused, match=what):
        read_vit(model)


def test_reading_copies_and_leaves_the_source_alone():
    source = tiny("vit_tiny_patch16_224").train()
    before = {name: value.clone() for name, value in source.state_dict().items()}
    network = read_model(source).network
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert source.training and all(torch.equal(value, before[name]) for name, value in source.state_dict().items())


def test_untrained_by_name():
    state = torch.get_rng_state()
    source = read_model("timm:vit_tiny_patch16_224", random=True, num_classes=7, image_size=32, seed=5)
    assert torch.equal(state, torch.get_rng_state())
    again = read_model("timm:vit_tiny_patch16_224", random=True, num_classes=7, image_size=32, seed=5)
    assert torch.equal(source.network.head.project.weight, again.network.head.project.weight)
    assert source.preprocess == Preprocess(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 0.9) and source.classes is None
    assert source.provenance["random"] is True and source.verified is not None and source.verified.max_rel < 1e-5


def test_weights_that_cannot_be_had(monkeypatch):
    def offline(*args, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(Refused, match=r"no route.*random=True"):
        read_model("timm:vit_tiny_patch16_224")
    with pytest.raises(Refused, match="vit_tiny_patch16_224"):
        read_model("timm:vit_tiny_patch16_2244")


def test_a_local_file(tmp_path):
    source = timm.create_model("test_vit3", num_classes=3)
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(Refused, match="timm_name"):
        read_model(tmp_path / "model.safetensors")
    read = read_model(tmp_path / "model.safetensors", timm_name="test_vit3")
    assert torch.equal(read.network.norm.weight, source.norm.weight) and read.preprocess.size == 160 and len(read.provenance["sha256"]) == 64
    config = {"architecture": "test_vit3", "label_names": ["a", "b", "c"], "pretrained_cfg": {"mean": [0.1] * 3, "std": [0.2] * 3}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = read_model(tmp_path)
    assert read.classes == ("a", "b", "c") and read.preprocess.mean == (0.1, 0.1, 0.1)
    with pytest.raises(Refused, match="does not fit"):
        read_model(tmp_path, timm_name="deit3_small_patch16_224")
    (tmp_path / "config.json").write_text(json.dumps(config | {"label_names": ["a"]}))
    with pytest.raises(DataError, match="1 class names for 3"):
        read_model(tmp_path)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(DataError, match="config"):
        read_model(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(DataError, match="whole"):
        read_model(tmp_path, timm_name="test_vit3")
    with pytest.raises(DataError, match=r"weights\.pth"):
        read_model(tmp_path / "weights.pth", timm_name="test_vit3")


def test_a_network_passes_through_with_its_preprocessing():
    network = Network(describe(tiny("vit_tiny_patch16_224")))
    how = Preprocess(32, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    assert read_model(network, preprocess=how).network is network
    with pytest.raises(PlanError, match="preprocess"):
        read_model(network)
    with pytest.raises(PlanError, match="random"):
        read_model(network, random=True, preprocess=how)
