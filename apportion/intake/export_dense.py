"""The way out again: one static path of a network as a state dict in its source's own names, heads and units really cut, skipped blocks left out.

It is the way in, run backwards: a copy of the source is filled with numbers instead of weights and read; each number then says from where it came.
So whatever a reader can read can be written, and there is no second table of names. Import through a caller that readied torchvision (`read.py`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from apportion.errors import Refused
from apportion.intake.verify import compare
from apportion.network import Architecture, Network
from apportion.vocab import Path, Step

BASE = 2**20  # numbers are passed through the reader in two halves, each of which float32 holds exactly
HEADS, INNER = ("num_heads", "num_kv_heads", "num_attention_heads", "n_heads"), ("attn_dim", "kv_dim", "all_head_size")


class Span(NamedTuple):
    """A parameter of the source and the numbers of its elements."""

    name: str
    start: int
    shape: torch.Size


def export_dense(network: Network, like: nn.Module, path: Path | None = None) -> dict[str, Tensor]:
    """A path (full where none is named) as tensors of the class of `like`, the timm or transformers model that was read; see `dense_model`.

    At the full path it loads into that class as it is. A path that cuts has tensors to match: `dense_model` gives the modules as well.
    """
    return {name: value.detach().clone() for name, value in dense_model(network, like, path).state_dict().items()}


@torch.no_grad()
def dense_model(network: Network, like: nn.Module, path: Path | None = None) -> nn.Module:
    """A copy of `like` with a path's weights in it, in float32, in evaluation mode: its own class without anything of ours, and its answers are the path's.

    `like` gives classes and names; its weights matter only where the network has none (a pooler that is not used). Answers are compared on made-up inputs
    before it is returned. Raises PathError for a path that the network cannot take, and Refused for one that the class cannot: fewer tokens, methods that
    add parameters, fewer heads in a class that takes them all, tables shared by blocks whose heads are sorted differently, biases where it has none.
    Cost: three copies of the source, one pass of each.
    """
    path = path or network.space.full
    network.space.check(path)
    a, read, answering, examples = _source(like, network.architecture)
    if a != network.architecture:
        ours, theirs = asdict(network.architecture), asdict(a)
        name = next(key for key in theirs if theirs[key] != ours[key])
        raise _refusal(f"{type(like).__name__} with {name} {theirs[name]}", f"{ours[name]}, as in the network", "Pass the model that was read.")
    if any(tokens != a.tokens for tokens in path.tokens):
        raise _refusal(f"path {path.name}, which takes tokens away", "all tokens: no class of the source does that", "Take another path.")
    if bridged := network.bridged(path):
        found = f"path {path.name}, in which a fitted map stands for blocks {', '.join(f'{first} to {last - 1}' for first, last in bridged)}"
        raise _refusal(found, "a path without: no class of the source has such a map", "Take another path, or export without the bridge.")
    weights = _plain(network)
    spans, places = _places(like, read)
    stem = _stem(spans, places, a)
    made: Any = copy.deepcopy(like).float().cpu().eval()
    blocks = made.get_submodule(stem)
    chosen = [copy.deepcopy(blocks[block]) for block in path.blocks]
    made.set_submodule(stem, type(blocks)(*chosen) if isinstance(blocks, nn.Sequential) else nn.ModuleList(chosen))
    state = _gathered({name: places[name] for name in weights if not name.startswith("blocks.")}, weights, spans, a)
    for index, step in enumerate(path.steps):
        ours = f"blocks.{step.block}."
        cut = {name: _cut(name, a, step) for name in weights if name.startswith(ours)}
        part = _gathered({n: places[n][at] for n, at in cut.items()}, {n: weights[n][at] for n, at in cut.items()}, spans, a)
        for name, value in part.items():
            inside = name.startswith(f"{stem}.{step.block}.")
            name = f"{stem}.{index}.{name.removeprefix(f'{stem}.{step.block}.')}" if inside else name
            if name in state and not torch.equal(state[name], value):
                raise _refusal(f"{name}, which blocks share and whose heads they sort differently", "one order", "Export before sorting by importance.")
            state[name] = value
    _put(made, state)
    for index, step in enumerate(path.steps):
        _tell(made.get_submodule(f"{stem}.{index}"), step.heads, a)
    if a.words:
        made.config.num_hidden_layers = len(chosen)
    for inputs in examples:
        try:
            compare(answering(made), network, inputs, f"written as {type(like).__name__}", path)
        except RuntimeError as error:
            raise _refusal(f"{type(like).__name__} along {path.name}: {error}", "a class that takes this many heads", "Take a path of full heads.") from error
    return made


def _source(like: nn.Module, ours: Architecture) -> tuple[Architecture, Callable[[nn.Module], Network], Callable[[nn.Module], nn.Module], list[Tensor]]:
    """The source's shape, its reader, the model as a function of one tensor, and inputs to compare on. Raises Refused for what has no source to go back to."""
    if ours.columns or ours.points or ours.samples or ours.frames:
        what = "rows of a table" if ours.columns else "time series" if ours.points else "sound"
        raise _refusal(f"a network of {what}", "one of images or texts: others have no way back", "Save it as a bundle.")
    if not ours.words:
        from apportion.intake.timm_vit import describe, read_vit

        a = describe(like)
        return a, read_vit, lambda made: made, [torch.randn(3, a.channels, a.image_size, a.image_size, generator=torch.Generator().manual_seed(0))]
    from apportion.intake import hf_text

    pooling = None if ours.classes else "pooler" if ours.head_hidden else "mean" if ours.pool == "mean" else "class_token"
    how: dict[str, Any] = {"length": ours.length, "pooling": pooling, "unit": ours.head_unit}
    a = hf_text.describe(like, **how)
    examples = [inputs[:3] for inputs in hf_text.examples(a)]
    return a, lambda made: hf_text.read_text(made, **how), lambda made: hf_text.Answering(made, pooling, ours.head_unit), examples


def _plain(network: Network) -> dict[str, Tensor]:
    """The weights under the names of a dense network: a method that wraps a part adds nothing of its own."""
    named = {name: value for name, value in network.state_dict().items() if not name.startswith("bridge.")}
    found = {name.replace(".part.", "."): value.detach().float().cpu() for name, value in named.items()}
    with torch.device("meta"):
        wanted = {name: value.shape for name, value in Network(network.architecture).state_dict().items()}
    if odd := sorted(name for name in found.keys() | wanted.keys() if name not in found or name not in wanted or found[name].shape != wanted[name]):
        raise _refusal(f"{odd[0]}, which {'a method added' if odd[0] in found else 'was folded away'}", "the dense parts", "Export without that method.")
    return found


def _places(like: nn.Module, read: Callable[[nn.Module], Network]) -> tuple[list[Span], dict[str, Tensor]]:
    """Parameters of the source, and for every element of ours the number of the element that it was read from; 0 where the reader put a zero."""
    spans, last = [], 1
    for name, parameter in like.named_parameters():
        spans.append(Span(name, last, parameter.shape))
        last += parameter.numel()
    halves = []
    for half in (lambda number: number // BASE, lambda number: number % BASE):
        numbered = copy.deepcopy(like).float().cpu()
        for span in spans:
            numbered.get_parameter(span.name).copy_(half(torch.arange(span.start, span.start + math.prod(span.shape))).view(span.shape))
        halves.append(read(numbered).state_dict())
    places = {name: halves[0][name].long() * BASE + halves[1][name].long() for name in halves[0]}
    flat = torch.cat([torch.zeros(1), *(like.get_parameter(span.name).detach().float().cpu().flatten() for span in spans)])
    for name, value in read(copy.deepcopy(like).float().cpu()).state_dict().items():
        if not bool((places[name] < last).all()) or not torch.equal(flat[places[name]], value):
            raise _refusal(f"{name}, which is read from several tensors together", "one tensor each", "This family can be read, but not written.")
    return spans, places


def _stem(spans: list[Span], places: dict[str, Tensor], a: Architecture) -> str:
    """Where the source keeps its blocks."""
    first = int(places[f"blocks.{a.depth - 1}.mixer.proj.weight"][0, 0])
    name = next(span.name for span in reversed(spans) if span.start <= first)
    if f".{a.depth - 1}." not in name:
        raise _refusal(f"{name}, which several blocks share", "weights of its own for each block", "This family can be read, but not written.")
    return name.split(f".{a.depth - 1}.")[0]


def _cut(name: str, a: Architecture, step: Step) -> tuple[slice, ...]:
    """The slice of a block's tensor that a step uses."""
    inner, everything = step.heads * (a.dim // a.heads), slice(None)
    where, leaf = name.split(".")[2:4]
    if where == "mixer":
        which = {"qkv": (slice(3 * inner),), "proj": (everything, slice(inner)), "norm": (slice(inner),), "relative": (everything, slice(step.heads))}
    elif where == "ffn":
        which = {"up": (slice(step.width),), "gate": (slice(step.width),), "norm": (slice(step.width),), "down": (everything, slice(step.width))}
    else:
        return (everything,)
    cut = which.get(leaf, (everything,))
    return cut[:1] if name.endswith(".bias") else cut


def _gathered(numbers: dict[str, Tensor], weights: dict[str, Tensor], spans: list[Span], a: Architecture) -> dict[str, Tensor]:
    """The source's tensors, without the rows and columns of which nothing is left."""
    if not numbers:
        return {}
    number = torch.cat([numbers[name].flatten() for name in numbers])
    value = torch.cat([weights[name].flatten() for name in numbers])
    invented = number == 0  # biases of keys: without rotation they add the same to all scores of a query, so they can be left out
    if (a.rotary or a.qk_norm) and bool(value[invented].any()):
        raise _refusal("keys with a bias", "none: the source has no place for it", "Keep the rows of keys in mixer.qkv.bias at zero while training.")
    number, value = number[~invented], value[~invented]
    starts = torch.tensor([span.start for span in spans])
    which, state = torch.bucketize(number, starts, right=True) - 1, {}
    for index in which.unique().tolist():
        span, here = spans[index], which == index
        axes = [axis.unique(return_inverse=True) for axis in torch.unravel_index(number[here] - span.start, span.shape)]
        tensor = torch.full([len(kept) for kept, _ in axes], torch.nan)
        tensor[tuple(place for _, place in axes)] = value[here]
        if bool(tensor.isnan().any()):
            raise _refusal(
                f"{span.name}, of which the path uses scattered elements", "whole rows and columns, all finite", "Take a path of full heads and width."
            )
        state[span.name] = tensor
    return state


def _put(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Tensors of any size into their places, and the sizes that the modules state."""
    for name, value in state.items():
        module, _, leaf = name.rpartition(".")
        model.get_submodule(module).register_parameter(leaf, nn.Parameter(value))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, nn.LayerNorm) and module.weight is not None:
            module.normalized_shape = tuple(module.weight.shape)
        elif isinstance(module, nn.Embedding):
            module.num_embeddings, module.embedding_dim = module.weight.shape


def _tell(block: nn.Module, heads: int, a: Architecture) -> None:
    """What an attention of fewer heads says of itself."""
    if heads == a.heads:
        return
    for module in block.modules():
        for name in vars(module).keys() & {*HEADS, *INNER}:
            setattr(module, name, heads if name in HEADS else heads * (a.dim // a.heads))


def _refusal(found: str, wanted: str, do: str) -> Refused:
    return Refused(found, wanted=wanted, do=do)
