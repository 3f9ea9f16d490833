"""Which text encoders of transformers are read: where each family keeps its tensors, and what its configuration does not say."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from apportion.network.architecture import Activation

ACTIVATIONS: dict[str, Activation] = {
    **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), "gelu_tanh"),
    **dict.fromkeys(("silu", "swish"), "silu"),
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}


@dataclass(frozen=True, slots=True)
class Family:
    """Where a family keeps its tensors, and what its configuration does not say. `hidden`: layer and activation before the classes, in the whole model."""

    parts: dict[str, str]
    block: str = "encoder.layer"
    hidden: tuple[str, Activation] = ("classifier.dense", "tanh")
    classes: str = "classifier.out_proj"
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
POOLER: dict[str, Any] = {"hidden": ("pooler.dense", "tanh"), "classes": "classifier"}
PLAIN_ROTARY: dict[str, Any] = {"gated": True, "qkv_bias": False, "proj_bias": False, "ffn_bias": False}
FAMILIES = {
    **dict.fromkeys(("Bert", "Ernie"), Family(BERT, **POOLER)),
    **dict.fromkeys(("Roberta", "XLMRoberta", "Camembert", "Data2VecText"), Family(BERT, offset=True)),
    "Electra": Family(BERT, hidden=("classifier.dense", "gelu")),
    "DistilBert": Family(DISTIL, block="transformer.layer", hidden=("pre_classifier", "relu"), classes="classifier"),
    "MPNet": Family(MPNET, offset=True, extra={"relative_buckets": 32}),
    "ModernBert": Family(MODERN, block="layers", hidden=("head.dense", "gelu"), classes="classifier"),
    "NomicBert": Family(NOMIC, block="layers", extra=PLAIN_ROTARY, **POOLER),
}
CLASSIFIES = "ForSequenceClassification"
TABLE = {f"{name}{kind}": name for name in FAMILIES for kind in ("Model", CLASSIFIES)}
IN_THE_WAY = {
    "Albert": "one block whose weights every layer shares: it cannot be sorted and cut for each block by itself",
    "Deberta": "attention in which content and positions are projected apart (disentangled)",
    "TokenClassification": "an answer for each token",
    "QuestionAnswering": "an answer for each token",
    "MaskedLM": "a language-model head",
    "MultipleChoice": "an answer that compares several texts",
}
