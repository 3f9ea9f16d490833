"""Every family of timm models that is read equals its source; everything else is refused by name; a forgotten part does not pass."""

from __future__ import annotations

import copy
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
from apportion.measure.macs import executed_macs
from apportion.network import Network, fold, put, sort_by_importance
from bench import models
from tests.conftest import PLAN, random_paths

_torchvision.ready()
timm = pytest.importorskip("timm")
from apportion.intake.timm_vit import describe, read_vit, resized  # noqa: E402

TINY = {"embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 7}


def tiny(name, **options):
    torch.manual_seed(0)
    size = 28 if "patch14" in name else 64 if "patch32" in name else 32
    return timm.create_model(name, pretrained=False, **{"img_size": size, **TINY, **options}).eval()


def noise(network, batch=3):
    side = network.architecture.image_size
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


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
    "deit_tiny_distilled_patch16_224": {},
    "vit_base_patch16_rpn_224": {},
    "vit_giant_patch14_dinov2": {},
    "vit_giant_patch14_reg4_dinov2": {},
    "vit_intern300m_patch14_448": {},
    "vit_so150m_patch16_reg4_gap_256": {},
    "vit_small_patch32_224": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "vit_small_patch16_224": {"pos_embed": "none"},
    "vit_base_patch16_384": {"proj_bias": False},
    "beit_base_patch16_224": {},
    "beitv2_large_patch16_224": {"use_abs_pos_emb": True, "scale_mlp": True, "global_pool": "token"},
    "beit_large_patch16_384": {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True, "swiglu_mlp": True, "qkv_bias": False},
    "eva_giant_patch14_224": {},
    "eva02_tiny_patch14_224": {},
    "eva02_base_patch14_224": {},
    "eva02_base_patch16_clip_224": {},
    "eva02_enormous_patch14_clip_224": {},
    "vit_medium_patch16_rope_reg1_gap_256": {},
    "vit_small_patch16_rope_224": {"qk_norm": True},
    "vit_small_patch16_rope_ape_224": {},
    "vit_pe_core_tiny_patch16_384": {"attn_pool_num_heads": 4, "attn_pool_mlp_ratio": 3.0},
    "vit_pe_lang_large_patch14_448": {},
    "vit_small_patch16_dinov3": {},
    "vit_small_plus_patch16_dinov3_qkvb": {"global_pool": "token"},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_equals_its_source(name):
    source = tiny(name, **FAMILIES[name])
    network = read_vit(source)
    verified = verify(source, network, noise(network, 17), reread=read_vit, batches=(1, 3, 17))
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
    distilled, beit, eva02, dinov3, pe = (
        describe(tiny(name, **FAMILIES[name]))
        for name in (
            "deit_tiny_distilled_patch16_224",
            "beit_base_patch16_224",
            "eva02_base_patch16_clip_224",
            "vit_small_plus_patch16_dinov3_qkvb",
            "vit_pe_core_tiny_patch16_384",
        )
    )
    assert distilled.pool == "distilled" and distilled.prefix == 2 and distilled.position_prefix
    assert beit.relative_buckets == 12 and not beit.learned_positions and beit.layer_scale and beit.qkv_bias
    assert eva02.gated and eva02.mixer_norm and eva02.ffn_norm and eva02.rotary == 10_000 and eva02.rotary_step == 8
    assert dinov3.rotary == 100 and dinov3.rotary_start == -dinov3.rotary_step / 2 and dinov3.activation == "silu" and not dinov3.learned_positions
    assert pe.pool_heads == 4 and pe.pool_hidden == 144 and pe.rotary_start == 12


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


def misread(network, what):
    with torch.no_grad():
        for block in network.blocks:
            if what == "start":
                block.mixer.start += 1.0
            elif what == "rows and columns":
                block.mixer.qkv.weight.copy_(_swapped(block.mixer.qkv.weight))
            elif what == "table":
                block.mixer.relative[:9].copy_(block.mixer.relative[:9].view(3, 3, -1).transpose(0, 1).flatten(0, 1))
            elif what == "prefix":
                block.mixer.relative[-1] = block.mixer.relative[-2]
            elif what == "inner norm":
                block.mixer.norm = None
            elif what == "norm on the branch":
                block.norm_branch = False
            elif what == "gate":
                block.ffn.up, block.ffn.gate = block.ffn.gate, block.ffn.up
        if what == "second head":
            network.head.project_distilled = network.head.project
    return network


def _swapped(weight):
    """Queries and keys with the halves for rows and for columns exchanged."""
    rows = weight.view(3, 3, 2, 2, 4, -1).clone()
    rows[:, :2] = rows[:, :2].flip(3)
    return rows.view_as(weight)


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("start", "vit_small_patch16_dinov3"),
        ("start", "vit_pe_core_tiny_patch16_384"),
        ("rows and columns", "vit_small_patch16_rope_224"),
        ("rows and columns", "eva02_tiny_patch14_224"),
        ("table", "beit_base_patch16_224"),
        ("prefix", "beit_base_patch16_224"),
        ("inner norm", "eva02_base_patch16_clip_224"),
        ("norm on the branch", "vit_base_patch16_rpn_224"),
        ("gate", "vit_giant_patch14_dinov2"),
        ("second head", "deit_tiny_distilled_patch16_224"),
    ],
)
def test_a_part_that_was_misread_shows(what, name):
    options = {"attn_pool_num_heads": 4} if "pe_core" in name else {}
    source = tiny(name, **options)
    network = read_vit(source)
    with pytest.raises(Refused, match="difference of"):
        verify(source, network, noise(network), reread=lambda model: misread(read_vit(model), what))


@pytest.mark.parametrize(
    "name", ["deit_tiny_distilled_patch16_224", "vit_small_patch14_reg4_dinov2", "beit_base_patch16_224", "eva02_tiny_patch14_224", "vit_small_patch16_dinov3"]
)
def test_another_image_size(name):
    source = tiny(name)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.normal_(std=0.3)
    made = resized(source, 3 * source.patch_embed.patch_size[0])
    network = read_vit(made)
    assert network.architecture.grid == 3 and read_vit(source).architecture.grid == 2
    verify(made, network, noise(network), reread=read_vit)
    again = read_vit(resized(source, 2 * source.patch_embed.patch_size[0]))
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in read_vit(source).state_dict().items())
    with pytest.raises(Refused, match="image size 33"):
        resized(source, 33)


def test_positions_are_resampled_smoothly():
    """A plane of positions stays one: corners move by less than the antialiased edge, the middle not at all."""
    source = tiny("vit_tiny_patch16_224", img_size=128)
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 8), torch.linspace(-1, 1, 8), indexing="ij")
    with torch.no_grad():
        source.pos_embed[0, 1:, 0], source.pos_embed[0, 1:, 1] = rows.flatten(), columns.flatten()
    position = read_vit(resized(source, 256)).tokeniser.position
    assert torch.equal(position[0], read_vit(source).tokeniser.position[0]) and len(position) == 257
    made = position[1:].view(16, 16, -1)
    assert torch.allclose(made[:, 3:13, 0].diff(dim=0)[4:10], torch.tensor(1 / 7), atol=0.02)
    assert torch.allclose(made[..., 1], made[..., 0].T, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "deit_tiny_distilled_patch16_224",
        "beit_base_patch16_224",
        "eva02_base_patch16_clip_224",
        "vit_small_plus_patch16_dinov3",
        "vit_base_patch16_rpn_224",
        "vit_pe_core_tiny_patch16_384",
    ],
)
def test_what_was_read_adapts(name):
    source = tiny(name, img_size=64, **({"attn_pool_num_heads": 4} if "pe_core" in name else {}))
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.normal_(std=0.2)
    network = read_vit(source).double().requires_grad_(False)
    inputs = noise(network).double()
    wanted = network(inputs, network.space.full)
    for choice in PLAN:
        put(network, choice)
    sort_by_importance(network, [inputs])
    folded = copy.deepcopy(network)
    fold(folded)
    assert torch.allclose(network(inputs, network.space.full), wanted, atol=1e-9)
    for path in random_paths(network, 4):
        together = network(inputs, path)
        assert torch.allclose(together, torch.cat([network(one[None], path) for one in inputs]), atol=1e-9)
        assert torch.allclose(folded(inputs, path), together, atol=1e-9)
        assert executed_macs(lambda path=path: network.at(path)(inputs[:1])) == network.macs(path)


def test_a_table_of_biases_is_resampled_smoothly():
    source = tiny("beit_base_patch16_224", img_size=64)
    with torch.no_grad():
        for block in source.blocks:
            table = block.attn.relative_position_bias_table
            table[:49] = torch.arange(7.0).repeat_interleave(7)[:, None]
            table[49:] = torch.tensor([20.0, 30, 40])[:, None]
    table = read_vit(resized(source, 96)).blocks[1].mixer.relative
    made = table[:121, 0].view(11, 11)
    assert torch.allclose(table[121:, 0], torch.tensor([20.0, 30, 40])) and torch.allclose(made, made[:, :1].expand(11, 11), atol=1e-4)
    assert (made[:, 0].diff() > 0).all() and torch.allclose(made[5, 0], torch.tensor(3.0), atol=1e-4)


def test_a_nan_is_a_difference():
    source = tiny("vit_tiny_patch16_224")
    network = read_vit(source)
    with torch.no_grad():
        network.norm.bias[0] = float("nan")
    with pytest.raises(Refused, match="nan"):
        verify(source, network, noise(network), reread=read_vit)


REFUSED = {
    "vit_small_patch16_18x2_224": ({}, r"blocks\.0 of class .*ParallelThingsBlock"),
    "vit_pwee_patch16_reg1_gap_256": ({}, r"blocks\.0 of class .*ParallelScalingBlock"),
    "vit_dwee_patch16_reg1_gap_256": ({}, r"blocks\.0\.attn of class .*DiffAttention"),
    "vit_base_patch16_xp_224": ({}, r"norm_pre of class .*RmsNorm"),
    "vit_base_patch16_224": ({"global_pool": "avgmax"}, "avgmax"),
    "vit_base_patch8_224": ({"patch_drop_rate": 0.1}, r"patch_drop of class .*PatchDropout"),
    "vit_small_patch8_224": ({"img_size": (32, 64)}, "squares"),
    "vit_medium_patch16_reg4_gap_256": ({"pool_include_prefix": True}, "includes class or register"),
    "vit_base_patch16_siglip_256": ({"class_token": True}, "leaves out class"),
    "vit_base_patch16_plus_240": ({"embed_norm_layer": "layernorm"}, r"patch_embed\.norm"),
    "vit_large_patch16_224": ({"embed_dim": 42, "num_heads": 3, "dynamic_img_size": True, "dynamic_img_pad": True}, "pads images"),
    "naflexvit_base_patch16_gap": ({"img_size": None}, "NaFlexVit: images of any shape"),
    "vit_so150m_patch16_reg4_map_256": ({}, "leaves out class"),
    "vit_small_patch16_rope_mixed_224": ({}, r"rope of class .*RotaryEmbeddingMixed"),
    "vit_base_patch16_sapiens2": ({"num_kv_heads": 1}, r"blocks\.0\.norm1 of class .*RmsNorm"),
    "vit_base_patch16_rope_224": ({"num_kv_heads": 1, "qkv_fused": False}, r"blocks\.0\.attn whose heads share keys"),
    "vit_base_patch16_dinov3": ({"attn_only_layer_scale": True}, r"no blocks\.0\.ls2"),
    "vit_large_patch16_dinov3": ({"embed_dim": 42, "num_heads": 3}, "in fours"),
    "beit_base_patch16_384": ({"use_shared_rel_pos_bias": True}, r"blocks\.0\.attn\.relative_position_bias_table, which has no place"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_exactly_is_named(name):
    options, what = REFUSED[name]
    source = tiny(name, **options) if options.get("img_size", 0) is not None else timm.create_model(name, **TINY)
    with pytest.raises(Refused, match=what):
        read_vit(source)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("swin_tiny_patch4_window7_224", "Swin.*windows that shift"),
        ("vit_relpos_small_patch16_224", "RelPos.*bias"),
        ("vit_base_r50_s16_224", r"patch_embed of class .*HybridEmbed"),
        ("resnet18", "ResNet"),
    ],
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


def _gate(model):
    model.blocks[1].attn.gate = nn.Linear(48, 48)


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
        (_gate, r"blocks\.1\.attn\.gate"),
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


def test_trained_weights_at_another_size():
    model = timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=5)
    source = read_model(model, image_size=48, preprocess=Preprocess(48, (0.5,) * 3, (0.5,) * 3))
    assert source.network.architecture.tokens == 37 and source.provenance["image_size"] == 48 and source.verified is not None
    assert model.patch_embed.img_size == (32, 32)
    with pytest.raises(PlanError, match="image_size 48"):
        read_model(source.network, image_size=48, preprocess=source.preprocess)


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


PAGE = models.PAGE.read_text()
SAMPLE = ("vit_base_patch16_clip_224", "beitv2_base_patch16_224", "eva02_base_patch14_448", "vit_base_patch16_dinov3_qkvb", "cait_xxs24_224", "test_vit4")


def said(row):
    """The line of the page that this row would make, without its figure."""
    return f"| `{row.name}` | {row.kind} | " + ("read | " if row.read else f"refused | {row.found} |")


@pytest.mark.slow
def test_the_page_of_models_says_what_is_so():
    assert len(models.TIMM) >= 40 and PAGE.count("| read |") >= 75
    assert all(f"| `{name}` |" in PAGE for name in models.TIMM)
    for name in SAMPLE:
        assert said(models.timm_row(name)) in PAGE
    for name, *how in (("Bert", "ForSequenceClassification"), ("MPNet", "Model", "class_token"), ("Albert", "ForSequenceClassification")):
        row = models.text_row(name, *how)
        assert said(row) in PAGE and row.read
