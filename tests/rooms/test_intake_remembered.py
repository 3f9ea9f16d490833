"""What a reading remembers: found again by everything that the test hangs on, by nothing else, and never in silence."""

from __future__ import annotations

import shutil
import sys

import pytest
import torch

from apportion.errors import DataError, NoEffect, Refused
from apportion.intake import _torchvision, read_model
from apportion.intake.preprocess import Preprocess

_torchvision.ready()

timm, transformers = pytest.importorskip("timm"), pytest.importorskip("transformers")
from transformers.models.bert import modeling_bert  # noqa: E402

from apportion.intake import hf_text, proof, remembered  # noqa: E402
from apportion.intake.hf_text import Answering, describe  # noqa: E402

SHAPE = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 20}


def bert(kind="BertForSequenceClassification", *, seed=0, **options):
    torch.manual_seed(seed)
    return getattr(transformers, kind)(transformers.BertConfig(**{**SHAPE, **options})).eval()


def vit(seed=0, **options):
    torch.manual_seed(seed)
    return timm.create_model("vit_tiny_patch16_224", **{"img_size": 32, "embed_dim": 24, "depth": 2, **options}).eval()


def key(model, pooling=None, **how):
    return remembered.key(Answering(model, pooling), describe(model, pooling=pooling, **how))


def test_a_second_reading_finds_what_the_first_one_kept(tmp_path, monkeypatch):
    folder, cache = tmp_path / "model", tmp_path / "cache"
    bert().save_pretrained(folder)
    first = read_model(folder, cache=cache)
    assert first.provenance["equality_found_in"] is None and "tested now" in first.equality and len(list(cache.iterdir())) == 1
    monkeypatch.setattr(proof, "when_shaken", None)
    bert(seed=1, id2label={0: "no", 1: "yes"}).save_pretrained(tmp_path / "other")  # other weights, labels and folder
    for place in (folder, tmp_path / "other"):
        again = read_model(place, cache=cache)
        assert again.provenance["equality_found_in"] == str(cache) and str(cache) in again.equality
        assert again.provenance["equality_tested_on"] == first.provenance["equality_tested_on"]
        assert again.verified is not None and again.verified.max_abs < 1e-5
    with pytest.raises(TypeError):  # not called where there is no cache: then it would have been tested
        read_model(folder)


def test_images_are_remembered_too(tmp_path, monkeypatch):
    given = {"preprocess": Preprocess(32, (0.5,) * 3, (0.5,) * 3), "cache": tmp_path}
    assert read_model(vit(), **given).provenance["equality_found_in"] is None
    assert read_model(vit(seed=1), **given).provenance["equality_found_in"] == str(tmp_path)
    for changed in (vit(depth=1), vit(global_pool="avg"), vit(img_size=48), vit(qkv_bias=False)):
        assert read_model(changed, **given).provenance["equality_found_in"] is None


@pytest.mark.parametrize(
    "options",
    [
        {"layer_norm_eps": 1e-6},
        {"hidden_act": "relu"},
        {"num_attention_heads": 4},
        {"pad_token_id": 1},
        {"attn_implementation": "eager"},
        {"hidden_dropout_prob": 0.2},
    ],
)
def test_another_configuration_is_another_model(options):
    assert key(bert()) == key(bert(seed=1)) == key(bert(name_or_path="elsewhere"))
    assert key(bert(**options)) != key(bert())


def test_another_module_is_another_model():
    plain, changed = key(bert()), [bert() for _ in range(5)]
    changed[0].bert.encoder.layer[1].output.LayerNorm.eps = 1e-3
    changed[1].bert.encoder.layer[1].intermediate.intermediate_act_fn = torch.nn.ReLU()
    changed[2].bert.embeddings.position_ids = changed[2].bert.embeddings.position_ids.flip(1)
    changed[3].classifier.bias = None
    changed[4].bert.encoder.layer[1].output.dense.weight = changed[4].bert.encoder.layer[0].output.dense.weight
    assert len({plain, *(remembered.key(each) for each in changed), remembered.key(bert())}) == 7
    body = bert("BertModel")
    ways = {
        key(body, "mean"),
        key(body, "class_token"),
        key(body, "mean", length=9),
        remembered.key(Answering(body, "mean", True), describe(body, pooling="mean")),
    }
    assert len(ways) == 4


def test_another_library_is_another_model(monkeypatch, tmp_path):
    plain = key(bert())
    for name in ("transformers", "torch"):
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules[name], "__version__", "9.9")
            assert key(bert()) != plain
    with monkeypatch.context() as patch:
        patch.setattr(modeling_bert.BertSelfAttention, "forward", anothers_forward)
        assert key(bert()) != plain
    with monkeypatch.context() as patch:
        patch.setattr(modeling_bert, "eager_attention_forward", anothers_forward)
        assert key(bert()) != plain
    file = tmp_path / "library.py"
    file.write_text("def patched(self):\n    return 1\n")
    made: dict = {}
    exec(compile(file.read_text(), str(file), "exec"), made)
    with monkeypatch.context() as patch:
        patch.setattr(modeling_bert.BertSelfAttention, "forward", made["patched"])
        before = key(bert())
        file.write_text("def patched(self):\n    return 12\n")
        assert len({plain, before, key(bert())}) == 3
    assert key(bert()) == plain


def anothers_forward(self, *args):
    return args


def test_another_reader_is_another_model(monkeypatch, tmp_path):
    plain, root = key(bert()), tmp_path / "apportion"
    shutil.copytree(remembered.OURS, root, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(remembered, "OURS", root)
    assert key(bert()) == plain
    for file in ("intake/hf_text.py", "network/model.py", "methods/ffn/dense.py", "vocab.py"):
        text = (root / file).read_text()
        (root / file).write_text(f"{text}\n")
        assert key(bert()) != plain
        (root / file).write_text(text)
    assert key(bert()) == plain


def test_a_fault_that_comes_after_the_test_is_caught(tmp_path, monkeypatch):
    """Planted in the reader, it is another reader; planted where no key can see it, the weights that are there show it."""
    model = bert()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    read_model(model, cache=tmp_path)
    good, kept = hf_text._tensor, remembered.key(Answering(model), describe(model))

    def swapped(ours, source, a):
        return good(ours.replace("norm1.bias", "norm2.bias"), source, a)

    def all_read(source):
        return []

    monkeypatch.setattr(hf_text.Source, "left", all_read)
    monkeypatch.setattr(hf_text, "_tensor", swapped)
    with pytest.raises(Refused, match="with shaken weights"):
        read_model(model, cache=tmp_path)
    monkeypatch.setattr(remembered, "key", lambda *facts: kept)
    with pytest.raises(Refused, match="as it is"):
        read_model(model, cache=tmp_path)


def test_what_cannot_be_told_is_tested_each_time_and_says_so(tmp_path):
    for index, change in enumerate((lambda m: m.bert.register_forward_hook(lambda *of: None), lambda m: setattr(m.bert, "note", object()), closed)):
        model = bert()
        change(model)
        for _ in range(2):
            found = read_model(model, cache=tmp_path / str(index))
            assert "equality_not_kept" in found.provenance and "not kept" in found.equality and not (tmp_path / str(index)).exists()


def closed(model):
    def note():
        return model

    model.bert.note = note


def test_a_folder_that_is_of_no_use(tmp_path):
    read_model(bert(), cache=tmp_path)
    (file,) = tmp_path.iterdir()
    for torn in ("", "[]", '{"day": 1}', "{"):
        file.write_text(torn)
        assert read_model(bert(), cache=tmp_path).provenance["equality_found_in"] is None
        assert read_model(bert(), cache=tmp_path).provenance["equality_found_in"] == str(tmp_path)
    with pytest.raises(DataError, match="nothing can be kept"):
        read_model(bert(), cache=file)
    network = read_model(bert()).network
    with pytest.raises(NoEffect):
        read_model(network, preprocess=Preprocess(32, (0.5,) * 3, (0.5,) * 3), cache=tmp_path)


def test_what_comes_from_a_file_looks_into_it_and_leaves_it_alone(tmp_path):
    bert().save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    network = read_model(tmp_path).network
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert not torch.equal(network.tokeniser.word.weight, read_model(tmp_path).network.tokeniser.word.weight)


def test_no_two_parts_look_into_the_same_memory(tmp_path):
    torch.manual_seed(0)
    shared = transformers.AlbertForSequenceClassification(transformers.AlbertConfig(**SHAPE, embedding_size=8)).eval()
    shared.save_pretrained(tmp_path)
    network = read_model(tmp_path).network
    memory = [value.untyped_storage() for value in network.parameters()]
    assert len({each.data_ptr() for each in memory}) == len(memory)
    assert all(each.nbytes() == value.nbytes for each, value in zip(memory, network.parameters(), strict=True))
