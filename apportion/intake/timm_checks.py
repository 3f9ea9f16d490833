"""What must hold of a timm model so that the network does what its forward does: classes that are known, attributes that a forward looks at, one flavour.

Written against timm 1.0.31. Import through `read.py`, which readies torchvision first.
"""

from __future__ import annotations

from typing import Any, Literal

from timm import layers
from timm.layers import activations
from timm.layers.format import Format
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat, RotaryEmbeddingDinoV3
from timm.models import beit, deit, eva, vision_transformer
from torch import nn

from apportion.errors import Refused

MODELS = {vision_transformer.VisionTransformer, deit.VisionTransformerDistilled, beit.Beit, eva.Eva}
BLOCKS = {vision_transformer.Block, vision_transformer.ResPostBlock, beit.Block, eva.EvaBlock, eva.EvaBlockPostNorm}
NORM_ON_BRANCH = {vision_transformer.ResPostBlock, eva.EvaBlockPostNorm}
MIXERS = {layers.Attention, layers.AttentionRope, beit.Attention, eva.EvaAttention}
FFNS = {layers.Mlp, layers.GluMlp, layers.SwiGLU}
ROTARY = {RotaryEmbeddingCat, RotaryEmbeddingDinoV3}
PARTS = {layers.PatchEmbed, layers.LayerScale, layers.AttentionPoolLatent, beit.RelativePositionBias, nn.Sequential, nn.ModuleList, nn.Linear, nn.Conv2d}
NORMS = {layers.LayerNorm, nn.LayerNorm}
SILENT = {nn.Identity, nn.Dropout, layers.DropPath}  # nothing happens in them at inference
ACTIVATIONS = {nn.GELU, activations.GELU, activations.GELUTanh, activations.QuickGELU, nn.ReLU, nn.SiLU}
KNOWN = BLOCKS | MIXERS | FFNS | ROTARY | PARTS | NORMS | SILENT | ACTIVATIONS
IN_THE_WAY = {
    "Swin": "windows that shift, and patches that are joined on the way",
    "NaFlex": "images of any shape in one batch",
    "Hiera": "fewer and wider tokens on the way",
    "MultiScale": "fewer and wider tokens on the way",
    "PoolingVision": "fewer and wider tokens on the way",
    "Pyramid": "fewer and wider tokens on the way",
    "RelPos": "a relative position bias that a small network makes",
    "SAM": "windows, and an answer for each place",
    "Cait": "a class token that joins after most blocks",
    "Xcit": "attention between channels",
    "ConViT": "attention mixed with fixed positions by a gate",
    "CrossViT": "two streams of patches",
    "TNT": "patches within patches",
    "VOLO": "attention within windows before the blocks",
    "LevitDistilled": "convolutions in place of products",
    "ResNet": "no transformer",
    "ConvNeXt": "no transformer",
}


def check(model: Any) -> None:
    """Raises Refused, naming the first module that the network has no exact counterpart of."""
    if type(model) not in MODELS:
        reason = next((f": {why}" for part, why in IN_THE_WAY.items() if part.lower() in type(model).__name__.lower()), "")
        raise refusal(f"model of class {name_of(model)}{reason}", wanted="timm's VisionTransformer (also distilled), Beit or Eva")
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            raise refusal(f"hooks or a replaced forward on {name or 'the model'}", wanted="modules as timm made them", do="Remove the hooks and read again.")
        if name and type(module) not in KNOWN:
            raise refusal(f"{name} of class {name_of(module)}")
    need(type(model.blocks) in (nn.Sequential, nn.ModuleList) and len(model.blocks) > 0, "no blocks", "at least one")
    for index, block in enumerate(model.blocks):
        _check_block(f"blocks.{index}", block, model)
    for name, module in model.named_modules():
        _check_flavour(name, module, model.blocks[0])
    _check_tokens(model)
    _check_places(model)
    _check_pool(model)


def _check_flavour(name: str, module: Any, first: Any) -> None:
    """One kind of norm and one activation throughout."""
    if type(module) in NORMS:
        need(module.eps == first.norm1.eps, f"eps {module.eps} in {name}", f"{first.norm1.eps}, as in blocks.0.norm1")
        need(module.weight is not None and module.bias is not None and len(module.normalized_shape) == 1, f"{name} without weight or bias", "both")
        need(type(module) is nn.LayerNorm or not module._fast_norm, f"fast norm in {name}", "timm.layers.set_fast_norm(False) when the model is made")
    if type(module) in ACTIVATIONS:
        ours = activation(first.mlp.act)
        need(activation(module) == ours, f"{name} of class {name_of(module)}", f"{ours}, as in blocks.0.mlp.act")


def _check_tokens(model: Any) -> None:
    """What happens before the first block, at the size that the model was made for."""
    embed, conv = model.patch_embed, model.patch_embed.proj
    kind("patch_embed", embed, layers.PatchEmbed)
    kind("patch_embed.proj", conv, nn.Conv2d)
    kind("patch_embed.norm", embed.norm, nn.Identity)
    need(type(part(model, "patch_drop")) in (nn.Identity, type(None)), f"patch_drop of class {name_of(part(model, 'patch_drop'))}", "none")
    patch = embed.patch_size
    square = embed.img_size is not None and embed.img_size[0] == embed.img_size[1] and patch[0] == patch[1]
    need(square, f"images {embed.img_size}, patches {patch}", "squares")
    plain = conv.stride == conv.kernel_size == tuple(patch) and conv.padding == (0, 0) and conv.dilation == (1, 1) and conv.groups == 1
    need(plain, f"patch_embed.proj {conv}", "patches side by side")
    need(not embed.dynamic_img_pad, "patch_embed that pads images", "images of whole patches: make the model with dynamic_img_pad=False")
    need(embed.output_fmt == (Format.NHWC if part(model, "dynamic_img_size") else Format.NCHW), f"patch_embed that gives {embed.output_fmt}", "rows of patches")
    tokens = [part(model, name) for name in ("cls_token", "dist_token", "reg_token")]
    count = sum(0 if token is None else token.shape[1] for token in tokens)
    need(model.num_prefix_tokens == count, f"num_prefix_tokens {model.num_prefix_tokens}", f"{count}, the class, distillation and register tokens")
    need(model.cls_token is None or model.cls_token.shape[1] == 1, "several class tokens", "one")


def _check_block(name: str, block: Any, model: Any) -> None:
    first, attn = model.blocks[0], part(block, "attn")
    need(type(block) in BLOCKS, f"{name} of class {name_of(block)}", "a block whose forward is known")
    need(type(attn) in MIXERS, f"{name}.attn of class {name_of(attn)}", "attention whose forward is known")
    need(type(block.mlp) in FFNS, f"{name}.mlp of class {name_of(block.mlp)}", "an FFN whose forward is known")
    for one, other, where in ((block, first, ""), (attn, first.attn, ".attn"), (block.mlp, first.mlp, ".mlp")):
        need(type(one) is type(other), f"{name}{where} of class {name_of(one)}", f"{name_of(other)}, as in blocks.0")
    for norm in ("norm1", "norm2"):
        need(type(getattr(block, norm)) in NORMS, f"{name}.{norm} of class {name_of(getattr(block, norm))}", "LayerNorm")
    heads, inner = attn.num_heads, attn.proj.in_features
    need(part(attn, "gate") is None, f"{name}.attn.gate", "attention without a gate")
    need(heads == first.attn.num_heads, f"{heads} heads in {name}", f"{first.attn.num_heads}, as in blocks.0")
    need(part(attn, "num_kv_heads") in (None, heads), f"{name}.attn whose heads share keys and values", "keys and values for each head")
    need(inner == model.embed_dim and inner % heads == 0, f"heads of {inner / heads:g} channels in {name}", f"{model.embed_dim} channels over {heads} heads")
    need(attn.scale == (inner // heads) ** -0.5, f"scores scaled by {attn.scale} in {name}", "channels ** -0.5")
    need(part(block.mlp, "chunk_dim") in (None, -1), f"{name}.mlp of convolutions", "products")


def _check_places(model: Any) -> None:
    """Positions within the blocks."""
    rope, grid = part(model, "rope"), model.patch_embed.grid_size[0]
    for name, module in model.named_modules():
        if part(module, "relative_position_bias_table") is not None:
            need(tuple(module.window_size) == (grid, grid), f"{name} for {module.window_size} patches", f"{(grid, grid)}, those of patch_embed")
    if rope is None:
        return
    channels = model.embed_dim // model.blocks[0].attn.num_heads
    need(rope.dim == channels and channels % 4 == 0, f"rope over {rope.dim} channels of {channels}", "all of them, in fours")
    if type(rope) is RotaryEmbeddingCat:
        need(not rope.in_pixels and rope.grid_type == "index", f"rope on a grid of kind {rope.grid_type!r}", "numbered rows and columns")
        need(rope.ref_feat_shape is None or rope.ref_feat_shape[0] == rope.ref_feat_shape[1], f"rope with ref_feat_shape {rope.ref_feat_shape}", "a square")
    else:
        need(rope.min_period is None and rope.max_period is None, "rope with min_period and max_period", "a temperature")
    for index, block in enumerate(model.blocks):
        need(block.attn.rotate_half == rope.rotate_half, f"blocks.{index}.attn.rotate_half {block.attn.rotate_half}", f"{rope.rotate_half}, as in rope")
        need(block.attn.num_prefix_tokens == model.num_prefix_tokens, f"blocks.{index}.attn.num_prefix_tokens", "that of the model")


def _check_pool(model: Any) -> None:
    """What happens after the last block."""
    prefix, pool = model.num_prefix_tokens, part(model, "attn_pool")
    include = part(model, "pool_include_prefix") or type(model) is eva.Eva  # Eva's pool attends to all tokens; its mean never includes the prefix
    need(type(model.head) in {nn.Linear, nn.Identity}, f"head of class {name_of(model.head)}", "Linear or Identity")
    if pool is None:
        need(model.global_pool in ("token", "avg"), f"global_pool {model.global_pool!r}", "token, avg or map")
        need(model.global_pool != "token" or model.cls_token is not None, "pooling of a class token that is not there", "a class token")
        mean = model.global_pool == "avg" and prefix and part(model, "pool_include_prefix")
        need(not mean, "a mean that includes class or register tokens", "of the patches")
        return
    kind("attn_pool", pool, layers.AttentionPoolLatent)
    need(pool.head_dim * pool.num_heads == model.embed_dim, f"{pool.num_heads} heads of {pool.head_dim} in attn_pool", f"{model.embed_dim} channels")
    need(pool.latent_len == 1 and pool.pool in ("token", "avg"), f"attn_pool with {pool.latent_len} latents", "one")
    need(pool.scale == pool.head_dim**-0.5, f"scores scaled by {pool.scale} in attn_pool", "head_dim ** -0.5")
    need(not prefix or include, "attn_pool that leaves out class or register tokens", "no such tokens")
    kind("attn_pool.q", pool.q, nn.Linear)
    kind("attn_pool.mlp", pool.mlp, layers.Mlp)
    kind("attn_pool.mlp.norm", pool.mlp.norm, nn.Identity)
    need(type(pool.norm) in NORMS, f"attn_pool.norm of class {name_of(pool.norm)}", "LayerNorm")


def activation(module: nn.Module) -> Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu"]:
    if type(module) is nn.ReLU:
        return "relu"
    if type(module) is nn.SiLU:
        return "silu"
    if type(module) is activations.QuickGELU:
        return "quick_gelu"
    if type(module) is activations.GELUTanh or (type(module) is nn.GELU and module.approximate == "tanh"):
        return "gelu_tanh"
    if type(module) in (nn.GELU, activations.GELU):
        return "gelu"
    raise refusal(f"activation of class {name_of(module)}", wanted="GELU, its tanh or sigmoid forms, SiLU or ReLU")


def part(module: Any, name: str) -> Any:
    """A part that not every class has; None where there is none."""
    return getattr(module, name, None)


def kind(name: str, module: nn.Module | None, wanted: type[nn.Module]) -> None:
    if type(module) is not wanted:
        raise refusal(f"{name} of class {name_of(module)}", wanted=wanted.__name__)


def need(held: bool, found: str, wanted: str) -> None:
    if not held:
        raise refusal(found, wanted=wanted)


def name_of(module: object) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def refusal(found: str, *, wanted: str = "modules with an exact counterpart in the network", do: str = "Use a model of a family that is read.") -> Refused:
    return Refused(found, wanted=wanted, do=do)
