"""Text encoders of transformers as our network, exact or refused: BERT and its kin, RoBERTa, DistilBERT, ELECTRA, MPNet, ModernBERT, Nomic, ALBERT, DeBERTa.

A class is read where `hf_families` names it; every tensor must find its place: what is left over was not understood. What a forward does beside its tensors
(positions, windows, activations) is taken from the configuration and held by the equality test of `verify`, on texts with and without padding.
Of what a source's blocks share, each of ours has a copy, so that it can be healed and cut by itself. So memory grows: ALBERT's 12 layers share one block (base:
12 million parameters become 90 million), DeBERTa's a table of distances, which is projected for each (base of the third version: 9 million more).
Written against transformers 5.23. Import through `read.py`, which readies torchvision first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apportion.errors import PlanError
from apportion.intake.hf_families import CLASSIFIES, FAMILIES, IN_THE_WAY, TABLE, TAGS, Family, Pooling, activation, disentangled, modern, need, refusal, rotary
from apportion.methods.mixer.disentangled import reach
from apportion.network import Architecture, Network
from apportion.vocab import Task

LONGEST = 512  # tokens at which paths are stated, where the caller names no length
LARGE = 10_000_000  # weights of the blocks from which a model is compared on shorter texts
PROBLEMS: dict[str, Task] = {"single_label_classification": "classification", "multi_label_classification": "multilabel", "regression": "regression"}
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
            return out.logits * mask[..., None] if out.logits.ndim == 3 else out.logits  # at padding there is nothing to compare
        if self.pooling == "pooler":
            x = out.pooler_output
        elif self.pooling == "class_token":
            x = out.last_hidden_state[:, 0]
        else:
            x = (out.last_hidden_state * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return F.normalize(x, dim=-1) if self.unit else x


class Source:
    """A model's tensors, and which of them have found a place; several blocks may take the same."""

    def __init__(self, model: nn.Module, family: Family, base: str) -> None:
        self.family, self.base = family, base
        self.config: Any = model.config
        self.found = {name: value.detach() for name, value in model.state_dict().items() if name.rpartition(".")[2] not in IDLE}
        self.read: set[str] = set()

    def take(self, name: str) -> Tensor:
        if name not in self.found:
            raise refusal(f"no {name}", wanted="every block alike, with weights and biases where the network has them")
        self.read.add(name)
        return self.found[name]

    def left(self) -> list[str]:
        return [name for name in self.found if name not in self.read]

    def block(self, index: int) -> str:
        """Prefix of the tensors of one of our blocks."""
        if self.config.model_type != "albert":
            return f"{self.base}{self.family.block.format(index)}."
        layer, inner = divmod(index, self.config.inner_group_num)
        group = int(layer / (self.config.num_hidden_layers / self.config.num_hidden_groups))  # in floating point, as the source does it
        return f"{self.base}{self.family.block.format(group, inner)}."


def read_text(model: nn.Module, *, length: int | None = None, pooling: Pooling | None = None, unit: bool = False, own: bool = True) -> Network:
    """A network with copies of the model's weights in float32, in evaluation mode. Raises Refused, naming what has no exact counterpart.

    Without `own`, for a network that is looked at and thrown away, weights that stay as they are look into the model's memory.
    """
    family, base = _family(model, pooling)
    a = describe(model, length=length, pooling=pooling, unit=unit)
    with torch.device("meta"):
        network = Network(a)
    source = Source(model, family, base)
    seen = ((name, _tensor(name, source, a).float().cpu()) for name in network.state_dict())
    state = {name: value.clone() if own else value for name, value in seen}
    unread = [name for name in source.left() if not (name.startswith(f"{base}pooler.") and pooling in ("mean", "class_token"))]
    if unread:
        raise refusal(f"{unread[0]}, which has no place in the network")
    for name, value in network.state_dict().items():
        need(state[name].shape == value.shape, f"{tuple(state[name].shape)} for {name}", str(tuple(value.shape)))
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
    tags = type(model).__name__.endswith(TAGS)
    hidden = None if tags else family.hidden[1] if pooling is None else "tanh" if pooling == "pooler" else None
    pool: Literal["mean", "class_token", "every_token"] = (
        "every_token" if tags else "mean" if pooling == "mean" or (pooling is None and _modern_mean(config)) else "class_token"
    )
    norm = next(iter(_norms(model).values()))
    shared: dict[str, Any] = {
        "image_size": 0,
        "patch": 0,
        "dim": config.hidden_size,
        "depth": config.num_hidden_layers * getattr(config, "inner_group_num", 1),
        "heads": config.num_attention_heads,
        "hidden": config.hidden_dim if config.model_type == "distilbert" else config.intermediate_size,
        "classes": classes,
        "class_token": pool != "mean",
        "stem_norm": True,
        "norm_first": False,
        "final_norm": False,
        "activation": activation(config),
        "eps": _eps(norm),
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
        "task": "token_classification" if tags else _task(config) if classes else "embedding",
    }
    whole = pooling is None
    flavour = {**rotary(config), **modern(config, norm.bias is not None, whole), **disentangled(config, stem.embedding_dim, whole and not tags)}
    return Architecture(**{**shared, **family.extra, **flavour})


def examples(a: Architecture, *, seed: int = 0) -> list[Tensor]:
    """Made-up texts for the equality test: without padding, with it, 17 at once and one alone, and one that is as long as it can be; the last, for the weights
    as they are too, are a few with padding, as pairs where the model tells them apart.

    A large model has texts of 8 tokens instead of 24: far places and distances are tried by the longest text.
    """
    generator = torch.Generator().manual_seed(seed)
    large = a.depth * a.dim * (4 * a.dim + 2 * a.hidden) >= LARGE
    n = min(a.length, 8 if large else 24)

    def ids(rows: int, tokens: int) -> Tensor:
        drawn = torch.randint(0, a.words - 1, (rows, tokens), generator=generator)
        return drawn + (drawn >= a.padding)

    whole, cut = ids(3, n), ids(17, n)
    lengths = torch.randint(1, n, (17, 1), generator=generator)
    cut[torch.arange(n) >= lengths] = a.padding
    kinds = torch.randint(0, max(a.token_types, 1), (17, n), generator=generator)
    return [whole, cut, cut[:1], ids(1, a.length), (torch.stack((cut, kinds), 1) if a.token_types > 1 else cut)[:3]]


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
        raise refusal(f"model of class {_name(model)}: {reason}", wanted=f"one of {', '.join(FAMILIES)} as Model, {CLASSIFIES} or {TAGS}")
    whole = name.endswith((CLASSIFIES, TAGS))
    if whole != (pooling is None):
        do = "Leave pooling out." if whole else 'Pass pooling="mean", "class_token" or "pooler": transformers leaves it to the user.'
        raise PlanError(f"pooling {pooling!r} for a {name}", wanted="pooling for a model without a head, and for no other", do=do)
    base: str = model.base_model_prefix  # pyright: ignore[reportAttributeAccessIssue, reportAssignmentType]
    return FAMILIES[TABLE[name]], f"{base}." if whole else ""


def _check(model: nn.Module, config: Any) -> None:
    for name, module in model.named_modules():
        if not type(module).__module__.startswith(("transformers.models.", "transformers.activations", "torch.nn.modules.")):
            raise refusal(f"{name or 'the model'} of class {_name(module)}", do="Read the model as transformers made it, without adapters or quantisation.")
    norms = _norms(model)
    eps = _eps(next(iter(norms.values())))
    for name, norm in norms.items():
        need(_eps(norm) == eps, f"eps {_eps(norm)} in {name}", f"{eps}, as in the first norm")
    asked = config.to_dict()
    need(not asked.get("is_decoder"), "is_decoder", "an encoder")
    need(not asked.get("add_cross_attention"), "add_cross_attention", "an encoder")
    need(asked.get("position_embedding_type", "absolute") == "absolute", f"position_embedding_type {asked.get('position_embedding_type')}", "absolute")
    need(config.pad_token_id is not None, "no pad_token_id", "the id of the padding")
    need(config.model_type != "mpnet" or config.pad_token_id == 1, f"pad_token_id {config.pad_token_id}", "1, which MPNet's code holds fast")
    if type(model).__name__.endswith(CLASSIFIES):
        need(config.problem_type in (None, *PROBLEMS), f"problem_type {config.problem_type}", f"one of {', '.join(PROBLEMS)}")


def _task(config: Any) -> Task:
    """What transformers takes the outputs for: where nothing is said, one output is a number."""
    return PROBLEMS[config.problem_type] if config.problem_type else "regression" if config.num_labels == 1 else "classification"


def _modern_mean(config: Any) -> bool:
    return config.model_type == "modernbert" and config.classifier_pooling == "mean"


def _tensor(ours: str, source: Source, a: Architecture) -> Tensor:
    """The tensor of the source that belongs to ours."""
    module, _, leaf = ours.rpartition(".")
    parts, base = source.family.parts, source.base
    if module == "head.project" or module.startswith("head.project."):
        return source.take(_head(module, source, a) + f".{leaf}")
    if ours in ("tokeniser.position", "tokeniser.kind"):
        table = source.take(f"{base}{parts[ours]}.weight")
        task = f"{base}embeddings.task_type_embeddings.weight"
        return table + source.take(task)[0] if ours == "tokeniser.kind" and task in source.found else table  # ERNIE: a text without a task has task 0
    if not module.startswith("blocks."):
        return source.take(f"{base}{parts[module]}.{leaf}")
    _, index, part = module.split(".", 2)
    block = source.block(int(index))
    if leaf == "relative":
        return source.take(f"{base}{parts['mixer.relative']}.weight")
    if leaf in ("position_key", "position_query"):
        return _by_distance(leaf, block, source, a)
    if part == "mixer.qkv":
        rows, terms = _rows_by_head(leaf, block, source, a), _terms(a)
        return (torch.cat((rows[:, :1].double() / math.sqrt(terms), rows[:, 1:].double()), 1) if terms > 1 else rows).flatten(0, 2)
    if part in ("ffn.up", "ffn.gate") and "wide" in parts:
        return source.take(f"{block}{parts['wide']}.{leaf}").chunk(2)[part == "ffn.gate"]
    return source.take(f"{block}{parts[part]}.{leaf}")


def _rows_by_head(leaf: str, block: str, source: Source, a: Architecture) -> Tensor:
    """Rows of queries, keys and values, (heads, 3, channels, ...)."""
    parts, channels = source.family.parts, a.dim // a.heads
    if "grouped" in parts and leaf == "weight":
        return source.take(f"{block}{parts['grouped']}.weight").unflatten(0, (a.heads, 3, channels))
    if "fused" in parts:
        return source.take(f"{block}{parts['fused']}.{leaf}").unflatten(0, (3, a.heads, channels)).transpose(0, 1)
    if "grouped" in parts:
        query, value = (source.take(block + parts[name]) for name in ("query", "value"))
        each = query, torch.zeros_like(query), value
    else:
        each = [source.take(f"{block}{parts[name]}.{leaf}") for name in ("query", "key", "value")]
    return torch.stack([rows.unflatten(0, (a.heads, channels)) for rows in each], 1)


def _by_distance(leaf: str, block: str, source: Source, a: Architecture) -> Tensor:
    """Keys or queries of the distances that a text can have, with their scale: the shared table, normed where it is, by the block's weights."""
    parts, base, channels = source.family.parts, source.base, a.dim // a.heads
    side, (first, last) = a.relative_buckets // 2, reach(a.length, a.relative_buckets, a.relative_range)
    table = source.take(f"{base}{parts['relative']}.weight").double()
    norm = base + parts.get("relative_norm", "")
    if f"{norm}.weight" in source.found:
        table = F.layer_norm(table, (a.dim,), source.take(f"{norm}.weight").double(), source.take(f"{norm}.bias").double(), a.eps)
    name = block + parts[leaf]
    if f"{name}.weight" not in source.found:  # share_att_key: distances are projected as the content is
        name = block + parts[leaf.removeprefix("position_")]
    bias = source.take(f"{name}.bias").double() if f"{name}.bias" in source.found else None
    seen = F.linear(table[side + first : side + last + 1], source.take(f"{name}.weight").double(), bias)
    scale = channels if leaf == "position_key" else channels * _terms(a)  # the queries that look at position_key are divided by the rest
    return seen.unflatten(1, (a.heads, channels)).permute(1, 2, 0) / math.sqrt(scale)


def _terms(a: Architecture) -> int:
    """How many products make up a score."""
    return 1 + a.content_to_position + a.position_to_content


def _head(module: str, source: Source, a: Architecture) -> str:
    """Name of the source's layer for one of the head's."""
    family = source.family
    if a.task == "token_classification" and not module.endswith((".0", ".2")):
        return "classifier"
    hidden = (family.hidden[0] if a.classes else family.pooler).format(source.base)
    places = {0: hidden, 2: f"{hidden.rpartition('.')[0]}.norm"} if a.head_hidden else {}
    place = int(module.rpartition(".")[2]) if module != "head.project" else -1
    return family.classes if place not in places or (place == 2 and not a.head_hidden_norm) else places[place]


def _norms(model: nn.Module) -> dict[str, Any]:
    return {name: part for name, part in model.named_modules() if type(part).__name__.endswith("LayerNorm")}


def _eps(norm: Any) -> float:
    return norm.eps if isinstance(norm, nn.LayerNorm) else norm.variance_epsilon  # of DeBERTa's first version


def _rows(embeddings: nn.Module, name: str) -> int:
    found = getattr(embeddings, name, None)
    return found.num_embeddings if isinstance(found, nn.Embedding) else 0


def _name(module: object) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
