"""Small networks of every flavour, made-up tokens, random paths, and an oracle that computes a network from its weights alone."""

from __future__ import annotations

import copy
import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apportion.methods import find, names
from apportion.methods.slots import Mixed
from apportion.network import Architecture, Network, put
from apportion.network.surgery import builder
from apportion.vocab import Choice, Path, Tokens

torch.set_num_threads(1)

DIM, HEADS, DEPTH, HIDDEN = 32, 4, 4, 64
FLAVOURS: dict[str, dict] = {
    "class_token": {},
    "registers": {"registers": 3, "position_prefix": False},
    "mean": {"class_token": False, "pool": "mean", "head_norm": True, "final_norm": False},
    "attention_pool": {"class_token": False, "pool": "attention_pool"},
    "post_norm": {"norm_first": False, "final_norm": False},
    "qk_norm": {"qk_norm": True, "qkv_bias": False},
    "layer_scale": {"layer_scale": True, "activation": "gelu_tanh"},
    "conv_stem": {"stem": "conv", "activation": "relu"},
    "clip": {"stem_norm": True, "patch_bias": False, "activation": "quick_gelu", "head_bias": False, "proj_bias": False},
}
PLAN = (Choice("reducer", "tome"), Choice("ffn", "matformer"), Choice("mixer", "head_prefix"), Choice("depth", "skip"))


@torch.no_grad()
def shake(module: nn.Module, *, seed: int = 0) -> nn.Module:
    """Make every bias, gain and scale count: at their initial zeros and ones, a part that is left out changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
        else:
            parameter.mul_(2)
    return module


def tiny(flavour: str = "class_token", *choices: Choice, seed: int = 0) -> Network:
    """A shaken network in eval mode, parameters frozen, with these choices put in."""
    torch.manual_seed(seed)
    shape = Architecture(image_size=16, patch=4, dim=DIM, depth=DEPTH, heads=HEADS, hidden=HIDDEN, classes=5, **FLAVOURS[flavour])
    network = Network(shape).eval().requires_grad_(False)
    shake(network, seed=seed)
    for choice in choices:
        put(network, choice)
    return network


def images(batch: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_paths(network: Network, count: int, *, seed: int = 0) -> list[Path]:
    """Full first, then paths that mix every axis the network offers, block by block."""
    rng, space = random.Random(seed), network.space
    paths = [space.full]
    while len(paths) < count:
        blocks, left, tokens = rng.choice(space.orders), space.tokens, []
        for _ in blocks:
            left -= rng.randint(0, (left - space.prefix) // 2) if space.reduces else 0
            tokens.append(left)
        path = space.path(blocks=blocks, tokens=tokens, heads=[rng.choice(space.heads) for _ in blocks], width=[rng.choice(space.width) for _ in blocks])
        if path not in paths:
            paths.append(path)
    return paths


def reducers(flavour: str = "class_token") -> list[str]:
    """The reducers that can stand in a network of this flavour."""
    needs_class_token = {"evit"} if FLAVOURS[flavour].get("class_token") is False else set()
    return [name for name in names("reducer") if find("reducer", name).reduces and name not in needs_class_token]


def fitted(slot: str, name: str) -> tuple[nn.Module, nn.Module]:
    """The part that a method makes of a small network's dense part, and that dense part: the same one where the method is the dense part."""
    network, method = tiny(), find(slot, name)
    dense = network.depth if slot == "depth" else getattr(network.blocks[0], "residual1" if slot == "residual" else slot)
    return (dense if type(dense) is method else builder(network, method, Choice(slot, name))(copy.deepcopy(dense))), dense


def tokens_of(batch: int, n: int, *, prefix: int = 1, dim: int = DIM, seed: int = 0) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    return Tokens(torch.randn(batch, n, dim, generator=generator), torch.ones(batch, n), torch.arange(n).expand(batch, n), prefix)


def mixed_of(tokens: Tokens, *, heads: int = HEADS, seed: int = 1) -> Mixed:
    generator = torch.Generator().manual_seed(seed)
    b, n, d = tokens.x.shape
    query, key = torch.randn(2, b, heads, n, DIM // HEADS, generator=generator)
    return Mixed(torch.zeros(b, n, d), query, key)


def rows(value: Tensor | Tokens | Mixed, index: Tensor | list[int] | slice):
    """Some samples of a batch of tensors."""
    return value[index] if isinstance(value, Tensor) else type(value)(*(part if isinstance(part, int) else part[index] for part in value))  # pyright: ignore


def state_of(module: nn.Module) -> dict[str, object]:
    """Everything that a module and its children hold, copied, so that a change shows."""
    return {name: _frozen(vars(child)) for name, child in module.named_modules()}


def _frozen(value: object) -> object:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, nn.Module):
        return id(value)
    if isinstance(value, dict):
        return {key: _frozen(item) for key, item in value.items()}
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple | set) else value


def assert_same_state(before: object, after: object, where: str = "") -> None:
    if isinstance(before, dict) and isinstance(after, dict):
        assert before.keys() == after.keys(), f"{where}: {sorted(map(str, before.keys() ^ after.keys()))} came or went"
        for key in before:
            assert_same_state(before[key], after[key], f"{where}.{key}")
    elif isinstance(before, Tensor) and isinstance(after, Tensor):
        assert torch.equal(before, after), f"{where} changed"
    else:
        assert type(before) is type(after) and before == after, f"{where} changed from {before} to {after}"


def naive(network: Network, inputs: Tensor) -> Tensor:
    """What a dense network's weights say, by the definitions, with no code of the network's own: pre-norm or post-norm encoder, any head."""
    a, w = network.architecture, network.state_dict()
    activation = {"gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "quick_gelu": lambda x: x * (1.702 * x).sigmoid(), "relu": F.relu}

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def norm(x: Tensor, name: str) -> Tensor:
        if f"{name}.weight" not in w:
            return x
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + a.eps).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def softmax(x: Tensor) -> Tensor:
        return x.exp() / x.exp().sum(-1, keepdim=True)

    def attention(x: Tensor, block: str) -> Tensor:
        c, out = a.dim // a.heads, []
        qkv = linear(x, f"{block}.mixer.qkv")
        for head in range(a.heads):
            q, k, v = qkv[..., head * 3 * c : (head + 1) * 3 * c].split(c, -1)
            q, k = norm(q, f"{block}.mixer.query_norm"), norm(k, f"{block}.mixer.key_norm")
            out.append(softmax(q @ k.transpose(1, 2) / c**0.5) @ v)
        return linear(torch.cat(out, -1), f"{block}.mixer.proj")

    def ffn(x: Tensor, block: str) -> Tensor:
        return linear(activation[a.activation](linear(x, f"{block}.ffn.up")), f"{block}.ffn.down")

    x = norm(_stemmed(a, w, inputs), "tokeniser.norm")
    for block in (f"blocks.{i}" for i in range(a.depth)):
        first, second = w.get(f"{block}.residual1.scale", 1), w.get(f"{block}.residual2.scale", 1)
        if a.norm_first:
            x = x + first * attention(norm(x, f"{block}.norm1"), block)
            x = x + second * ffn(norm(x, f"{block}.norm2"), block)
        else:
            x = norm(x + first * attention(x, block), f"{block}.norm1")
            x = norm(x + second * ffn(x, block), f"{block}.norm2")
    x = norm(x, "norm")
    if a.pool == "class_token":
        pooled = x[:, 0]
    elif a.pool == "mean":
        pooled = x[:, a.prefix :].mean(1)
    else:
        c, query, (keys, values) = a.dim // a.heads, linear(w["head.latent"], "head.query"), linear(x, "head.key_value").chunk(2, -1)
        heads = [softmax(query[:, i : i + c] @ keys[..., i : i + c].transpose(1, 2) / c**0.5) @ values[..., i : i + c] for i in range(0, a.dim, c)]
        pooled = linear(torch.cat(heads, -1)[:, 0], "head.proj")
        pooled = pooled + linear(activation[a.activation](linear(norm(pooled, "head.pool_norm"), "head.up")), "head.down")
    return linear(norm(pooled, "head.norm"), "head.project")


def _stemmed(a: Architecture, w: dict[str, Tensor], inputs: Tensor) -> Tensor:
    """Patches of the image, projected, with positions and the tokens in front."""
    if a.stem == "conv":
        layers = sorted({int(name.split(".")[2]) for name in w if name.startswith("tokeniser.project.")})
        x = inputs
        for layer in layers[:-1]:
            x = F.gelu(F.conv2d(x, w[f"tokeniser.project.{layer}.weight"], w[f"tokeniser.project.{layer}.bias"], stride=2, padding=1))
        x = F.conv2d(x, w[f"tokeniser.project.{layers[-1]}.weight"], w[f"tokeniser.project.{layers[-1]}.bias"]).flatten(2).transpose(1, 2)
    else:
        p = a.patch
        squares = [inputs[:, :, i : i + p, j : j + p].flatten(1) for i in range(0, a.image_size, p) for j in range(0, a.image_size, p)]
        x = torch.stack(squares, 1) @ w["tokeniser.project.weight"].flatten(1).T + w.get("tokeniser.project.bias", 0)
    if not a.prefix:
        return x + w["tokeniser.position"]
    first = w["tokeniser.first"].expand(len(x), -1, -1)
    return torch.cat((first, x), 1) + w["tokeniser.position"] if a.position_prefix else torch.cat((first, x + w["tokeniser.position"]), 1)
