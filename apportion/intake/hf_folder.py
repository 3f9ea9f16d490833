"""A folder as transformers or sentence-transformers writes it, or a pinned revision from the hub: opened without running any code that lies in it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any

import transformers
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
from torch import nn
from transformers.utils import logging

from apportion.errors import DataError, Refused
from apportion.intake import hf_audio_families
from apportion.intake.hf_families import CLASSIFIES, TABLE
from apportion.intake.hf_text import Pooling

# Keys of older releases, which change nothing at inference.
HARMLESS = {
    *("_name_or_path", "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "transformers.js_config", "gradient_checkpointing"),
    *("position_embedding_type", "directionality", "output_past", "finetuning_task", "tie_weights_", "use_cache", "problem_type", "reference_compile"),
    *("pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head", "pooler_type"),
    *("summary_activation", "summary_last_dropout", "summary_type", "summary_use_proj", "global_attn_every_n_layers", "global_rope_theta", "local_rope_theta"),
    *("position_buckets", "share_att_key", "norm_rel_ebd", "attention_head_size", "conv_kernel_size", "talking_head"),  # read, where a class knows them
    *("conv_act", "conv_groups", "cls_dropout", "padding_idx", "pooler_size", "net_structure_type", "layers_to_keep", "num_memory_blocks"),
    *("gap_size", "down_scale_factor"),
    *("sep_token_id", "cls_token_id", "mask_token_id", "bos_token_id", "eos_token_id", "sinusoidal_pos_embds", "attention_probs_dropout_prob", "layer_types"),
}
POOLINGS: dict[str, Pooling] = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "class_token", "mean": "mean", "cls": "class_token"}
DO = "Save the model again with this release of its library."


@dataclass(frozen=True, slots=True)
class Opened:
    model: nn.Module
    tokenizer: str | None
    extractor: dict[str, Any] | None  # how recordings become inputs
    pooling: Pooling | None
    unit: bool
    length: int | None
    facts: dict[str, str | int | bool | None]


def open_folder(name: str, pooling: Pooling | None) -> Opened:
    """The model in a folder, or of "hf:NAME@REVISION". Raises Refused for code, keys, modules and tensors that are not understood, DataError for a bad file."""
    folder, revision = (_fetched(name), name.rpartition("@")[2]) if name.startswith("hf:") else (File(name), None)
    config = _json(folder / "config.json")
    if "auto_map" in config:
        raise Refused(f"{folder / 'config.json'} with auto_map", wanted="a model whose code is in transformers", do="Code from a folder is never run.")
    kind = _class(config, folder)
    body, unit, length = _sentence(folder)
    pooling = pooling or body
    known = getattr(transformers, kind).config_class
    unknown = set(config) - set(known().to_dict()) - HARMLESS
    if unknown:
        raise Refused(f"{folder / 'config.json'} with the unknown key {min(unknown)!r}", wanted=f"keys of {known.__name__}", do=DO)
    file = folder / "model.safetensors"
    if not file.is_file():
        raise DataError(f"{folder} without model.safetensors", wanted="the weights in one file", do="Convert other formats first: pickles are not read.")
    try:
        with quiet():
            model, info = getattr(transformers, kind).from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False, use_safetensors=True, output_loading_info=True
            )
    except Exception as error:  # a torn file and a bad value raise in as many ways as there are models
        raise Refused(f"{folder}, which transformers cannot load ({str(error)[:300]})", wanted=f"a {kind}", do="Fetch it again.") from error
    absent = [key for key in info["missing_keys"] if "pooler." not in key or pooling in (None, "pooler")]
    for what, keys in (("missing", absent), ("unexpected", info["unexpected_keys"]), ("misshapen", info["mismatched_keys"])):
        if left := sorted(str(key) for key in keys if not str(key).endswith("position_ids")):
            raise Refused(f"{file} with {what} {left[0]}", wanted=f"the tensors of {kind}", do=DO)
    with file.open("rb") as handle:
        facts: dict[str, str | int | bool | None] = {"sha256": hashlib.file_digest(handle, "sha256").hexdigest(), "revision": revision}
    words, sounds = folder / "tokenizer.json", folder / "preprocessor_config.json"
    extractor = _json(sounds) if sounds.is_file() else None
    return Opened(model, words.read_text("utf-8") if words.is_file() else None, extractor, pooling, unit, length, facts)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars of transformers, which are then as they were: a file on a disk is read before one has been seen."""
    shown, fetching = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # and those of downloads with them
        if not fetching:
            disable_progress_bars()


def _fetched(name: str) -> File:
    repository, _, revision = name.removeprefix("hf:").partition("@")
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise Refused(f"{name!r}", wanted='"hf:NAME@REVISION" with a full commit', do="A name alone may be another model tomorrow.")
    from huggingface_hub import snapshot_download

    try:
        return File(snapshot_download(repository, revision=revision, allow_patterns=["*.json", "*/config.json", "model.safetensors"]))
    except Exception as error:  # downloads fail in as many ways as there are networks
        raise Refused(
            f"{name}, which could not be had ({type(error).__name__}: {str(error)[:200]})", wanted="a network, or a filled cache", do="Pass a local folder."
        ) from error


def _class(config: dict[str, Any], folder: File) -> str:
    named = config.get("architectures") or []
    kind = named[0] if len(named) == 1 else f"{named}"
    if kind not in TABLE and kind not in hf_audio_families.TABLE:
        heard = (name for name in hf_audio_families.TABLE if not name.endswith("Model"))
        wanted = f"one of {', '.join((*(name for name in TABLE if name.endswith(CLASSIFIES)), *heard))}, or the same as Model"
        raise Refused(f"{folder / 'config.json'} of {kind} ({config.get('model_type')})", wanted=wanted, do="Use a model of a family that is read.")
    return kind


def _sentence(folder: File) -> tuple[Pooling | None, bool, int | None]:
    """What the files of sentence-transformers say: pooling, length 1, and how many tokens."""
    if not (folder / "modules.json").is_file():
        return None, False, None
    modules = _json(folder / "modules.json", list)
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise Refused(f"{folder / 'modules.json'} of {', '.join(kinds)}", wanted="Transformer, Pooling and perhaps Normalize", do="Use such a model.")
    settings = _json(folder / modules[1]["path"] / "config.json")
    modes = [key for key, value in settings.items() if key.startswith("pooling_mode_") and value is True]
    modes = modes or [str(settings.get("pooling_mode"))]
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise Refused(f"{folder} with pooling {', '.join(modes)}", wanted="the mean or the class token", do="Use such a model.")
    file = folder / "sentence_bert_config.json"
    more = _json(file) if file.is_file() else {}
    if more.get("do_lower_case"):
        raise Refused(f"{file} with do_lower_case", wanted="lower case in tokenizer.json", do="Save it there.")
    return POOLINGS[modes[0]], len(kinds) == 3, more.get("max_seq_length")


def _json(file: File, kind: type = dict) -> Any:
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: {error}", wanted="JSON", do="Fetch it again.") from error
    if not isinstance(found, kind):
        raise DataError(f"{file} that is a {type(found).__name__}", wanted=kind.__name__, do="Fetch it again.")
    return found
