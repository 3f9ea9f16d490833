"""Every family of text encoders that is read equals its source, with padding and without; everything else is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from apportion.errors import DataError, PlanError, Refused
from apportion.intake import _torchvision
from apportion.intake.read import read_model
from apportion.intake.texts import Tokenise
from apportion.intake.verify import verify
from apportion.methods import ops
from apportion.methods.mixer import disentangled
from apportion.methods.mixer.attention import bucket
from apportion.network import put
from apportion.vocab import Choice
from tests.conftest import PLAN

_torchvision.ready()
transformers = pytest.importorskip("transformers")
from apportion.intake import hf_text  # noqa: E402
from apportion.intake.hf_families import CLASSIFIES, FAMILIES, TAGS  # noqa: E402
from apportion.intake.hf_text import Answering, describe, examples, labels, read_text  # noqa: E402

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
SHAPE = {"vocab_size": 60, "max_position_embeddings": 60, "num_labels": 3, "initializer_range": 0.2}
DISTANCES = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "type_vocab_size": 0}
SPECIAL: dict[str, dict] = {
    "DistilBert": {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48},
    "Electra": {"embedding_size": 16},
    "NomicBert": {"head_dim": 8},
    "ModernBert": {"pad_token_id": 59, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 10},
    "Ernie": {"use_task_id": True, "task_type_vocab_size": 3},
    **{name: {"pad_token_id": 1, "type_vocab_size": 1} for name in ("Roberta", "XLMRoberta", "Camembert", "Data2VecText")},
    "MPNet": {"pad_token_id": 1},
    "Albert": {"embedding_size": 16},
    "Deberta": DISTANCES,
    "DebertaV2": {**DISTANCES, "position_buckets": 16, "share_att_key": True, "norm_rel_ebd": "layer_norm"},
}


def tiny(name, kind=CLASSIFIES, **options):
    torch.manual_seed(0)
    sizes = {} if name == "DistilBert" else SIZES
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, **sizes, "pad_token_id": 0, **SPECIAL.get(name, {}), **options})
    return getattr(transformers, f"{name}{kind}")(config).eval()


def compared(model, **how):
    network = read_text(model, **how)
    given = {key: how[key] for key in ("pooling", "unit") if key in how}
    return verify(Answering(model, **given), network, *examples(network.architecture), reread=lambda made: read_text(made.model, **how), batches=(1, 3, 17))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_equals_its_source(name):
    assert compared(tiny(name)).max_abs < 1e-5
    assert compared(tiny(name, "Model"), pooling="mean", unit=True).max_abs < 1e-5
    assert compared(tiny(name, TAGS)).max_abs < 1e-5


def test_the_configuration_says_what_outputs_mean():
    for options, task in (({"num_labels": 1}, "regression"), ({"problem_type": "multi_label_classification"}, "multilabel"), ({}, "classification")):
        assert describe(tiny("Bert", **options)).task == task
    assert describe(tiny("Bert", TAGS)).task == "token_classification" and describe(tiny("Bert", "Model"), pooling="mean").task == "embedding"
    assert read_model(tiny("Bert"), task="multilabel").network.architecture.task == "multilabel"
    assert read_model(tiny("Bert", num_labels=3), task="regression").network.architecture.task == "regression"
    for model, task in ((tiny("Bert"), "token_classification"), (tiny("Bert", TAGS), "classification")):
        with pytest.raises(PlanError, match="for this model"):
            read_model(model, task=task)


@pytest.mark.parametrize("name", ["Bert", "MPNet", "ModernBert", "Roberta"])
def test_other_heads_and_flavours(name):
    assert compared(tiny(name, "Model"), pooling="class_token", length=20).max_abs < 1e-5
    if name == "ModernBert":
        options = {"classifier_pooling": "mean", "norm_bias": True, "mlp_bias": True, "attention_bias": True, "classifier_bias": True}
        assert compared(tiny(name, **options, hidden_activation="silu")).max_abs < 1e-5
        layers = {"layer_types": ["full_attention"] * 3, "classifier_activation": "relu"}
        assert compared(tiny(name, **layers)).max_abs < 1e-5
    else:
        assert compared(tiny(name, "Model"), pooling="pooler").max_abs < 1e-5
        assert compared(tiny(name, hidden_act="gelu_new")).max_abs < 1e-5


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Albert", {"num_hidden_groups": 2, "inner_group_num": 2, "hidden_act": "gelu"}),
        ("Albert", {"num_hidden_layers": 5, "num_hidden_groups": 3}),
        ("Deberta", {"max_relative_positions": 12, "pos_att_type": "c2p", "pooler_hidden_act": "tanh"}),
        ("DebertaV2", {"share_att_key": False, "norm_rel_ebd": "none", "type_vocab_size": 2, "position_biased_input": True}),
        ("DebertaV2", {"position_buckets": -1, "max_relative_positions": 20, "pos_att_type": "p2c"}),
        ("DebertaV2", {"position_buckets": 9, "max_relative_positions": 40, "pos_att_type": "c2p", "pooler_hidden_act": "gelu_new"}),
    ],
)
def test_shared_blocks_and_scores_by_distance(name, options):
    assert compared(tiny(name, **options)).max_abs < 1e-5
    pooling = "pooler" if name == "Albert" else "class_token"
    assert compared(tiny(name, "Model", **options), pooling=pooling, length=20).max_abs < 1e-5


@pytest.mark.parametrize("name", ["Albert", "Deberta", "DebertaV2"])
def test_merging_tokens_leaves_each_text_its_own_answer(name):
    source = tiny(name, max_position_embeddings=24)
    network = read_text(source)
    put(network, Choice("reducer", "tome"))
    made = Answering(source)
    verify(made, network, *examples(network.architecture), reread=lambda made: read_text(made.model), batches=(1, 3, 17))
    path, ids = network.space.path(tokens=(18, 14, 9)), examples(network.architecture)[1]
    alone = torch.cat([network(row[row != 0][None], path) for row in ids])
    assert torch.allclose(network(ids, path), alone, atol=1e-5)
    assert torch.allclose(network(ids.flip(0), path).flip(0), alone, atol=1e-5)
    assert not torch.allclose(network(ids, network.space.full), alone, atol=1e-2)


def test_a_place_is_counted_without_the_padding(monkeypatch):
    network = read_text(tiny("DebertaV2"))
    ids = torch.tensor([[5, 0, 0, 7, 9, 0, 11]])
    alone = network(ids[ids != 0][None], network.space.full)
    assert torch.allclose(network(ids, network.space.full), alone, atol=1e-5)
    monkeypatch.setattr(ops, "positions", lambda tokens: tokens.origin[:, :-1].argsort())
    assert not torch.allclose(network(ids, network.space.full), alone, atol=1e-3), "the places of a padded text"


def test_what_the_families_look_like():
    bert, roberta, electra, modern = (describe(tiny(name)) for name in ("Bert", "Roberta", "Electra", "ModernBert"))
    assert bert.position_offset == 0 and bert.token_types == 2 and bert.prefix == 1 and bert.length == 60
    assert roberta.position_offset == 2 and roberta.length == 58
    assert electra.embedding == 16 and electra.head_hidden == "gelu"
    assert modern.window == 5 and modern.global_every == 3 and modern.gated and modern.rotary == 160_000 and modern.rotary_local == 10_000
    assert describe(tiny("Bert", "Model"), pooling="mean").prefix == 0
    albert, first, second = describe(tiny("Albert", inner_group_num=2)), describe(tiny("Deberta")), describe(tiny("DebertaV2"))
    assert albert.depth == 6 and albert.embedding == 16 and albert.activation == "gelu_tanh" and albert.head_hidden == "tanh"
    assert (first.relative_buckets, first.relative_range, first.positions, first.token_types) == (120, 0, 0, 0) and first.head_hidden == "gelu"
    assert (second.relative_buckets, second.relative_range) == (32, 60) and second.content_to_position and second.position_to_content


def test_buckets_are_those_of_the_source():
    from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

    distance = torch.arange(-600, 601)
    assert torch.equal(bucket(distance, 32), MPNetEncoder.relative_position_bucket(distance))


@pytest.mark.parametrize(("side", "end"), [(256, 512), (16, 60), (9, 40), (32, 128), (2, 30), (3, 512)])
def test_buckets_of_distances_are_those_of_the_source(side, end):
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

    distance = torch.arange(1 - end, end)
    assert torch.equal(disentangled.bucket(distance, 2 * side, end), make_log_bucket_position(distance, side, end).long().clamp(-side, side - 1))


BY_DISTANCE = ["content to position", "position to content", "bucket", "sign"]


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("what", ["positions", "last position", "token types", "window", "order of heads", "padding", "order of groups", *BY_DISTANCE])
def test_a_forgotten_part_shows(what, large, monkeypatch):
    """Also on the fewer and shorter texts that a large model is compared on, and where only the shaken copy is misread."""
    monkeypatch.setattr(hf_text, "LARGE", 0 if large else hf_text.LARGE)
    name = {"window": "ModernBert", "order of groups": "Albert", **dict.fromkeys(BY_DISTANCE, "DebertaV2")}.get(what, "Bert")
    source = tiny(name, **({"num_hidden_groups": 2} if name == "Albert" else {}))

    def forgetful(made):
        network = read_text(made.model)
        with torch.no_grad():
            if what == "positions":
                network.tokeniser.offset = 1
            elif what == "last position":
                network.tokeniser.position[network.architecture.length - 1].neg_()
            elif what == "token types":
                network.tokeniser.kind[1] = network.tokeniser.kind[0]
            elif what == "window":
                network.blocks[1].mixer.window += 1
            elif what == "padding":
                network.tokeniser.padding = -1
            elif what == "order of groups":
                network.blocks = nn.ModuleList(reversed(network.blocks))
            elif what in BY_DISTANCE:
                mixer = network.blocks[1].mixer
                if what == "bucket":
                    mixer.relative_range += 4
                elif what == "sign":
                    mixer.position_query.copy_(mixer.position_query.flip(-1))
                else:
                    (mixer.position_key if what == "content to position" else mixer.position_query).zero_()
            else:
                network.blocks[0].mixer.proj.permute(inp=torch.arange(32).roll(8))
        return network

    made = Answering(source)
    far = what == "last position" or (what == "window" and large) or what == "bucket"  # shows on the longest text, which only the shaken copy answers
    for network, when in ((forgetful(made), "" if far else "as it is"), (read_text(source), "with shaken weights")):
        with pytest.raises(Refused, match=f"difference.*{when}"):
            verify(made, network, *examples(describe(source)), reread=forgetful, batches=(1, 3, 17))


def test_texts_for_a_large_model(monkeypatch):
    a = describe(tiny("Bert"))
    monkeypatch.setattr(hf_text, "LARGE", 0)
    whole, cut, one, longest, pairs = examples(a)
    assert [tuple(each.shape) for each in (whole, cut, one, longest, pairs)] == [(3, 8), (17, 8), (1, 8), (1, 60), (3, 2, 8)]
    assert torch.equal(one, cut[:1]) and torch.equal(pairs[:, 0], cut[:3]) and [len(each) for each in examples(replace(a, token_types=0))][-1] == 3
    assert not (whole == 0).any() and not (longest == 0).any() and (pairs[:, 0] == 0).any() and pairs[:, 1].unique().tolist() == [0, 1]
    assert len((cut != 0).sum(1).unique()) > 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_source_is_looked_at_and_left_alone(dtype):
    source = tiny("Bert").to(dtype).train()
    before = {name: value.clone() for name, value in source.state_dict().items()}
    network = read_text(source)
    reread = []
    verify(Answering(source), network, *examples(network.architecture), reread=lambda made: reread.append(read_text(made.model, own=False)) or reread[0])
    assert source.training and all(parameter.requires_grad and parameter.dtype == dtype for parameter in source.parameters())
    assert all(torch.equal(value, before[name]) for name, value in source.state_dict().items())
    given = {value.untyped_storage().data_ptr() for value in source.state_dict().values()}
    kept, looked = ({name for name, value in of.state_dict().items() if value.untyped_storage().data_ptr() in given} for of in (network, reread[0]))
    matrices = {name for name, value in network.state_dict().items() if value.ndim > 1 and "qkv" not in name and len(value) > 1}
    assert not kept and looked == (matrices if dtype is torch.float32 else set())


@pytest.mark.parametrize(
    ("name", "options", "what"),
    [
        ("Bert", {"is_decoder": True}, "is_decoder"),
        ("Bert", {"hidden_act": "mish"}, "mish"),
        ("MPNet", {"pad_token_id": 2}, "pad_token_id 2"),
        ("ModernBert", {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}, "layer_types"),
        ("Bert", {"position_embedding_type": "relative_key"}, "relative_key"),
        ("Albert", {"embedding_size": 32}, "embedding_hidden_mapping_in"),
        ("Deberta", {"talking_head": True}, "head_logits_proj"),
        ("Deberta", {"relative_attention": False}, "relative_attention False"),
        ("DebertaV2", {"pos_att_type": None}, r"of \[\]"),
        ("DebertaV2", {"pos_att_type": ["c2p", "p2p"]}, "p2p"),
        ("DebertaV2", {"conv_kernel_size": 3}, "conv_kernel_size 3"),
        ("DebertaV2", {"embedding_size": 16}, "embedding_size 16"),
        ("DebertaV2", {"attention_head_size": 16}, "attention_head_size 16"),
        ("DebertaV2", {"position_buckets": 1}, "position_buckets 1"),
    ],
)
def test_what_cannot_be_read_exactly_is_named(name, options, what):
    with pytest.raises(Refused, match=what):
        read_text(tiny(name, **options))


@pytest.mark.parametrize(
    ("name", "kind", "what"),
    [
        ("Roberta", "ForMaskedLM", "language-model"),
        ("DebertaV2", "ForQuestionAnswering", "a beginning and an end"),
        ("MegatronBert", CLASSIFIES, "MegatronBert"),
    ],
)
def test_other_classes_are_named(name, kind, what):
    with torch.device("meta"):
        model = getattr(transformers, f"{name}{kind}")(getattr(transformers, f"{name}Config")(num_hidden_layers=1))
    with pytest.raises(Refused, match=what):
        read_model(model)


def test_changed_modules_are_refused():
    model = tiny("Bert")
    model.bert.encoder.layer[0].output.dense.__class__ = type("Quantised", (nn.Linear,), {})
    with pytest.raises(Refused, match=r"layer\.0\.output\.dense of class .*Quantised"):
        read_text(model)
    model = tiny("Bert")
    model.bert.encoder.layer[1].register_parameter("scale", nn.Parameter(torch.ones(3)))
    with pytest.raises(Refused, match=r"layer\.1\.scale, which has no place"):
        read_text(model)
    with pytest.raises(PlanError, match="pooling"):
        read_text(tiny("Bert", "Model"))
    with pytest.raises(Refused, match=r"no pooler\.dense"):
        read_text(tiny("DebertaV2", "Model"), pooling="pooler")
    with pytest.raises(PlanError, match="pooling"):
        read_text(tiny("Bert"), pooling="mean")
    with pytest.raises(PlanError, match="length 61"):
        read_text(tiny("Bert"), length=61)
    with pytest.raises(PlanError, match="images"):
        read_model("timm:vit_tiny_patch16_224", length=8)


def words(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"the a good bad film is was not".split()]
    tokenizer = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["[PAD]", "[CLS]", "[SEP]"])
    pair = "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1"
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair=pair, special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.save(str(folder / "tokenizer.json"))


def test_a_folder(tmp_path):
    model = tiny("Bert", id2label={0: "bad", 1: "so", 2: "good"}, label2id={"bad": 0, "so": 1, "good": 2})
    model.save_pretrained(tmp_path)
    words(tmp_path)
    read = read_model(tmp_path, length=40)
    assert read.classes == ("bad", "so", "good") == labels(model) and read.network.architecture.length == 40
    assert read.verified is not None and read.verified.max_abs < 1e-5 and len(read.provenance["sha256"]) == 64
    inputs = read.tokenise(["the film is good", "bad"])
    assert inputs.tolist() == [[2, 4, 8, 9, 6, 3], [2, 7, 3, 0, 0, 0]]
    assert torch.allclose(read.network(inputs, read.network.space.full), Answering(model)(inputs), atol=1e-6)
    with pytest.raises(PlanError, match="reads texts"):
        _ = read.preprocess


def test_a_folder_of_sentence_transformers(tmp_path):
    model = tiny("MPNet", "Model")
    model.save_pretrained(tmp_path)
    with pytest.raises(PlanError, match="pooling"):
        read_model(tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}))
    kinds = [
        {"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in (("", "Transformer"), ("1_Pooling", "Pooling"), ("2", "Normalize"))
    ]
    (tmp_path / "modules.json").write_text(json.dumps(kinds))
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 30, "do_lower_case": False}))
    read = read_model(tmp_path)
    a = read.network.architecture
    assert (a.pool, a.head_unit, a.length, a.classes, a.prefix) == ("mean", True, 30, 0, 0) and read.classes is None
    with pytest.raises(PlanError, match="tokenizer"):
        _ = read.tokenise
    (tmp_path / "modules.json").write_text(json.dumps([*kinds, {"path": "3_Dense", "type": "sentence_transformers.models.Dense"}]))
    with pytest.raises(Refused, match="Dense"):
        read_model(tmp_path)


def test_folders_that_are_not_understood(tmp_path):
    tiny("Bert").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    for change, what in (
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
        ({"gating": True}, "gating"),
        ({"architectures": ["MegatronBertModel"]}, "MegatronBertModel"),
        ({"num_hidden_layers": 4}, r"missing bert\.encoder\.layer\.3"),
        ({"num_hidden_layers": 2}, r"unexpected bert\.encoder\.layer\.2"),
        ({"position_embedding_type": "relative_key"}, "relative_key"),
    ):
        file.write_text(json.dumps(config | change))
        with pytest.raises(Refused, match=what):
            read_model(tmp_path)
    file.write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(Refused, match="cannot load"):
        read_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"model\.safetensors"):
        read_model(tmp_path)
    with pytest.raises(Refused, match="full commit"):
        read_model("hf:some/model")


def test_a_model_in_hand_with_a_tokenizer(tmp_path):
    words(tmp_path)
    feed = Tokenise.from_file(tmp_path / "tokenizer.json", length=20, padding=0, pairs=True)
    read = read_model(tiny("Bert"), preprocess=feed, length=20)
    pair = read.tokenise([("the film", "good"), ("a film is bad", "not bad")])
    assert pair.shape == (2, 2, 9) and read.network(pair, read.network.space.full).shape == (2, 3)
    for choice in PLAN:
        put(read.network, choice)
    path = read.network.space.path(tokens=(11, 11, 6), heads=2, width=24)
    alone = torch.cat([read.network(feed([text]), path) for text in (("the film", "good"), ("a film is bad", "not bad"))])
    assert torch.allclose(read.network(pair, path), alone, atol=1e-5)
