"""timm's plain vision transformers as our network, exact or refused: ViT, DeiT (also distilled), DeiT-3, BEiT, EVA, EVA-02, DINOv2, DINOv3, CLIP, SigLIP.

Every module must be of a class whose forward is known here, every attribute that such a forward looks at is checked, and every tensor must find
its place: what is left over was not understood. Written against timm 1.0.31. Import through `read.py`, which readies torchvision first.
"""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any, Literal, NamedTuple

import torch
from timm import layers
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat
from torch import Tensor, nn

from apportion.errors import Refused
from apportion.intake.timm_checks import NORM_ON_BRANCH, NORMS, activation, check, need, part, refusal
from apportion.network import Architecture, Network

POOLS: dict[str, Literal["class_token", "mean", "attention_pool"]] = {"token": "class_token", "avg": "mean", "map": "attention_pool"}

OURS_TO_TIMM = {
    "tokeniser.project": "patch_embed.proj",
    "tokeniser.norm": "norm_pre",
    "norm": "norm",
    "head.query": "attn_pool.q",
    "head.key_value": "attn_pool.kv",
    "head.proj": "attn_pool.proj",
    "head.pool_norm": "attn_pool.norm",
    "head.up": "attn_pool.mlp.fc1",
    "head.down": "attn_pool.mlp.fc2",
    "head.norm": "fc_norm",
    "head.project": "head",
    "head.project_distilled": "head_dist",
}
BLOCK_TO_TIMM = {
    "norm1": "norm1",
    "mixer.query_norm": "attn.q_norm",
    "mixer.key_norm": "attn.k_norm",
    "mixer.norm": "attn.norm",
    "mixer.proj": "attn.proj",
    "norm2": "norm2",
    "ffn.up": "mlp.fc1",
    "ffn.norm": "mlp.norm",
    "ffn.down": "mlp.fc2",
}
SCALES = {"residual1": ("ls1.gamma", "gamma_1"), "residual2": ("ls2.gamma", "gamma_2")}


class Layout(NamedTuple):
    """How the source orders what ours orders otherwise."""

    channels: Tensor  # of a head's query and key: ours are in halves that turn together, rows before columns
    gate_last: bool  # which half of a fused layer is the gate


def read_vit(model: nn.Module, *, own: bool = True) -> Network:
    """A network with copies of the model's weights in float32, in evaluation mode. Raises Refused, naming what has no exact counterpart.

    A model that takes images of any size is read at the size that it was made for. Without `own`, weights that stay as they are look into the model's memory.
    """
    a = describe(model)
    with torch.device("meta"):
        network = Network(a)
    left, layout = {name: value.detach() for name, value in model.state_dict().items()}, _layout(model, a)
    shared = left.pop("rel_pos_bias.relative_position_bias_table", None)
    seen = ((name, _tensor(name, left, layout, shared, a).float().cpu()) for name in network.state_dict())
    state = {name: value.clone() if own else value for name, value in seen}
    if left:
        raise refusal(f"{next(iter(left))}, which has no place in the network")
    for name, value in network.state_dict().items():
        need(state[name].shape == value.shape, f"{tuple(state[name].shape)} for {name}", str(tuple(value.shape)))
    network.load_state_dict(state, assign=True)
    return network.eval()


def resized(model: nn.Module, image_size: int) -> nn.Module:
    """A copy of the model for images of another size: learned positions and position biases are resampled, as timm does, and rotary ones are counted anew.

    Heal it, or expect to lose some accuracy. Raises Refused for a size that is no multiple of the patch, and for models that are not read.
    """
    check(model)
    made: Any = copy.deepcopy(model)
    patch = made.patch_embed.patch_size[0]
    if image_size < patch or image_size % patch:
        raise Refused(f"image size {image_size} for patches of {patch}", wanted=f"a multiple of {patch}", do="Choose the nearest multiple.")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.searchsorted|Using a non-tuple")  # timm's resampling of tables, as torch sees it
        made.set_input_size(img_size=(image_size, image_size))
    return made


def describe(model: nn.Module) -> Architecture:
    """The shape of a timm model. Raises Refused for everything that its forward would do and the network would not."""
    check(model)
    vit: Any = model
    embed, first = vit.patch_embed, vit.blocks[0]
    registers, distilled, pool = part(vit, "reg_token"), part(vit, "dist_token"), part(vit, "attn_pool")
    learned = vit.pos_embed is not None
    start, step = _coordinates(part(vit, "rope"), embed.grid_size[0])
    table = part(first.attn, "relative_position_bias_table")
    table = table if part(vit, "rel_pos_bias") is None else vit.rel_pos_bias.relative_position_bias_table
    return Architecture(
        image_size=embed.img_size[0],
        patch=embed.patch_size[0],
        dim=vit.embed_dim,
        depth=len(vit.blocks),
        heads=first.attn.num_heads,
        hidden=first.mlp.fc2.in_features,
        classes=vit.head.out_features if isinstance(vit.head, nn.Linear) else 0,
        channels=embed.proj.in_channels,
        patch_bias=embed.proj.bias is not None,
        class_token=vit.cls_token is not None,
        registers=(0 if registers is None else registers.shape[1]) + (distilled is not None),
        learned_positions=learned,
        position_prefix=learned and not part(vit, "no_embed_class"),
        rotary=0.0 if part(vit, "rope") is None else float(vit.rope.temperature),
        rotary_start=start,
        rotary_step=step,
        relative_buckets=0 if table is None else len(table),
        stem_norm=type(part(vit, "norm_pre")) in NORMS,
        qkv_bias=_has_bias(first.attn),
        proj_bias=first.attn.proj.bias is not None,
        ffn_bias=first.mlp.fc2.bias is not None,
        gated=type(first.mlp) is not layers.Mlp,
        mixer_norm=type(part(first.attn, "norm")) in NORMS,
        ffn_norm=type(first.mlp.norm) in NORMS,
        qk_norm=type(part(first.attn, "q_norm")) in NORMS,
        norm_first=type(first) not in NORM_ON_BRANCH,
        norm_branch=type(first) in NORM_ON_BRANCH,
        layer_scale=type(part(first, "ls1")) is layers.LayerScale or part(first, "gamma_1") is not None,
        activation=activation(first.mlp.act),
        eps=first.norm1.eps,
        final_norm=type(vit.norm) in NORMS,
        head_norm=type(vit.fc_norm) in NORMS,
        head_bias=isinstance(vit.head, nn.Linear) and vit.head.bias is not None,
        pool="distilled" if distilled is not None else "attention_pool" if pool is not None else POOLS[vit.global_pool],
        pool_heads=0 if pool is None or pool.num_heads == first.attn.num_heads else pool.num_heads,
        pool_hidden=0 if pool is None or pool.mlp.fc1.out_features == first.mlp.fc2.in_features else pool.mlp.fc1.out_features,
    )


def _has_bias(attn: Any) -> bool:
    query = attn.qkv if part(attn, "q_proj") is None else attn.q_proj
    return query.bias is not None or part(attn, "q_bias") is not None


def _coordinates(rope: Any, grid: int) -> tuple[float, float]:
    """Where the first row of patches lies and how far the next, in what rotary positions multiply their rates with."""
    if rope is None:
        return 0.0, 1.0
    if type(rope) is RotaryEmbeddingCat:
        step = 1.0 if rope.ref_feat_shape is None else rope.ref_feat_shape[0] / grid
        return rope.grid_offset * step, step
    return 2 * math.pi * (2 * (0.5 + rope.grid_offset) / grid - 1), 4 * math.pi / grid  # DINOv3: middles of patches on a side from -1 to 1, in turns


def _layout(model: nn.Module, a: Architecture) -> Layout:
    rope, order = part(model, "rope"), torch.arange(a.dim // a.heads)
    if rope is not None:
        pairs = order.view(2, -1).T if rope.rotate_half else order.view(-1, 2)
        if rope.grid_indexing == "xy":
            pairs = pairs.roll(len(pairs) // 2, 0)
        order = pairs.T.flatten()
    first: Any = model.get_submodule("blocks")[0]  # pyright: ignore[reportIndexIssue]
    return Layout(order, bool(part(first.mlp, "gate_last")))


def _tensor(ours: str, left: dict[str, Tensor], layout: Layout, shared: Tensor | None, a: Architecture) -> Tensor:
    """The tensor of the source that belongs to ours; it is taken out of what is `left`, halves of a fused one when the second is taken."""

    def take(name: str, *, keep: bool = False) -> Tensor:
        if name not in left:
            raise refusal(f"no {name}", wanted="every block alike, with weights and biases where the network has them")
        return left[name] if keep else left.pop(name)

    if ours == "tokeniser.first":
        return torch.cat([take(name)[0] for name in ("cls_token", "dist_token", "reg_token") if name in left])
    if ours == "tokeniser.position":
        return take("pos_embed")[0]
    if ours == "head.latent":
        return take("attn_pool.latent")[0]
    module, _, leaf = ours.rpartition(".")
    if not module.startswith("blocks."):
        return take(f"{OURS_TO_TIMM[module]}.{leaf}")
    _, index, where = module.split(".", 2)
    block = f"blocks.{index}."
    if where in SCALES:
        return take(block + next((name for name in SCALES[where] if block + name in left), SCALES[where][0]))
    if leaf == "relative":
        return take(f"{block}attn.relative_position_bias_table") if shared is None else shared
    if where == "mixer.qkv":
        value = _qkv(f"{block}attn.", leaf, left, take).unflatten(0, (3, a.heads, a.dim // a.heads))
        query, key, value = value.unbind(0)  # timm: all queries, all keys, all values; ours: head by head, so that a prefix of rows is a prefix of heads
        return torch.stack((query[:, layout.channels], key[:, layout.channels], value), 1).flatten(0, 2)
    if where in ("ffn.up", "ffn.gate") and a.gated:
        up = where == "ffn.up"
        if f"{block}mlp.fc1_{'g' if up else 'x'}.{leaf}" in left:
            return take(f"{block}mlp.fc1_{'g' if up else 'x'}.{leaf}")
        return take(f"{block}mlp.fc1.{leaf}", keep=up).chunk(2)[up == layout.gate_last]
    value = take(f"{block}{BLOCK_TO_TIMM[where]}.{leaf}")
    return value[layout.channels] if where in ("mixer.query_norm", "mixer.key_norm") else value


def _qkv(attn: str, leaf: str, left: dict[str, Tensor], take: Any) -> Tensor:
    """All queries, all keys, all values; a bias that keys do not have is zero."""
    if leaf == "bias" and f"{attn}q_bias" in left:
        query, value = take(f"{attn}q_bias"), take(f"{attn}v_bias")
    elif f"{attn}q_proj.{leaf}" in left:
        query, value = take(f"{attn}q_proj.{leaf}"), take(f"{attn}v_proj.{leaf}")
    else:
        return take(f"{attn}qkv.{leaf}")
    key = take(f"{attn}k_proj.{leaf}") if f"{attn}k_proj.{leaf}" in left else torch.zeros_like(query)
    return torch.cat((query, key, value))
