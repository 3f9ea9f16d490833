"""`python -m bench.models` writes docs/models.md: which architectures are read exactly and which are refused, tried on small models of the real classes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path as File
from typing import Any, NamedTuple

import torch
from torch import nn

from apportion.errors import Refused
from apportion.files import write_atomic
from apportion.intake import _torchvision
from apportion.intake.verify import Verified, verify

PAGE = File(__file__).parent.parent / "docs" / "models.md"
BATCHES = (1, 3, 17)

TIMM = """
vit_tiny_patch16_224 vit_small_patch32_224 vit_base_patch8_224 vit_base_patch16_224 vit_huge_patch14_224 vit_base_patch16_gap_224
vit_medium_patch16_gap_240 vit_medium_patch16_reg4_gap_256 vit_mediumd_patch16_reg4_gap_256 vit_wee_patch16_reg1_gap_256
vit_little_patch16_reg4_gap_256 vit_betwixt_patch16_reg4_gap_256 flexivit_small vit_base_patch16_rpn_224 vit_intern300m_patch14_448
vit_giant_patch14_224 vit_gigantic_patch14_224 test_vit3 deit_tiny_patch16_224 deit_tiny_distilled_patch16_224 deit3_small_patch16_224
deit3_huge_patch14_224 vit_small_patch14_dinov2 vit_base_patch14_reg4_dinov2 vit_giant_patch14_dinov2 vit_giant_patch14_reg4_dinov2
vit_small_patch16_dinov3 vit_small_plus_patch16_dinov3 vit_base_patch16_dinov3_qkvb vit_7b_patch16_dinov3 vit_base_patch16_lingbot
vit_base_patch16_clip_224 vit_base_patch32_clip_quickgelu_224 vit_xsmall_patch16_clip_224 vit_base_patch16_siglip_224 vit_base_patch16_siglip_gap_224
vit_so400m_patch14_siglip_384 vit_so150m_patch16_reg4_gap_256 vit_so150m2_patch16_reg1_gap_256 vit_so150m_patch16_reg4_map_256 beit_base_patch16_224
beit_large_patch16_512 beitv2_base_patch16_224 eva_giant_patch14_224 eva_giant_patch14_clip_224 eva02_tiny_patch14_224 eva02_base_patch14_448
eva02_base_patch16_clip_224 eva02_enormous_patch14_clip_224 vit_medium_patch16_rope_reg1_gap_256 vit_small_patch16_rope_224
vit_small_patch16_rope_ape_224 vit_pe_core_base_patch16_224 vit_pe_lang_large_patch14_448 vit_pe_spatial_base_patch16_512
vit_small_patch16_rope_mixed_224 vit_small_patch16_18x2_224 vit_pwee_patch16_reg1_gap_256 vit_dwee_patch16_reg1_gap_256 vit_base_patch16_xp_224
aimv2_large_patch14_224 test_vit4 vit_base_patch16_sapiens2 naflexvit_base_patch16_gap vit_relpos_small_patch16_224 samvit_base_patch16
vit_base_r50_s16_224 swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 cait_xxs24_224 xcit_tiny_12_p8_224 convit_tiny pit_ti_224 volo_d1_224
crossvit_tiny_240 levit_128s mvitv2_tiny hiera_tiny_224 pvt_v2_b0 resnet18 convnext_tiny
""".split()
OPTIONS: dict[str, dict[str, Any]] = {"vit_pe_core_base_patch16_224": {"attn_pool_num_heads": 4}, "vit_base_patch16_sapiens2": {"num_kv_heads": 1}}
TINY: dict[str, Any] = {"embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7}
TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
ALWAYS = {"vocab_size": 60, "max_position_embeddings": 60, "num_labels": 3, "initializer_range": 0.2, "pad_token_id": 0}
DISTANCES = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "type_vocab_size": 0}
SPECIAL: dict[str, dict[str, Any]] = {
    "DistilBert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    "Electra": {"embedding_size": 16},
    "NomicBert": {"head_dim": 8},
    "ModernBert": {"pad_token_id": 59, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 10},
    "MPNet": {"pad_token_id": 1},
    **{name: {"pad_token_id": 1, "type_vocab_size": 1} for name in ("Roberta", "XLMRoberta", "Camembert", "Data2VecText")},
    "Albert": {"embedding_size": 16},
    "Deberta": DISTANCES,
    "DebertaV2": {**DISTANCES, "position_buckets": 16, "share_att_key": True, "norm_rel_ebd": "layer_norm"},
}
REFUSED_TEXT = {
    **dict.fromkeys(("MegatronBert", "Longformer", "FNet"), "ForSequenceClassification"),
    "Bert": "ForMaskedLM",
    "Roberta": "ForQuestionAnswering",
    "Electra": "ForPreTraining",
    "XLMRoberta": "ForMultipleChoice",
}


CONVOLVED = {"conv_dim": [12, 16, 16], "conv_kernel": [10, 3, 2], "conv_stride": [5, 2, 2], "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4}
WAVE = {**TEXT, **CONVOLVED, "num_labels": 3, "initializer_range": 0.2, "classifier_proj_size": 20}
LARGE = {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True}
HALVES = {f"{side}_{part}": size for side in ("encoder", "decoder") for part, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))}
SOUND: dict[str, dict[str, Any]] = {
    "AST": {**TEXT, "patch_size": 4, "frequency_stride": 3, "time_stride": 2, "max_length": 21, "num_mel_bins": 12, "num_labels": 3},
    "Whisper": {"d_model": 32, **HALVES, "max_source_positions": 20, "num_mel_bins": 8, "classifier_proj_size": 20, "vocab_size": 60, "num_labels": 3}
    | {"decoder_start_token_id": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "WavLM": {**WAVE, "num_buckets": 16, "max_bucket_distance": 12},
}
REFUSED_SOUND = {
    **dict.fromkeys(("Wav2Vec2Conformer", "Data2VecAudio", "SEW", "Wav2Vec2Bert"), "ForSequenceClassification"),
    "Wav2Vec2": "ForCTC",
    "Hubert": "ForCTC",
    "WavLM": "ForXVector",
    "Whisper": "ForConditionalGeneration",
}


class Row(NamedTuple):
    name: str
    kind: str  # the class
    read: bool
    found: Verified | str  # or the error's words


def timm_row(name: str) -> Row:
    """One architecture of timm, small where it can be made small, else whole and without weights."""
    _torchvision.ready()
    import timm

    from apportion.intake.timm_vit import read_vit

    size = 28 if "patch14" in name else 64 if "patch32" in name else 32
    torch.manual_seed(0)
    try:
        model = timm.create_model(name, **{**TINY, "img_size": size, **OPTIONS.get(name, {})}).eval()
    except (TypeError, AssertionError):
        with torch.device("meta"):
            model = timm.create_model(name)

    def tried() -> Verified:
        network = read_vit(model)
        a = network.architecture
        inputs = torch.randn(max(BATCHES), a.channels, a.image_size, a.image_size, generator=torch.Generator().manual_seed(0))
        return verify(model, network, inputs, reread=read_vit, batches=BATCHES)

    return _row(name, model, tried)


def text_row(name: str, kind: str, pooling: Any = None, unit: bool = False) -> Row:
    """One class of transformers."""
    _torchvision.ready()
    import transformers

    from apportion.intake.hf_families import CLASSIFIES, FAMILIES, TAGS
    from apportion.intake.hf_text import Answering, examples, read_text

    torch.manual_seed(0)
    if name in FAMILIES and kind in ("Model", CLASSIFIES, TAGS):
        sizes = {} if name == "DistilBert" else TEXT
        model = getattr(transformers, f"{name}{kind}")(getattr(transformers, f"{name}Config")(**{**ALWAYS, **sizes, **SPECIAL.get(name, {})})).eval()
    else:
        with torch.device("meta"):
            model = getattr(transformers, f"{name}{kind}")(getattr(transformers, f"{name}Config")(num_hidden_layers=1))

    def tried() -> Verified:
        network = read_text(model, pooling=pooling, unit=unit)
        again = lambda made: read_text(made.get_submodule("model"), pooling=pooling, unit=unit)  # noqa: E731
        return verify(Answering(model, pooling, unit), network, *examples(network.architecture), reread=again, batches=BATCHES)

    how = "" if pooling is None else f", {pooling}{', length 1' if unit else ''}"
    return _row(f"{name}{kind}{how}", model, tried)


def _row(name: str, model: nn.Module, tried: Any) -> Row:
    try:
        return Row(name, type(model).__name__, True, tried())
    except Refused as error:
        return Row(name, type(model).__name__, False, error.found)


def text_rows() -> Iterator[Row]:
    from apportion.intake.hf_families import CLASSIFIES, FAMILIES, TAGS

    for name in FAMILIES:
        yield text_row(name, CLASSIFIES)
        yield text_row(name, TAGS)
        yield text_row(name, "Model", "mean", True)
    for name in ("Bert", "Roberta", "MPNet", "ModernBert"):
        yield text_row(name, "Model", "class_token")
    for name, kind in REFUSED_TEXT.items():
        yield text_row(name, kind)


def sound_row(name: str, kind: str, pooling: Any = None, **options: Any) -> Row:
    """One class of transformers that hears."""
    _torchvision.ready()
    import transformers

    from apportion.intake.hf_audio import Answering, examples, read_audio
    from apportion.intake.hf_audio_families import FAMILIES

    torch.manual_seed(0)
    if name in FAMILIES and kind in ("Model", FAMILIES[name].classifies):
        model = getattr(transformers, f"{name}{kind}")(getattr(transformers, f"{name}Config")(**{**SOUND.get(name, WAVE), **options})).eval()
    else:
        with torch.device("meta"):
            model = getattr(transformers, f"{name}{kind}")(getattr(transformers, f"{name}Config")())

    def tried() -> Verified:
        how = {"pooling": pooling, "length": None if name in ("AST", "Whisper") else 640}
        network = read_audio(model, **how)
        again = lambda made: read_audio(made.get_submodule("model"), **how)  # noqa: E731
        return verify(Answering(model, pooling), network, *examples(network.architecture), reread=again, batches=BATCHES)

    how = f"{', large' if options else ''}{'' if pooling is None else f', {pooling}'}"
    return _row(f"{name}{kind}{how}", model, tried)


def sound_rows() -> Iterator[Row]:
    from apportion.intake.hf_audio_families import FAMILIES

    for name, family in FAMILIES.items():
        yield sound_row(name, family.classifies)
        yield sound_row(name, "Model", "mean")
    for name in ("Wav2Vec2", "Hubert", "WavLM"):
        yield sound_row(name, "ForSequenceClassification", **LARGE)
    for name, kind in REFUSED_SOUND.items():
        yield sound_row(name, kind)


def page() -> str:
    """docs/models.md, made anew: some 130 small models, about a minute on one core."""
    _torchvision.ready()
    import timm
    import transformers

    images, texts = [timm_row(name) for name in TIMM], list(text_rows())
    lines = [
        "# Models",
        "",
        "Made by `python -m bench.models`. Every architecture below is the real class of its library, made small (two blocks, 48 or 32 channels) with random",
        "weights; what cannot be made small is refused by its class alone. *Read* means: the network that `apportion` builds gives the same outputs in float32",
        f"on batches of {', '.join(map(str, BATCHES[:-1]))} and {BATCHES[-1]}, as the weights are and once more with every vector moved, so that a part",
        "that was left out shows. The figure is the largest difference of any output. What is not read raises `Refused` with the words given:",
        "nothing is approximated.",
        "",
        f"timm {timm.__version__}, transformers {transformers.__version__}, torch {torch.__version__}.",
        "",
        *_table("timm: images", images),
        *_table("transformers: texts", texts),
        *_table("transformers: sound", list(sound_rows())),
    ]
    return "\n".join(lines)


def _table(title: str, rows: list[Row]) -> list[str]:
    good = [row for row in rows if row.read]
    body = [
        f"| `{row.name}` | {row.kind} | {'read' if row.read else 'refused'} | {f'{row.found.max_abs:.0e}' if isinstance(row.found, Verified) else row.found} |"
        for row in rows
    ]
    head = ["| model | class | | largest difference, or what is in the way |", "|---|---|---|---|"]
    return [f"## {title}", "", f"{len(good)} read, {len(rows) - len(good)} refused.", "", *head, *body, ""]


def main() -> None:
    torch.set_num_threads(1)
    write_atomic(PAGE, page())


if __name__ == "__main__":
    main()
