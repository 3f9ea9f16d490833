"""Text encoders of transformers as our network, exact or refused: BERT and its kin, RoBERTa, DistilBERT, ELECTRA, MPNet, ModernBERT, Nomic.

A class is read where `hf_families` names it; every tensor must find its place: what is left over was not understood. What a forward does beside its tensors
(positions, windows, activations) is taken from the configuration and held by the equality test of `verify`, on texts with and without padding.
Written against transformers 5.23. Import through `read.py`, which readies torchvision first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apportion.errors import PlanError, Refused
from apportion.intake.hf_families import ACTIVATIONS, CLASSIFIES, FAMILIES, IN_THE_WAY, TABLE, Family
from apportion.network import Architecture, Network
from apportion.network.architecture import Activation

Pooling = Literal["mean", "class_token", "pooler"]
LONGEST = 512  # tokens at which paths are stated, where the caller names no length
IDLE = {"position_ids", "token_type_ids"}  # buffers that old files hold


class Answering(nn.Module):
    """A transformers model as a function of one tensor, as the network takes it: what the network is compared with."""

    def __init__(self, model: nn.Module, pooling: Pooling | None = None, unit: bool = False) -> None:
        super().__init__()
        self.model, self.pooling, self.unit = model, pooling, unit

    def forward(self, inputs: Tensor) -> Tensor:
        ids, kinds = inputs.unbind(1) if inputs.ndim == 3 else (inputs, None)
        mask = ids.ne(self.model.config.pad_token_id)  # pyright: ignore
        out = self.model(input_ids=ids, attention_mask=mask.long(), **({} if kinds is None else {"token_type_ids": kinds}))
        if self.pooling is None:
            return out.logits
        if self.pooling == "pooler":
            x = out.pooler_output
        elif self.pooling == "class_token":
            x = out.last_hidden_state[:, 0]
        else:
            x = (out.last_hidden_state * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return F.normalize(x, dim=-1) if self.unit else x


def read_text(model: nn.Module, *, length: int | None = None, pooling: Pooling | None = None, unit: bool = False) -> Network:
    """A network with copies of the model's weights in float32, in evaluation mode. Raises Refused, naming what has no exact counterpart."""
    family, base = _family(model, pooling)
    a = describe(model, length=length, pooling=pooling, unit=unit)
    with torch.device("meta"):
        network = Network(a)
    left = {name: value.detach() for name, value in model.state_dict().items() if name.rpartition(".")[2] not in IDLE}
    tables = {name: value for name, value in left.items() if name.endswith("relative_attention_bias.weight")}
    state = {name: _tensor(name, left, tables, family, base, a).float().cpu().clone() for name in network.state_dict()}
    unread = [name for name in left if name not in tables and not (name.startswith(f"{base}pooler.") and pooling in ("mean", "class_token"))]
    if unread:
        raise _refusal(f"{unread[0]}, which has no place in the network")
    for name, value in network.state_dict().items():
        _need(state[name].shape == value.shape, f"{tuple(state[name].shape)} for {name}", str(tuple(value.shape)))
    network.load_state_dict(state, assign=True)
    return network.eval()


def describe(model: nn.Module, *, length: int | None = None, pooling: Pooling | None = None, unit: bool = False) -> Architecture:
    """The shape of a transformers model. Raises Refused for what its configuration asks of it and the network would not do."""
    family, base = _family(model, pooling)
    any_model: Any = model
    config = any_model.config
    _check(model, config)
    body: Any = any_model.get_submodule(base.removesuffix("."))
    embed, stem = body.embeddings, any_model.get_input_embeddings()
    positions = _rows(embed, "position_embeddings")
    offset = config.pad_token_id + 1 if family.offset else 0
    room: int = positions - offset if positions else config.max_position_embeddings
    length = min(room, LONGEST) if length is None else length
    if not 2 <= length <= room:
        raise PlanError(f"length {length}", wanted=f"2 to {room}, the positions of the model", do="Choose another length.")
    classes = config.num_labels if pooling is None else 0
    hidden = family.hidden[1] if pooling is None else "tanh" if pooling == "pooler" else None
    pool: Literal["mean", "class_token"] = "mean" if pooling == "mean" or (pooling is None and _modern_mean(config)) else "class_token"
    norms = [part for part in model.modules() if isinstance(part, nn.LayerNorm)]
    shared: dict[str, Any] = {
        "image_size": 0,
        "patch": 0,
        "dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "hidden": config.hidden_dim if config.model_type == "distilbert" else config.intermediate_size,
        "classes": classes,
        "class_token": pool == "class_token",
        "stem_norm": True,
        "norm_first": False,
        "final_norm": False,
        "activation": _activation(config),
        "eps": norms[0].eps,
        "pool": pool,
        "head_hidden": hidden,
        "head_unit": unit,
        "words": stem.num_embeddings,
        "length": length,
        "padding": config.pad_token_id,
        "embedding": stem.embedding_dim,
        "positions": positions,
        "position_offset": offset,
        "token_types": _rows(embed, "token_type_embeddings"),
    }
    return Architecture(**{**shared, **family.extra, **_rotary(config), **_modern(config, norms, pooling)})


def examples(a: Architecture, *, seed: int = 0) -> list[Tensor]:
    """Made-up texts for the equality test: without padding, with it, as pairs where the model tells them apart, and one that is as long as it can be."""
    generator = torch.Generator().manual_seed(seed)
    n = min(a.length, 24)

    def ids(rows: int, tokens: int) -> Tensor:
        drawn = torch.randint(0, a.words - 1, (rows, tokens), generator=generator)
        return drawn + (drawn >= a.padding)

    whole, cut = ids(17, n), ids(17, n)
    lengths = torch.randint(1, n, (17, 1), generator=generator)
    cut[torch.arange(n) >= lengths] = a.padding
    kinds = torch.randint(0, max(a.token_types, 1), (17, n), generator=generator)
    return [whole, cut, ids(1, a.length), *([torch.stack((cut, kinds), 1)] if a.token_types > 1 else [])]


def labels(model: nn.Module) -> tuple[str, ...] | None:
    """Names of the classes, where somebody has given them."""
    names: Mapping[int, str] = model.config.id2label  # pyright: ignore[reportAttributeAccessIssue, reportAssignmentType]
    found = tuple(str(names[index]) for index in sorted(names))
    return None if all(name == f"LABEL_{index}" for index, name in enumerate(found)) else found


def _family(model: nn.Module, pooling: Pooling | None) -> tuple[Family, str]:
    """The family of a model, and the prefix of its encoder's tensors."""
    name = type(model).__name__
    if not type(model).__module__.startswith("transformers.models.") or name not in TABLE:
        reason = next((why for part, why in IN_THE_WAY.items() if part in name), "no exact counterpart is known")
        raise _refusal(f"model of class {_name(model)}: {reason}", wanted=f"one of {', '.join(FAMILIES)} as Model or {CLASSIFIES}")
    whole = name.endswith(CLASSIFIES)
    if whole != (pooling is None):
        do = "Leave pooling out." if whole else 'Pass pooling="mean", "class_token" or "pooler": transformers leaves it to the user.'
        raise PlanError(f"pooling {pooling!r} for a {name}", wanted="pooling for a model without a head, and for no other", do=do)
    base: str = model.base_model_prefix  # pyright: ignore[reportAttributeAccessIssue, reportAssignmentType]
    return FAMILIES[TABLE[name]], f"{base}." if whole else ""


def _check(model: nn.Module, config: Any) -> None:
    for name, module in model.named_modules():
        if not type(module).__module__.startswith(("transformers.models.", "transformers.activations", "torch.nn.modules.")):
            raise _refusal(f"{name or 'the model'} of class {_name(module)}", do="Read the model as transformers made it, without adapters or quantisation.")
        if isinstance(module, nn.LayerNorm):
            eps = next(part.eps for part in model.modules() if isinstance(part, nn.LayerNorm))
            _need(module.eps == eps, f"eps {module.eps} in {name}", f"{eps}, as in the first norm")
    asked = config.to_dict()
    _need(not asked.get("is_decoder"), "is_decoder", "an encoder")
    _need(not asked.get("add_cross_attention"), "add_cross_attention", "an encoder")
    _need(asked.get("position_embedding_type", "absolute") == "absolute", f"position_embedding_type {asked.get('position_embedding_type')}", "absolute")
    _need(config.pad_token_id is not None, "no pad_token_id", "the id of the padding")
    _need(config.model_type != "mpnet" or config.pad_token_id == 1, f"pad_token_id {config.pad_token_id}", "1, which MPNet's code holds fast")
    if type(model).__name__.endswith(CLASSIFIES):
        _need(config.problem_type in (None, "single_label_classification"), f"problem_type {config.problem_type}", "one class for each text")
        _need(config.num_labels > 1, f"{config.num_labels} output", "at least two classes")


def _rotary(config: Any) -> dict[str, Any]:
    """Rotary positions: one base, or one for blocks with a window and one for the others."""
    found = getattr(config, "rope_parameters", None)
    if found is None:
        return {}
    both = {"full_attention": found} if "rope_type" in found else found
    for name, each in both.items():
        plain = each["rope_type"] == "default" and each.get("partial_rotary_factor", 1.0) == 1.0
        _need(plain, f"rope_parameters {name} {each}", "plain rotary positions")
    return {name: each["rope_theta"] for name, each in zip(("rotary", "rotary_local"), (both[k] for k in sorted(both)), strict=False)}


def _modern(config: Any, norms: list[nn.LayerNorm], pooling: Pooling | None) -> dict[str, Any]:
    """What ModernBERT does otherwise: pre-norm, no norm before the first mixer, gates, few biases, windows in most blocks."""
    if config.model_type != "modernbert":
        return {}
    kinds = config.layer_types
    every = next((i for i, kind in enumerate(kinds) if i and kind == "full_attention"), len(kinds))
    wanted = ["sliding_attention" if i % every else "full_attention" for i in range(len(kinds))]
    _need(kinds == wanted, f"layer_types {kinds}", f"full attention in the first block and then in every {every}th")
    head = (
        {} if pooling else {"head_hidden": _activation(config, "classifier_activation"), "head_hidden_norm": True, "head_hidden_bias": config.classifier_bias}
    )
    return {
        "norm_first": True,
        "first_norm": False,
        "final_norm": True,
        "norm_bias": norms[0].bias is not None,
        "gated": True,
        "qkv_bias": config.attention_bias,
        "proj_bias": config.attention_bias,
        "ffn_bias": config.mlp_bias,
        "window": config.sliding_window,
        "global_every": every,
        **head,
    }


def _modern_mean(config: Any) -> bool:
    return config.model_type == "modernbert" and config.classifier_pooling == "mean"


def _tensor(ours: str, left: dict[str, Tensor], tables: Mapping[str, Tensor], family: Family, base: str, a: Architecture) -> Tensor:
    """The tensor of the source that belongs to ours; it is taken out of what is `left`, halves of a fused one when the second is taken."""

    def take(name: str, *, keep: bool = False) -> Tensor:
        if name not in left:
            raise _refusal(f"no {name}", wanted="every block alike, with weights and biases where the network has them")
        return left[name] if keep else left.pop(name)

    module, _, leaf = ours.rpartition(".")
    parts = family.parts
    if module == "head.project" or module.startswith("head.project."):
        return take(_head(module, family, base, a) + f".{leaf}")
    if ours in ("tokeniser.position", "tokeniser.kind"):
        table = take(f"{base}{parts[ours]}.weight")
        task = f"{base}embeddings.task_type_embeddings.weight"
        return table + left.pop(task)[0] if ours == "tokeniser.kind" and task in left else table  # ERNIE: a text without a task has task 0
    if not module.startswith("blocks."):
        return take(f"{base}{parts[module]}.{leaf}")
    _, index, part = module.split(".", 2)
    block = f"{base}{family.block}.{index}."
    if leaf == "relative":
        return next(iter(tables.values()))  # each block has its own copy of the table that they share
    if part == "mixer.qkv":
        fused = (
            take(f"{block}{parts['fused']}.{leaf}") if "fused" in parts else torch.cat([take(f"{block}{parts[k]}.{leaf}") for k in ("query", "key", "value")])
        )
        return fused.unflatten(0, (3, a.heads, a.dim // a.heads)).transpose(0, 1).flatten(0, 2)
    if part in ("ffn.up", "ffn.gate") and "wide" in parts:
        return take(f"{block}{parts['wide']}.{leaf}", keep=part == "ffn.up").chunk(2)[part == "ffn.gate"]
    return take(f"{block}{parts[part]}.{leaf}")


def _head(module: str, family: Family, base: str, a: Architecture) -> str:
    """Name of the source's layer for one of the head's."""
    hidden = family.hidden[0] if a.classes else "pooler.dense"
    places = {0: f"{base}{hidden}" if hidden == "pooler.dense" else hidden, 2: f"{family.hidden[0].rpartition('.')[0]}.norm"} if a.head_hidden else {}
    place = int(module.rpartition(".")[2]) if module != "head.project" else -1
    return family.classes if place not in places or (place == 2 and not a.head_hidden_norm) else places[place]


def _rows(embeddings: nn.Module, name: str) -> int:
    found = getattr(embeddings, name, None)
    return found.num_embeddings if isinstance(found, nn.Embedding) else 0


def _activation(config: Any, *names: str) -> Activation:
    found = next(getattr(config, name) for name in (*names, "hidden_act", "activation", "hidden_activation") if getattr(config, name, None) is not None)
    _need(found in ACTIVATIONS, f"activation {found!r}", f"one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[found]


def _need(held: bool, found: str, wanted: str) -> None:
    if not held:
        raise _refusal(found, wanted=wanted)


def _name(module: object) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _refusal(found: str, *, wanted: str = "modules with an exact counterpart in the network", do: str = "Use a model of a family that is read.") -> Refused:
    return Refused(found, wanted=wanted, do=do)
