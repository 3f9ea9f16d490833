"""Which text encoders of transformers are read: where each family keeps its tensors, what its configuration alone says, and what it does not say."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from apportion.errors import Refused
from apportion.network.architecture import Activation

Pooling = Literal["mean", "class_token", "pooler"]
ACTIVATIONS: dict[str, Activation] = {
    **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), "gelu_tanh"),
    **dict.fromkeys(("silu", "swish"), "silu"),
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "tanh": "tanh",
}


@dataclass(frozen=True, slots=True)
class Family:
    """Where a family keeps its tensors, and what its configuration does not say.

    `hidden`: layer and activation before the classes, in the whole model; `pooler`: the layer of a bare encoder. In both {} is the encoder's prefix. `block`
    has places for a block's number or, where layers share blocks, for its group and its number in there.
    """

    parts: dict[str, str]
    block: str = "encoder.layer.{}"
    hidden: tuple[str, Activation] = ("classifier.dense", "tanh")
    classes: str = "classifier.out_proj"
    pooler: str = "{}pooler.dense"
    offset: bool = False  # positions count from after the padding id
    extra: dict[str, Any] = field(default_factory=dict)


EMBEDDINGS = {
    "tokeniser.word": "embeddings.word_embeddings",
    "tokeniser.position": "embeddings.position_embeddings",
    "tokeniser.kind": "embeddings.token_type_embeddings",
    "tokeniser.norm": "embeddings.LayerNorm",
    "tokeniser.project": "embeddings_project",
}
FFN = {"ffn.up": "intermediate.dense", "ffn.down": "output.dense", "norm2": "output.LayerNorm"}
ATTENTION = {"query": "attention.self.query", "key": "attention.self.key", "value": "attention.self.value"}
BERT = {**EMBEDDINGS, **FFN, **ATTENTION, "mixer.proj": "attention.output.dense", "norm1": "attention.output.LayerNorm"}
DISTIL = {
    "query": "attention.q_lin",
    "key": "attention.k_lin",
    "value": "attention.v_lin",
    "mixer.proj": "attention.out_lin",
    **EMBEDDINGS,
    "norm1": "sa_layer_norm",
    "ffn.up": "ffn.lin1",
    "ffn.down": "ffn.lin2",
    "norm2": "output_layer_norm",
}
MPNET = {
    "query": "attention.attn.q",
    "key": "attention.attn.k",
    "value": "attention.attn.v",
    "mixer.proj": "attention.attn.o",
    **EMBEDDINGS,
    **FFN,
    "norm1": "attention.LayerNorm",
    "mixer.relative": "encoder.relative_attention_bias",
}
MODERN = {
    "tokeniser.word": "embeddings.tok_embeddings",
    "tokeniser.norm": "embeddings.norm",
    "norm": "final_norm",
    "norm1": "attn_norm",
    "fused": "attn.Wqkv",
    "mixer.proj": "attn.Wo",
    "norm2": "mlp_norm",
    "wide": "mlp.Wi",
    "ffn.down": "mlp.Wo",
}
NOMIC = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "mixer.proj": "self_attn.o_proj",
    **EMBEDDINGS,
    "norm1": "post_attention_layernorm",
    "norm2": "post_mlp_layernorm",
    "ffn.up": "mlp.gate_proj",
    "ffn.gate": "mlp.up_proj",
    "ffn.down": "mlp.down_proj",
}
ALBERT = {
    "query": "attention.query",
    "key": "attention.key",
    "value": "attention.value",
    "mixer.proj": "attention.dense",
    **EMBEDDINGS,
    "tokeniser.project": "encoder.embedding_hidden_mapping_in",
    "norm1": "attention.LayerNorm",
    "ffn.up": "ffn",
    "ffn.down": "ffn_output",
    "norm2": "full_layer_layer_norm",
}
DISENTANGLED = {**EMBEDDINGS, **FFN, "mixer.proj": "attention.output.dense", "norm1": "attention.output.LayerNorm", "relative": "encoder.rel_embeddings"}
DEBERTA = {  # v1: rows lie head by head, and keys have no bias
    **DISENTANGLED,
    "grouped": "attention.self.in_proj",
    "query": "attention.self.q_bias",
    "value": "attention.self.v_bias",
    "position_key": "attention.self.pos_proj",
    "position_query": "attention.self.pos_q_proj",
}
DEBERTA_V2 = {
    **DISENTANGLED,
    "query": "attention.self.query_proj",
    "key": "attention.self.key_proj",
    "value": "attention.self.value_proj",
    "position_key": "attention.self.pos_key_proj",
    "position_query": "attention.self.pos_query_proj",
    "relative_norm": "encoder.LayerNorm",
}
POOLER: dict[str, Any] = {"hidden": ("{}pooler.dense", "tanh"), "classes": "classifier"}
CONTEXT: dict[str, Any] = {"hidden": ("pooler.dense", "gelu"), "classes": "classifier"}
PLAIN_ROTARY: dict[str, Any] = {"gated": True, "qkv_bias": False, "proj_bias": False, "ffn_bias": False}
FAMILIES = {
    **dict.fromkeys(("Bert", "Ernie"), Family(BERT, **POOLER)),
    **dict.fromkeys(("Roberta", "XLMRoberta", "Camembert", "Data2VecText"), Family(BERT, offset=True)),
    "Electra": Family(BERT, hidden=("classifier.dense", "gelu")),
    "DistilBert": Family(DISTIL, block="transformer.layer.{}", hidden=("pre_classifier", "relu"), classes="classifier"),
    "MPNet": Family(MPNET, offset=True, extra={"relative_buckets": 32}),
    "ModernBert": Family(MODERN, block="layers.{}", hidden=("head.dense", "gelu"), classes="classifier"),
    "NomicBert": Family(NOMIC, block="layers.{}", extra=PLAIN_ROTARY, **POOLER),
    "Albert": Family(ALBERT, block="encoder.albert_layer_groups.{}.albert_layers.{}", hidden=("{}pooler", "tanh"), classes="classifier", pooler="{}pooler"),
    "Deberta": Family(DEBERTA, **CONTEXT),
    "DebertaV2": Family(DEBERTA_V2, **CONTEXT),
}
CLASSIFIES, TAGS = "ForSequenceClassification", "ForTokenClassification"
TABLE = {f"{name}{kind}": name for name in FAMILIES for kind in ("Model", CLASSIFIES, TAGS)}
IN_THE_WAY = {
    "QuestionAnswering": "a beginning and an end among the tokens",
    "MaskedLM": "a language-model head",
    "MultipleChoice": "an answer that compares several texts",
}


def rotary(config: Any) -> dict[str, Any]:
    """Rotary positions: one base, or one for blocks with a window and one for the others."""
    found = getattr(config, "rope_parameters", None)
    if found is None:
        return {}
    both = {"full_attention": found} if "rope_type" in found else found
    for name, each in both.items():
        plain = each["rope_type"] == "default" and each.get("partial_rotary_factor", 1.0) == 1.0
        need(plain, f"rope_parameters {name} {each}", "plain rotary positions")
    return {name: each["rope_theta"] for name, each in zip(("rotary", "rotary_local"), (both[k] for k in sorted(both)), strict=False)}


def modern(config: Any, norm_bias: bool, whole: bool) -> dict[str, Any]:
    """What ModernBERT does otherwise: pre-norm, no norm before the first mixer, gates, few biases, windows in most blocks."""
    if config.model_type != "modernbert":
        return {}
    kinds = config.layer_types
    every = next((i for i, kind in enumerate(kinds) if i and kind == "full_attention"), len(kinds))
    wanted = ["sliding_attention" if i % every else "full_attention" for i in range(len(kinds))]
    need(kinds == wanted, f"layer_types {kinds}", f"full attention in the first block and then in every {every}th")
    head = {"head_hidden": activation(config, "classifier_activation"), "head_hidden_norm": True, "head_hidden_bias": config.classifier_bias}
    return {
        "norm_first": True,
        "first_norm": False,
        "final_norm": True,
        "norm_bias": norm_bias,
        "gated": True,
        "qkv_bias": config.attention_bias,
        "proj_bias": config.attention_bias,
        "ffn_bias": config.mlp_bias,
        "window": config.sliding_window,
        "global_every": every,
        **(head if whole else {}),
    }


def disentangled(config: Any, embedding: int, whole: bool) -> dict[str, Any]:
    """What DeBERTa does otherwise: distances that queries and keys look at, and a pooler of its own."""
    if config.model_type not in ("deberta", "deberta-v2"):
        return {}
    kinds, convolution = config.pos_att_type or [], getattr(config, "conv_kernel_size", 0)
    end = config.max_relative_positions if config.max_relative_positions > 0 else config.max_position_embeddings
    side = getattr(config, "position_buckets", -1) if config.model_type == "deberta-v2" else -1
    need(config.relative_attention and bool(kinds), f"relative_attention {config.relative_attention} of {kinds}", "scores by distance")
    need(set(kinds) <= {"c2p", "p2c"} and len(set(kinds)) == len(kinds), f"pos_att_type {kinds}", "c2p, p2c or both")
    need(convolution <= 0, f"conv_kernel_size {convolution}", "0: no convolution beside the first block")
    need(side < 1 or (side > 1 and end - 1 > side // 2), f"position_buckets {side} up to {end}", "more than one, and fewer than distances")
    need(embedding == config.hidden_size, f"embedding_size {embedding}", f"{config.hidden_size}: its norm comes after the projection")
    size = getattr(config, "attention_head_size", config.hidden_size // config.num_attention_heads)
    need(size * config.num_attention_heads == config.hidden_size, f"attention_head_size {size}", "heads that fill the width")
    return {
        "relative_buckets": 2 * (side if side > 0 else end),
        "relative_range": end if side > 0 else 0,
        "content_to_position": "c2p" in kinds,
        "position_to_content": "p2c" in kinds,
        **({"head_hidden": activation(config, "pooler_hidden_act")} if whole else {}),
    }


def activation(config: Any, *names: str) -> Activation:
    found = next(getattr(config, name) for name in (*names, "hidden_act", "activation", "hidden_activation") if getattr(config, name, None) is not None)
    need(found in ACTIVATIONS, f"activation {found!r}", f"one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[found]


def need(held: bool, found: str, wanted: str) -> None:
    if not held:
        raise refusal(found, wanted=wanted)


def refusal(found: str, *, wanted: str = "modules with an exact counterpart in the network", do: str = "Use a model of a family that is read.") -> Refused:
    return Refused(found, wanted=wanted, do=do)
