"""What is constant is multiplied out once, before serving: gains, shifts and scales move into the products beside them.

For networks that run or are exported: a folded one has lost the parameters that training turns and that a bundle names.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from apportion.errors import NoEffect, PlanError, Refused
from apportion.methods.norm.layernorm import LayerNorm
from apportion.methods.residual.layerscale import LayerScale
from apportion.methods.residual.plain import Plain
from apportion.methods.tokeniser.patch import PatchTokeniser
from apportion.methods.weight.dense import DenseWeight
from apportion.network.model import Network
from apportion.network.surgery import Change
from apportion.vocab import Step, Tokens

PROBE = 16  # tokens beside the prefix, at most: enough for a wrong fold to show in double precision
Product = DenseWeight | nn.Linear | nn.Conv2d
Probe = tuple[Tokens] | tuple[Tokens, Step]


class Edit(NamedTuple):
    """Factors that move: a norm's gain and shift into the products that read it, or a scale into the product that makes its branch."""

    part: str
    into: tuple[str, ...]


@torch.no_grad()
def fold(network: Network, *, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> tuple[Change, ...]:
    """Move constant factors into the products beside them (in place; copy the network first to keep it). The output stays what it was on every path.

    Norm before a product: W' = W diag(gain), b' = b + W shift. LayerScale after one: W' = diag(scale) W, b' = scale b. Position of the prefix: into its
    tokens. With `mean` and `std` (one for each channel) the network takes raw inputs from then on: W' = W / std, b' = b - sum of W' mean.

    Which products those are is seen on a probe, and a fold is kept only where the part, in double precision and on its smallest and largest path, still
    gives the same: so prefix cuts hold, and methods that look at the normed tokens themselves are left as they are. Also left: norms after the residual
    (the stream itself reads them) and before the first block; query and key norms; the final norm, from which the glance makes the signal that a
    controller was taught. There is no product for q, k and v to share (they are one already), and the fused kernel scales scores by itself.
    A reducer's choice between tokens that tie to within rounding may fall the other way.

    Cost: twelve passes of each block over a few tokens, in double precision. Raises NoEffect where nothing can be folded, Refused for a padded stem with
    `mean` and where a folded weight does not fit its dtype (float16 with a small LayerScale), PlanError for a mean and std that do not fit the channels.
    """
    edits = [(name, unit, _edits(name, unit, probes)) for name, unit, probes in _units(network)]
    tokeniser = network.tokeniser
    stem = None if mean is None and std is None else _with_normalisation(tokeniser, mean, std)
    changes = []
    if stem is not None:
        _store(tokeniser.project, *stem)  # pyright: ignore[reportArgumentType]
        changes.append(Change("inputs", "mean and std", "tokeniser.project"))
    if isinstance(tokeniser, PatchTokeniser) and tokeniser.position_prefix:
        _merge_prefix(tokeniser)
        changes.append(Change("tokeniser.position", "position of the prefix", "tokeniser.first"))
    for name, unit, found in edits:
        for edit in found:
            before = type(unit.get_submodule(edit.part)).__name__
            _apply(unit, edit)
            changes.append(Change(f"{name}.{edit.part}", before, ", ".join(f"{name}.{product}" for product in edit.into)))
    if not changes:
        raise NoEffect("a network in which nothing can be folded", wanted="gains, shifts or scales beside a product", do="Leave the folding out.")
    return tuple(changes)


def _units(network: Network) -> Iterator[tuple[str, nn.Module, list[Probe]]]:
    """Every part in which factors and products meet, with inputs that exercise it; the final norm lies in none of them."""
    a, device = network.architecture, next(network.parameters()).device
    count = min(PROBE, a.tokens - a.prefix)
    n = a.prefix + count
    x = torch.randn(2, n, a.dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    tokens = Tokens(x, x.new_ones(2, n), torch.arange(n, device=device).expand(2, n), a.prefix)
    for i, block in enumerate(network.blocks):
        keep = n - count // 4 if block.reducer.reduces else n  # pyright: ignore
        ends = [(keep, 0), (n, -1)]
        yield f"blocks.{i}", block, [(tokens, Step(i, left, block.mixer.choices[end], block.ffn.choices[end])) for left, end in ends]  # pyright: ignore
    yield "head", network.head, [(tokens,)]


def _edits(name: str, unit: nn.Module, probes: list[Probe]) -> list[Edit]:
    """Those folds of a part that change nothing. Raises Refused where the part's dtype cannot hold the result."""
    exact, kept = copy.deepcopy(unit).double(), []
    wanted = [_run(exact, probe) for probe in probes]
    for edit in _candidates(exact, probes):
        _apply(exact, edit)
        if all(torch.allclose(_run(exact, probe), value, rtol=1e-9, atol=1e-10) for probe, value in zip(probes, wanted, strict=True)):
            kept.append(edit)
        else:
            exact = copy.deepcopy(unit).double()
            for good in kept:
                _apply(exact, good)
    for edit in kept:
        for product in edit.into:
            _fits(f"{name}.{edit.part} in {name}.{product}", exact.get_submodule(product), unit.get_submodule(product))
    return kept


def _run(unit: nn.Module, probe: Probe) -> Tensor:
    out = unit(*probe)
    return out.x if isinstance(out, Tokens) else out


def _candidates(unit: nn.Module, probes: list[Probe]) -> list[Edit]:
    """Norms whose very output a product reads, and scales whose very branch a product made."""
    parts = {name: part for name, part in unit.named_modules() if isinstance(part, Product | nn.LayerNorm | LayerScale)}
    taken, given = defaultdict(list), defaultdict(list)

    def watch(name: str):
        def hook(part: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            taken[name] += args
            given[name].append(out)

        return hook

    handles = [part.register_forward_hook(watch(name)) for name, part in parts.items()]
    for probe in probes:
        unit(*probe)
    for handle in handles:
        handle.remove()
    products = [name for name, part in parts.items() if isinstance(part, Product)]
    if any(name not in taken for name in products):
        return []  # a product that no probe reached might read the norm as well

    edits = []
    for name, part in parts.items():
        if isinstance(part, LayerScale):
            edits.append(Edit(name, tuple(product for product in products if _meet(given[product], taken[name]))))
        elif isinstance(part, nn.LayerNorm) and part.elementwise_affine:
            edits.append(Edit(name, tuple(product for product in products if _meet(given[name], taken[product]))))
    return [edit for edit in edits if edit.into]


def _meet(some: list[Tensor], others: list[Tensor]) -> bool:
    return any(one is other for one in some for other in others)


def _apply(unit: nn.Module, edit: Edit) -> None:
    """Move the factors and put a part without them in their place. The arithmetic is in double precision, so weights are rounded once."""
    part = unit.get_submodule(edit.part)
    for product in map(unit.get_submodule, edit.into):
        assert isinstance(product, Product)
        weight, bias = product.weight.double(), None if product.bias is None else product.bias.double()
        if isinstance(part, LayerScale):
            scale = part.scale.double()
            _store(product, scale[:, None] * weight, None if bias is None else scale * bias)
        elif isinstance(part, nn.LayerNorm):
            if part.bias is not None:  # pyright: ignore[reportUnnecessaryComparison]
                bias = weight @ part.bias.double() + (0 if bias is None else bias)
            _store(product, weight * part.weight.double(), bias)
    plain = LayerNorm(list(part.normalized_shape), eps=part.eps, elementwise_affine=False) if isinstance(part, nn.LayerNorm) else Plain()
    unit.set_submodule(edit.part, plain.train(part.training))


def _store(product: Product, weight: Tensor, bias: Tensor | None) -> None:
    product.weight.copy_(weight)
    if bias is not None:
        product.bias = nn.Parameter(bias.to(product.weight), requires_grad=product.weight.requires_grad)


def _fits(what: str, exact: nn.Module, product: nn.Module) -> None:
    """Rounding is relative, so a wide spread of gains does no harm; what does is a channel that falls below, or passes, what the dtype can hold."""
    assert isinstance(exact, Product) and isinstance(product, Product)
    dtype = product.weight.dtype
    for value, axes in ((exact.weight, (0, 1)), (exact.bias, (0,))):
        if value is None:
            continue
        for axis in axes:
            lost, size = (value.to(dtype).double() - value).norm(dim=axis), value.norm(dim=axis)
            if not bool((lost <= torch.finfo(dtype).eps * size).all()):
                raise Refused(
                    f"{what}, of which {dtype} would keep too little",
                    wanted="factors whose products its range can hold",
                    do="Fold in float32 or bfloat16, or leave the folding out.",
                )


def _with_normalisation(tokeniser: nn.Module, mean: Sequence[float] | None, std: Sequence[float] | None) -> tuple[Tensor, Tensor]:
    """Weight and bias of the patch convolution that takes raw inputs."""
    conv = next((part for part in tokeniser.modules() if isinstance(part, nn.Conv2d)), None)
    if conv is None:
        raise PlanError(f"mean {mean} and std {std} for a network that reads no images", wanted="neither", do="Leave them out.")
    if mean is None or std is None or len(mean) != conv.in_channels or len(std) != conv.in_channels or min(std) <= 0:
        raise PlanError(f"mean {mean} and std {std}", wanted=f"one of each for {conv.in_channels} channels, std above 0", do="Give the model's own.")
    if conv is not tokeniser.get_submodule("project") or conv.padding != (0, 0):
        raise Refused(
            "input normalisation for tokeniser.project, a stem that pads with zeros",
            wanted="a patch convolution without padding: zero is the mean only after normalisation",
            do="Keep normalising the inputs of this model.",
        )
    weight = conv.weight.double() / conv.weight.new_tensor(std, dtype=torch.float64)[:, None, None]
    shift = -(weight * conv.weight.new_tensor(mean, dtype=torch.float64)[:, None, None]).sum((1, 2, 3))
    return weight, shift if conv.bias is None else conv.bias.double() + shift


def _merge_prefix(tokeniser: PatchTokeniser) -> None:
    """Class and register tokens with their positions are one constant: the sum is the one that the forward pass would make."""
    first, position = tokeniser.first, tokeniser.position
    assert first is not None and position is not None
    first += position[: tokeniser.prefix]
    tokeniser.position = nn.Parameter(position[tokeniser.prefix :].clone(), requires_grad=position.requires_grad)
    tokeniser.position_prefix = False
