"""timm's plain vision transformers as our network, exact or refused: ViT, DeiT, DeiT-3, DINOv2, CLIP image encoders, SigLIP.

Every module must be of a class whose forward is known here, every attribute that such a forward looks at is checked, and every tensor must find
its place: what is left over was not understood. Written against timm 1.0.31. Import through `read.py`, which readies torchvision first.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from timm import layers
from timm.layers import activations
from timm.layers.format import Format
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from apportion.errors import Refused
from apportion.network import Architecture, Network

PLAIN = {layers.PatchEmbed, layers.Attention, layers.Mlp, layers.LayerScale, layers.AttentionPoolLatent, Block, nn.Sequential, nn.Linear, nn.Conv2d}
NORMS = {layers.LayerNorm, nn.LayerNorm}
SILENT = {nn.Identity, nn.Dropout, layers.DropPath}  # nothing happens in them at inference
ACTIVATIONS = {nn.GELU, activations.GELU, activations.GELUTanh, activations.QuickGELU, nn.ReLU}
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
}
BLOCK_TO_TIMM = {
    "norm1": "norm1",
    "mixer.qkv": "attn.qkv",
    "mixer.query_norm": "attn.q_norm",
    "mixer.key_norm": "attn.k_norm",
    "mixer.proj": "attn.proj",
    "residual1": "ls1",
    "norm2": "norm2",
    "ffn.up": "mlp.fc1",
    "ffn.down": "mlp.fc2",
    "residual2": "ls2",
}


def read_vit(model: nn.Module) -> Network:
    """A network with copies of the model's weights in float32, in evaluation mode. Raises Refused, naming what has no exact counterpart."""
    architecture = describe(model)
    with torch.device("meta"):
        network = Network(architecture)
    left = {name: value.detach() for name, value in model.state_dict().items()}
    state = {name: _tensor(name, left, architecture).float().cpu().clone() for name in network.state_dict()}
    if left:
        raise _refusal(f"{next(iter(left))}, which has no place in the network")
    for name, value in network.state_dict().items():
        _need(state[name].shape == value.shape, f"{tuple(state[name].shape)} for {name}", str(tuple(value.shape)))
    network.load_state_dict(state, assign=True)
    return network.eval()


def describe(model: nn.Module) -> Architecture:
    """The shape of a timm model. Raises Refused for everything that its forward would do and the network would not."""
    if type(model) is not VisionTransformer:
        raise _refusal(f"model of class {_name(model)}", wanted="timm's own VisionTransformer: ViT, DeiT (not distilled), DeiT-3, DINOv2, CLIP, SigLIP")
    vit: Any = model
    for name, module in vit.named_modules():
        _check_class(name, module)
    _kind("blocks", vit.blocks, nn.Sequential)
    _need(len(vit.blocks) > 0, "no blocks", "at least one")
    for index, block in enumerate(vit.blocks):
        _check_block(f"blocks.{index}", block, vit)
    for name, module in vit.named_modules():
        _check_flavour(name, module, vit.blocks[0])
    _check_tokens(vit)
    _check_pool(vit)
    embed, first = vit.patch_embed, vit.blocks[0]
    return Architecture(
        image_size=embed.img_size[0],
        patch=embed.patch_size[0],
        dim=vit.embed_dim,
        depth=len(vit.blocks),
        heads=first.attn.num_heads,
        hidden=first.mlp.fc1.out_features,
        classes=vit.head.out_features if isinstance(vit.head, nn.Linear) else 0,
        channels=embed.proj.in_channels,
        patch_bias=embed.proj.bias is not None,
        class_token=vit.cls_token is not None,
        registers=0 if vit.reg_token is None else vit.reg_token.shape[1],
        position_prefix=not vit.no_embed_class,
        stem_norm=type(vit.norm_pre) in NORMS,
        qkv_bias=first.attn.qkv.bias is not None,
        proj_bias=first.attn.proj.bias is not None,
        qk_norm=type(first.attn.q_norm) in NORMS,
        layer_scale=type(first.ls1) is layers.LayerScale,
        activation=_activation(first.mlp.act),
        eps=first.norm1.eps,
        final_norm=type(vit.norm) in NORMS,
        head_norm=type(vit.fc_norm) in NORMS,
        head_bias=isinstance(vit.head, nn.Linear) and vit.head.bias is not None,
        pool="attention_pool" if vit.attn_pool is not None else POOLS[vit.global_pool],
    )


def _check_class(name: str, module: nn.Module) -> None:
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        raise _refusal(f"hooks or a replaced forward on {name or 'the model'}", wanted="modules as timm made them", do="Remove the hooks and read again.")
    if name and type(module) not in PLAIN | NORMS | SILENT | ACTIVATIONS:
        raise _refusal(f"{name} of class {_name(module)}")


def _check_flavour(name: str, module: Any, first: Any) -> None:
    """One kind of norm and one activation throughout."""
    if type(module) in NORMS:
        _need(module.eps == first.norm1.eps, f"eps {module.eps} in {name}", f"{first.norm1.eps}, as in blocks.0.norm1")
        _need(module.weight is not None and module.bias is not None and len(module.normalized_shape) == 1, f"{name} without weight or bias", "both")
        _need(type(module) is nn.LayerNorm or not module._fast_norm, f"fast norm in {name}", "timm.layers.set_fast_norm(False) when the model is made")
    if type(module) in ACTIVATIONS:
        ours = _activation(first.mlp.act)
        _need(_activation(module) == ours, f"{name} of class {_name(module)}", f"{ours}, as in blocks.0.mlp.act")


def _check_tokens(model: Any) -> None:
    """What happens before the first block."""
    embed, conv = model.patch_embed, model.patch_embed.proj
    _kind("patch_embed", embed, layers.PatchEmbed)
    _kind("patch_embed.proj", conv, nn.Conv2d)
    _kind("patch_embed.norm", embed.norm, nn.Identity)
    _kind("patch_drop", model.patch_drop, nn.Identity)
    patch = embed.patch_size
    square = embed.img_size is not None and embed.img_size[0] == embed.img_size[1] and patch[0] == patch[1]
    _need(square, f"images {embed.img_size}, patches {patch}", "squares")
    plain = conv.stride == conv.kernel_size == tuple(patch) and conv.padding == (0, 0) and conv.dilation == (1, 1) and conv.groups == 1
    _need(plain, f"patch_embed.proj {conv}", "patches side by side")
    fixed = embed.strict_img_size and not embed.dynamic_img_pad and not model.dynamic_img_size
    _need(fixed, "dynamic image size", "one size: make the model with dynamic_img_size=False")
    _need(embed.flatten and embed.output_fmt == Format.NCHW, f"patch_embed that gives {embed.output_fmt}", "a flat list of patches")
    _need(model.pos_embed is not None, "no pos_embed", "learned absolute positions")
    prefix = sum(0 if token is None else token.shape[1] for token in (model.cls_token, model.reg_token))
    _need(model.num_prefix_tokens == prefix, f"num_prefix_tokens {model.num_prefix_tokens}", f"{prefix}, the class and register tokens")
    _need(model.cls_token is None or model.cls_token.shape[1] == 1, "several class tokens", "one")


def _check_block(name: str, block: Any, model: Any) -> None:
    _kind(name, block, Block)
    _kind(f"{name}.attn", block.attn, layers.Attention)
    _kind(f"{name}.attn.norm", block.attn.norm, nn.Identity)
    _kind(f"{name}.mlp", block.mlp, layers.Mlp)
    _kind(f"{name}.mlp.norm", block.mlp.norm, nn.Identity)
    for part in ("norm1", "norm2"):
        _need(type(getattr(block, part)) in NORMS, f"{name}.{part} of class {_name(getattr(block, part))}", "LayerNorm")
    here, heads = block.attn, model.blocks[0].attn.num_heads
    _need(here.gate is None, f"{name}.attn.gate", "attention without a gate")
    _need(here.num_heads == heads, f"{here.num_heads} heads in {name}", f"{heads}, as in blocks.0")
    shared = here.head_dim * heads == here.attn_dim == model.embed_dim
    _need(shared, f"heads of {here.head_dim} channels in {name}", f"{model.embed_dim} channels over {heads} heads")
    _need(here.scale == here.head_dim**-0.5, f"scores scaled by {here.scale} in {name}", "head_dim ** -0.5")


def _check_pool(model: Any) -> None:
    """What happens after the last block."""
    prefix, pool = model.num_prefix_tokens, model.attn_pool
    _need(type(model.head) in {nn.Linear, nn.Identity}, f"head of class {_name(model.head)}", "Linear or Identity")
    if pool is None:
        _need(model.global_pool in ("token", "avg"), f"global_pool {model.global_pool!r}", "token, avg or map")
        _need(model.global_pool != "token" or model.cls_token is not None, "pooling of a class token that is not there", "a class token")
        _need(model.global_pool == "token" or not (prefix and model.pool_include_prefix), "a mean that includes class or register tokens", "of the patches")
        return
    _kind("attn_pool", pool, layers.AttentionPoolLatent)
    heads = model.blocks[0].attn.num_heads
    _need(pool.num_heads == heads and pool.head_dim * heads == model.embed_dim, f"{pool.num_heads} heads in attn_pool", f"{heads}, as in the blocks")
    _need(pool.latent_len == 1 and pool.pool in ("token", "avg"), f"attn_pool with {pool.latent_len} latents", "one")
    _need(pool.scale == pool.head_dim**-0.5, f"scores scaled by {pool.scale} in attn_pool", "head_dim ** -0.5")
    _need(not prefix or model.pool_include_prefix, "attn_pool that leaves out class or register tokens", "no such tokens")
    _kind("attn_pool.q", pool.q, nn.Linear)
    _kind("attn_pool.mlp", pool.mlp, layers.Mlp)


def _tensor(ours: str, left: dict[str, Tensor], a: Architecture) -> Tensor:
    """The tensor of the source that belongs to ours; it is taken out of what is `left`."""

    def take(name: str) -> Tensor:
        if name not in left:
            raise _refusal(f"no {name}", wanted="every block alike, with weights and biases where the network has them")
        return left.pop(name)

    if ours == "tokeniser.first":
        return torch.cat([take(name)[0] for name, here in (("cls_token", a.class_token), ("reg_token", a.registers)) if here])
    if ours == "tokeniser.position":
        return take("pos_embed")[0]
    if ours == "head.latent":
        return take("attn_pool.latent")[0]
    module, _, leaf = ours.rpartition(".")
    if not module.startswith("blocks."):
        return take(f"{OURS_TO_TIMM[module]}.{leaf}")
    _, index, part = module.split(".", 2)
    value = take(f"blocks.{index}.{BLOCK_TO_TIMM[part]}.{'gamma' if leaf == 'scale' else leaf}")
    if part == "mixer.qkv":  # timm: all queries, all keys, all values; ours: head by head, so that a prefix of rows is a prefix of heads
        return value.unflatten(0, (3, a.heads, a.dim // a.heads)).transpose(0, 1).flatten(0, 2)
    return value


def _activation(module: nn.Module) -> Literal["gelu", "gelu_tanh", "quick_gelu", "relu"]:
    if type(module) is nn.ReLU:
        return "relu"
    if type(module) is activations.QuickGELU:
        return "quick_gelu"
    if type(module) is activations.GELUTanh or (type(module) is nn.GELU and module.approximate == "tanh"):
        return "gelu_tanh"
    if type(module) in (nn.GELU, activations.GELU):
        return "gelu"
    raise _refusal(f"activation of class {_name(module)}", wanted="GELU, its tanh or sigmoid forms, or ReLU")


def _kind(name: str, module: nn.Module | None, kind: type[nn.Module]) -> None:
    if type(module) is not kind:
        raise _refusal(f"{name} of class {_name(module)}", wanted=kind.__name__)


def _need(held: bool, found: str, wanted: str) -> None:
    if not held:
        raise _refusal(found, wanted=wanted)


def _name(module: object) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _refusal(found: str, *, wanted: str = "modules with an exact counterpart in the network", do: str = "Use a model of a family that is read.") -> Refused:
    return Refused(found, wanted=wanted, do=do)
