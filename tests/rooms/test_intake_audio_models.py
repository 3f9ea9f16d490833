"""Every family of audio encoders that is read equals its source; everything else is refused by name."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn
from torch.testing import assert_close

from apportion.errors import PlanError, Refused
from apportion.intake import _torchvision
from apportion.intake.verify import verify
from apportion.methods import find, names
from apportion.methods.mixer.attention import bucket
from apportion.methods.tokeniser.frame import sinusoids
from apportion.network import Architecture, fold, put, sort_by_importance
from apportion.vocab import Choice, Tokens
from tests.conftest import PLAN, random_paths

_torchvision.ready()
transformers = pytest.importorskip("transformers")
from apportion.intake.hf_audio import Answering, describe, examples, hears, labels, read_audio  # noqa: E402
from apportion.intake.hf_audio_families import FAMILIES  # noqa: E402

SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "num_labels": 3, "initializer_range": 0.2}
CONVOLVED = {"conv_dim": [12, 16, 16], "conv_kernel": [10, 3, 2], "conv_stride": [5, 2, 2], "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4}
WAVE = {**SHAPE, **CONVOLVED, "classifier_proj_size": 20}
LARGE = {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True}
WAVLM = {"num_buckets": 16, "max_bucket_distance": 12}
FRAMES = {"max_source_positions": 20, "num_mel_bins": 8, "classifier_proj_size": 20, "vocab_size": 60, "max_target_positions": 20, "init_std": 0.2}
SPECIAL: dict[str, dict] = {
    "AST": {**SHAPE, "patch_size": 4, "frequency_stride": 3, "time_stride": 2, "max_length": 21, "num_mel_bins": 12, "qkv_bias": True},
    "Whisper": {
        **FRAMES,
        "d_model": 32,
        "encoder_layers": 3,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "num_labels": 3,
        "decoder_layers": 1,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 16,
        "decoder_start_token_id": 1,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "WavLM": {**WAVE, **WAVLM},
}
LENGTH = 640  # samples: 31 tokens
LENGTHS = {name: None if name in ("AST", "Whisper") else LENGTH for name in FAMILIES}


def tiny(name, kind=None, **options):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SPECIAL.get(name, WAVE), **options})
    return getattr(transformers, f"{name}{kind or FAMILIES[name].classifies}")(config).eval()


def compared(model, read=read_audio, **how):
    """The largest difference; `read` may be one that misreads."""
    given, network = {key: how[key] for key in ("pooling", "unit") if key in how}, read(model, **how)
    inputs = examples(network.architecture)
    return verify(Answering(model, **given), network, *inputs, reread=lambda made: read(made.model, **how), batches=(1, 3, 17)).max_abs


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_equals_its_source(name):
    assert compared(tiny(name), length=LENGTHS[name]) < 1e-5
    assert compared(tiny(name, "Model"), length=LENGTHS[name], pooling="mean", unit=True) < 1e-5


@pytest.mark.parametrize("name", ["Wav2Vec2", "Hubert", "WavLM"])
def test_large_ones_have_norms_elsewhere(name):
    assert compared(tiny(name, **LARGE), length=LENGTH) < 1e-5
    assert compared(tiny(name, "Model", **LARGE, hidden_act="relu", feat_extract_activation="gelu_new"), length=LENGTH, pooling="mean") < 1e-5


@pytest.mark.parametrize(
    ("name", "kind", "options", "how"),
    [
        ("AST", "Model", {}, {"pooling": "pooler"}),
        ("AST", "Model", {"qkv_bias": False}, {"pooling": "class_token"}),
        ("AST", None, {"frequency_stride": 4, "time_stride": 5, "hidden_act": "gelu_new"}, {"length": 21}),
        ("Whisper", None, {"activation_function": "relu"}, {"length": 40}),
        ("Hubert", "Model", {"feat_proj_layer_norm": False}, {"pooling": "mean", "length": 333}),
        ("Wav2Vec2", None, {"num_conv_pos_embeddings": 7, "conv_bias": True, "layer_norm_eps": 1e-3}, {"length": LENGTH}),
        ("Wav2Vec2", None, {"feat_extract_norm": "layer", "mask_time_prob": 0.0}, {"length": LENGTH}),
    ],
)
def test_other_flavours(name, kind, options, how):
    assert compared(tiny(name, kind, **options), **how) < 1e-5


def test_what_the_families_look_like():
    base, large, ast, whisper = (describe(tiny(*given[:1], **given[1])) for given in (("WavLM", {}), ("Hubert", LARGE), ("AST", {}), ("Whisper", {})))
    assert base.samples == 16_000 and base.input_shape == (16_000,) and base.tokens == 799 and base.relative_gate and base.stem_norm and not base.norm_first
    assert large.norm_first and large.final_norm and not large.stem_norm and large.wave_norm == "layer" and not large.relative_gate
    assert ast.input_shape == (21, 12) and ast.tokens == 2 + 3 * 9 and ast.prefix == 2 and ast.pool == "prefix_mean" and ast.head_norm
    assert whisper.input_shape == (8, 40) and whisper.tokens == 20 and whisper.head_width == 20 and whisper.pool == "mean" and whisper.grid == 0
    for a in (base, large, ast, whisper):  # as a bundle writes it
        assert TypeAdapter(Architecture).validate_json(json.dumps(asdict(a)), strict=True) == a
    published = describe(transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(num_hidden_layers=1, conv_dim=[8] * 7, hidden_size=48)), pooling="mean")
    assert published.tokens == 49


def test_buckets_and_sinusoids_are_those_of_the_source():
    from transformers.models.wavlm.modeling_wavlm import WavLMAttention
    from transformers.models.whisper.modeling_whisper import sinusoids as theirs

    distance = torch.arange(-4000, 4001)
    for buckets, end in ((320, 800), (16, 12), (32, 128)):
        assert torch.equal(bucket(distance, buckets, end), WavLMAttention(32, 4, num_buckets=buckets, max_distance=end)._relative_positions_bucket(distance))
    assert_close(sinusoids(1500, 384), theirs(1500, 384), rtol=0, atol=2e-4)  # 1500 radians in float32


@torch.no_grad()
def misread(what, network):
    first, tokeniser = network.blocks[0], network.tokeniser
    if what == "norm order":
        for block in network.blocks:
            block.norm_first = not block.norm_first
    elif what == "positions":
        (tokeniser.position if torch.is_tensor(tokeniser.position) else tokeniser.position.weight).zero_()
    elif what == "look ahead":
        tokeniser.position.weight.copy_(tokeniser.position.weight.roll(1, -1))
    elif what == "gate":
        network.blocks[1].mixer.gate.linear.weight.zero_()
    elif what == "scale of the gate":
        first.mixer.gate.scale.fill_(1)
    elif what == "table":
        network.blocks[2].mixer.relative.zero_()
    elif what == "order of heads":
        first.mixer.proj.permute(inp=torch.arange(32).roll(8))
    elif what == "norm over time":
        tokeniser.layers[0].norm = None
    elif what == "stem norm":
        tokeniser.norm = nn.Identity()
    elif what == "final norm":
        network.norm = nn.Identity()
    elif what == "second token":
        tokeniser.first[1] = tokeniser.first[0]
    else:
        network.head = find("head", "class_token")(norm=network.head.norm, project=network.head.project, macs_per_token=0, dim=32)
    return network


@pytest.mark.parametrize(
    ("name", "what"),
    [
        *(("Wav2Vec2", what) for what in ("norm order", "positions", "look ahead", "norm over time", "stem norm", "order of heads")),
        *(("WavLM", what) for what in ("gate", "scale of the gate", "table")),
        *(("AST", what) for what in ("norm order", "positions", "second token", "final norm", "one token")),
        *(("Whisper", what) for what in ("positions", "final norm")),
    ],
)
def test_a_forgotten_part_shows(name, what):
    with pytest.raises(Refused, match="difference"):
        compared(tiny(name), lambda made, **how: misread(what, read_audio(made, **how)), length=LENGTHS[name])


@pytest.mark.parametrize("name", ["WavLM", "AST", "Whisper"])
def test_every_path_runs_and_costs_what_is_said(name):
    from apportion.measure.macs import executed_macs

    source = tiny(name)
    for reducer in names("reducer"):
        if not find("reducer", reducer).reduces or (reducer == "evit" and name != "AST"):
            continue
        network = read_audio(source, length=LENGTHS[name])
        inputs = examples(network.architecture)[0][:2]
        for choice in (Choice("reducer", reducer), *PLAN[1:]):
            put(network, choice)
        assert_close(network(inputs, network.space.full), Answering(source)(inputs), rtol=1e-4, atol=1e-5)
        for path in random_paths(network, 3):
            notes = {}
            assert network(inputs, path, notes).isfinite().all()
            assert notes["origin"][-1].shape == (2, network.space.tokens) and notes["feature"][-1].shape[1] == path.tokens[-1]
            assert notes["origin"][-1].max() < path.tokens[-1] and (notes["size"][-1].sum(1) - network.space.tokens).abs().max() < 1e-3
            ran = executed_macs(lambda path=path, network=network, inputs=inputs: network(inputs[:1], path))
            assert abs(network.macs(path) - ran) <= 0.001 * ran, f"{path.name}: {network.macs(path)} in closed form, {ran} executed"


@pytest.mark.parametrize("name", ["WavLM", "Hubert", "AST", "Whisper"])
def test_it_can_be_cut_sorted_and_folded(name):
    source = tiny(name, **(LARGE if name == "WavLM" else {}))
    network = read_audio(source, length=LENGTHS[name])
    inputs = examples(network.architecture)[0][:2]
    wanted, path = Answering(source)(inputs).detach(), network.space.full
    middle = network.segment(0, 1, path)(network.tokeniser(inputs, path.patch))
    assert torch.equal(network.segment(1, 3, path)(middle), network(inputs, path)) and network.glance(1)(inputs)[1].isfinite().all()
    for choice in PLAN:
        put(network, choice)
    small = network.space.path(heads=2)
    before = network(inputs, small)
    sort_by_importance(network, [inputs])
    assert_close(network(inputs, path), wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(network(inputs, small), before, atol=1e-4)
    if name != "Hubert":  # norms after the sum are not folded
        fold(network)
        assert_close(network(inputs, path), wanted, rtol=1e-4, atol=1e-5)


def test_one_merged_token_moves_no_other():
    """By the definition: a bias by the distance of the first tokens that each stands for, gated, and the logarithm of sizes."""
    mixer = read_audio(tiny("WavLM"), length=LENGTH).requires_grad_(False).blocks[0].mixer
    mixer.gate.scale.copy_(torch.tensor([0.5, -1, 2, 3]))
    x, size = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([[1.0, 2, 1, 1, 1, 1]])
    where = torch.tensor([0, 1, 3, 4, 5, 6])
    for heads in (2, 4):
        query, key, value = mixer.qkv(x).view(6, 4, 3, 8).permute(2, 1, 0, 3)
        one, two = mixer.gate.linear(x).view(6, 4, 2).sigmoid().unbind(-1)
        open_ = one * (two * mixer.gate.scale - 1) + 2
        bias = mixer.relative[bucket(where[None] - where[:, None], 16, 12)].permute(2, 0, 1) * open_.T[..., None]
        weights = (query @ key.transpose(1, 2) / 8**0.5 + bias + size.log()).softmax(-1)
        wanted = (weights @ value)[:heads].transpose(0, 1).flatten(1) @ mixer.proj.weight[:, : 8 * heads].T + mixer.proj.bias
        got = mixer(Tokens(x, size, torch.tensor([[0, 1, 1, 2, 3, 4, 5]]), 0), heads).out[0]
        assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "kind", "options", "what"),
    [
        ("Wav2Vec2", None, {"use_weighted_layer_sum": True}, "use_weighted_layer_sum"),
        ("Whisper", None, {"use_weighted_layer_sum": True}, "use_weighted_layer_sum"),
        ("WavLM", None, {"problem_type": "multi_label_classification"}, "multi_label"),
        ("AST", None, {"num_labels": 1}, "1 output"),
        ("AST", None, {"hidden_act": "mish"}, "mish"),
        ("Hubert", None, {"conv_pos_batch_norm": True}, "conv_pos_batch_norm"),
        ("Wav2Vec2", "Model", {"add_adapter": True}, "add_adapter"),
        ("Wav2Vec2", None, {**LARGE, "adapter_attn_dim": 8}, "adapter_attn_dim 8"),
    ],
)
def test_what_cannot_be_read_exactly_is_named(name, kind, options, what):
    with pytest.raises(Refused, match=what):
        read_audio(tiny(name, kind, **options), **({} if kind is None else {"pooling": "mean"}))


@pytest.mark.parametrize(
    ("name", "kind", "what"),
    [
        ("Wav2Vec2", "ForCTC", "CTC"),
        ("WavLM", "ForXVector", "x-vectors"),
        ("UniSpeechSat", "ForAudioFrameClassification", "each frame"),
        ("Whisper", "ForConditionalGeneration", "a decoder"),
        ("Wav2Vec2Conformer", "ForSequenceClassification", "a convolution and two FFNs"),
        ("Wav2Vec2Bert", "ForSequenceClassification", "a convolution and two FFNs"),
        ("Data2VecAudio", "ForSequenceClassification", "a stack of convolutions"),
        ("SEW", "ForSequenceClassification", "pooled before the blocks"),
        ("ClapAudio", "Model", "no exact counterpart"),
    ],
)
def test_other_classes_are_named(name, kind, what):
    small = {"num_hidden_layers": 1, "encoder_layers": 1, "decoder_layers": 1}
    config = getattr(transformers, f"{name}Config")()
    for key in small.keys() & config.to_dict().keys():
        setattr(config, key, small[key])
    with torch.device("meta"):
        model = getattr(transformers, f"{name}{kind}")(config)
    assert hears(model)
    with pytest.raises(Refused, match=what):
        read_audio(model)


def test_changed_modules_and_wrong_options_are_refused():
    model = tiny("Wav2Vec2")
    model.wav2vec2.encoder.layers[0].attention.out_proj.__class__ = type("Quantised", (nn.Linear,), {})
    with pytest.raises(Refused, match=r"layers\.0\.attention\.out_proj of class .*Quantised"):
        read_audio(model)
    model = tiny("AST")
    model.audio_spectrogram_transformer.layers[1].register_parameter("scale", nn.Parameter(torch.ones(3)))
    with pytest.raises(Refused, match=r"layers\.1\.scale, which has no place"):
        read_audio(model)
    model = tiny("Whisper")
    model.encoder.layers[1].fc1.bias = None
    with pytest.raises(Refused, match=r"no encoder\.layers\.1\.fc1\.bias"):
        read_audio(model)
    model = tiny("Hubert")
    model.hubert.feature_extractor.conv_layers[0].layer_norm.eps = 1e-3
    with pytest.raises(Refused, match=r"eps 0\.001"):
        read_audio(model)
    for name, kind, how, what in (
        ("Wav2Vec2", "Model", {}, "pooling"),
        ("Wav2Vec2", "Model", {"pooling": "class_token"}, "pooling"),
        ("AST", None, {"pooling": "mean"}, "pooling"),
        ("AST", None, {"length": 20}, "21 frames"),
        ("Whisper", "Model", {"pooling": "mean", "length": 20}, "40 frames"),
        ("WavLM", None, {"length": 49}, "at least 50 samples"),
        ("WavLM", None, {"unit": True}, "unit"),
    ):
        with pytest.raises(PlanError, match=what):
            read_audio(tiny(name, kind, **({"max_length": 21} if name == "AST" else {})), **how)
    assert read_audio(tiny("WavLM"), length=50).space.tokens == 2


def test_names_of_classes_and_who_hears():
    model = tiny("AST", id2label={0: "dog", 1: "rain", 2: "bell"}, label2id={"dog": 0, "rain": 1, "bell": 2})
    assert labels(model) == ("dog", "rain", "bell") and labels(tiny("Whisper")) is None
    with torch.device("meta"):
        bert = transformers.BertModel(transformers.BertConfig(num_hidden_layers=1))
    assert hears(model) and not hears(bert) and not hears(nn.Linear(2, 2))
