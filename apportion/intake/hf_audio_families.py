"""Which audio encoders of transformers are read: where each family keeps its tensors, and what its configuration means for the network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from apportion.errors import PlanError, Refused
from apportion.intake.hf_families import ACTIVATIONS
from apportion.network.architecture import Activation

Pooling = Literal["mean", "class_token", "pooler"]
SECOND = 16_000  # samples of a waveform, where the caller names no length
EPS = 1e-5  # of torch's norms, where a class names none


@dataclass(frozen=True, slots=True)
class Family:
    """`parts`: what the source calls our modules, those of a block without "blocks.i."; `describe` gives what is special of the Architecture."""

    parts: dict[str, str]
    block: str
    classifies: str
    describe: Callable[[Any, int | None, bool], dict[str, Any]]  # configuration, length, and whether the model answers with classes
    head: dict[str, str]
    base: str | None = None  # prefix of the encoder's tensors; None: base_model_prefix in a model with a head, nothing in one without
    beside: tuple[str, ...] = ()  # tensors of what is not the encoder
    prefix: int = 0
    pooling: tuple[Pooling, ...] = ("mean",)


def need(held: bool, found: str, wanted: str) -> None:
    if not held:
        raise refusal(found, wanted=wanted)


def refusal(found: str, *, wanted: str = "modules with an exact counterpart in the network", do: str = "Use a model of a family that is read.") -> Refused:
    return Refused(found, wanted=wanted, do=do)


def activation(found: Any) -> Activation:
    need(found in ACTIVATIONS, f"activation {found!r}", f"one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[found]


def _wave(config: Any, length: int | None, classifies: bool) -> dict[str, Any]:
    asked = config.to_dict()
    need(not asked.get("add_adapter"), "add_adapter", "an encoder that ends with its last block")
    need(asked.get("adapter_attn_dim") is None, f"adapter_attn_dim {asked.get('adapter_attn_dim')}", "blocks without adapters")
    need(not asked.get("conv_pos_batch_norm"), "conv_pos_batch_norm", "positions by a convolution with weight norm")
    need(config.feat_extract_norm in ("group", "layer"), f"feat_extract_norm {config.feat_extract_norm}", "group or layer")
    length, least = SECOND if length is None else length, 2
    for kernel, step in reversed(list(zip(config.conv_kernel, config.conv_stride, strict=True))):
        least = (least - 1) * step + kernel
    if length < least:
        raise PlanError(f"length {length}", wanted=f"at least {least} samples, which make two tokens", do="Choose a longer one.")
    stable = config.do_stable_layer_norm
    gated = config.model_type == "wavlm"
    return {
        "samples": length,
        "hidden": config.intermediate_size,
        "stem_norm": not stable,
        "norm_first": stable,
        "final_norm": stable,
        "activation": activation(config.hidden_act),
        "wave_channels": tuple(config.conv_dim),
        "wave_kernels": tuple(config.conv_kernel),
        "wave_steps": tuple(config.conv_stride),
        "wave_norm": config.feat_extract_norm,
        "wave_bias": config.conv_bias,
        "wave_activation": activation(config.feat_extract_activation),
        "wave_project_norm": asked.get("feat_proj_layer_norm", True),
        "position_kernel": config.num_conv_pos_embeddings,
        "position_groups": config.num_conv_pos_embedding_groups,
        **({"relative_buckets": config.num_buckets, "relative_range": config.max_bucket_distance, "relative_gate": True} if gated else {}),
        **(_projected(config) if classifies else {}),
    }


def _spectrogram(config: Any, length: int | None, classifies: bool) -> dict[str, Any]:
    _fixed(length, config.max_length)
    return {
        "patch": config.patch_size,
        "frames": config.max_length,
        "bands": config.num_mel_bins,
        "patch_steps": (config.frequency_stride, config.time_stride),
        "hidden": config.intermediate_size,
        "class_token": True,
        "registers": 1,
        "activation": activation(config.hidden_act),
        "qkv_bias": config.qkv_bias,
        "head_norm": classifies,
    }


def _frames(config: Any, length: int | None, classifies: bool) -> dict[str, Any]:
    frames = 2 * config.max_source_positions
    _fixed(length, frames)
    return {
        "frames": frames,
        "bands": config.num_mel_bins,
        "hidden": config.encoder_ffn_dim,
        "activation": activation(config.activation_function),
        **(_projected(config) if classifies else {}),
    }


def _projected(config: Any) -> dict[str, Any]:
    """The source projects each token and then takes the mean, which is the same as the other way round."""
    need(not config.use_weighted_layer_sum, "use_weighted_layer_sum", "an answer that is read from the last block")
    return {"head_hidden": "identity", "head_width": config.classifier_proj_size}


def _fixed(length: int | None, frames: int) -> None:
    if length not in (None, frames):
        raise PlanError(f"length {length}", wanted=f"{frames} frames, which the model insists on", do="Leave length out.")


WAVE = {
    "tokeniser.layers.conv": "feature_extractor.conv_layers.{}.conv",
    "tokeniser.layers.norm": "feature_extractor.conv_layers.{}.layer_norm",
    "tokeniser.project_norm": "feature_projection.layer_norm",
    "tokeniser.project": "feature_projection.projection",
    "tokeniser.position": "encoder.pos_conv_embed.conv",
    "tokeniser.norm": "encoder.layer_norm",
    "norm": "encoder.layer_norm",
    "norm1": "layer_norm",
    "query": "attention.q_proj",
    "key": "attention.k_proj",
    "value": "attention.v_proj",
    "mixer.proj": "attention.out_proj",
    "gate": "attention.gru_rel_pos_linear",
    "gate_scale": "attention.gru_rel_pos_const",
    "norm2": "final_layer_norm",
    "ffn.up": "feed_forward.intermediate_dense",
    "ffn.down": "feed_forward.output_dense",
}
AST = {
    "tokeniser.project": "embeddings.patch_embeddings.projection",
    "tokeniser.position": "embeddings.position_embeddings",
    "norm": "layernorm",
    "norm1": "layernorm_before",
    "query": "attention.q_proj",
    "key": "attention.k_proj",
    "value": "attention.v_proj",
    "mixer.proj": "attention.o_proj",
    "norm2": "layernorm_after",
    "ffn.up": "mlp.fc1",
    "ffn.down": "mlp.fc2",
}
WHISPER = {
    "tokeniser.first": "conv1",
    "tokeniser.second": "conv2",
    "tokeniser.position": "embed_positions.weight",
    "norm": "layer_norm",
    "norm1": "self_attn_layer_norm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "mixer.proj": "self_attn.out_proj",
    "norm2": "final_layer_norm",
    "ffn.up": "fc1",
    "ffn.down": "fc2",
}
PROJECTED = {"head.project.0": "projector", "head.project.2": "classifier"}
OF_WAVES = Family(WAVE, "encoder.layers", "ForSequenceClassification", _wave, PROJECTED)
FAMILIES = {
    **dict.fromkeys(("Wav2Vec2", "Hubert", "WavLM", "UniSpeech", "UniSpeechSat"), OF_WAVES),
    "AST": Family(
        AST,
        "layers",
        "ForAudioClassification",
        _spectrogram,
        {"head.norm": "classifier.layernorm", "head.project": "classifier.dense"},
        prefix=2,
        pooling=("mean", "class_token", "pooler"),
    ),
    "Whisper": Family(WHISPER, "layers", "ForAudioClassification", _frames, PROJECTED, base="encoder.", beside=("decoder.",)),
}
TABLE = {f"{name}{kind}": name for name, family in FAMILIES.items() for kind in ("Model", family.classifies)}
IN_THE_WAY = {
    "Conformer": "blocks with a convolution and two FFNs",
    "Wav2Vec2Bert": "blocks with a convolution and two FFNs",
    "Data2VecAudio": "positions by a stack of convolutions with a norm behind each",
    "SEW": "a sequence that is pooled before the blocks and stretched behind them",
    "ForCTC": "an answer for each frame (CTC)",
    "FrameClassification": "an answer for each frame",
    "XVector": "statistics over convolutions in time (x-vectors)",
    "ForPreTraining": "a head for pre-training",
    "ConditionalGeneration": "a decoder",
    "CausalLM": "a decoder",
    "Decoder": "a decoder",
}
