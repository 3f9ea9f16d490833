"""Equality between a model and what was made of it, also where a trained weight happens to hide a difference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from apportion.errors import Refused
from apportion.network import Network
from apportion.vocab import Path

ABSOLUTE, RELATIVE = 1e-5, 1e-4
BATCHES = (1, 3)


@dataclass(frozen=True, slots=True)
class Verified:
    """Largest difference of any output, and the largest as a share of the largest output of its sample; over all runs."""

    max_abs: float
    max_rel: float


@torch.no_grad()
def verify(
    source: nn.Module, network: Network, *examples: Tensor, reread: Callable[[nn.Module], Network], batches: tuple[int, ...] = BATCHES, seed: int = 0
) -> Verified:
    """Compare in float32 on `batches` of the rows of each example: as they are, and with shaken weights.

    Shaken: every vector of a copy of the source is multiplied by 0.5 to 1.5 and moved a little, and every matrix that hardly counts is made to, then the
    copy is read again: so a LayerScale of one, a bias of zero or a table of zeros that was forgotten shows, also through a head that was born small.
    A sample may be off by 1e-5 + 1e-4 of its largest output.
    Raises Refused with the figures. Cost: what `reread` makes, copies of what is shaken or not in float32, four forward passes for each batch of each example.
    """
    runs = [example[:batch] for example in examples for batch in sorted({min(batch, len(example)) for batch in batches})]
    plain = _copy(source, lambda tensor: tensor)
    figures = [compare(plain, network, inputs, "as it is") for inputs in runs]
    generator = torch.Generator().manual_seed(seed)
    plain = _copy(source, lambda tensor: _shaken(tensor, generator))
    shaken = reread(plain)
    figures += [compare(plain, shaken, inputs, "with shaken weights") for inputs in runs]
    return Verified(max(figure.max_abs for figure in figures), max(figure.max_rel for figure in figures))


def _copy(source: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy in float32, for looking only: parameters that `change` gives back as they are look into the source's memory."""
    made = {id(old): nn.Parameter(change(old.detach().float().cpu()), requires_grad=False) for old in source.parameters()}
    return copy.deepcopy(source, {**made}).float().cpu().eval()


def _shaken(tensor: Tensor, generator: torch.Generator) -> Tensor:
    if tensor.ndim == 1 or tensor.shape[0] == 1:
        return tensor.mul(torch.rand(tensor.shape, generator=generator) + 0.5).add_(torch.randn(tensor.shape, generator=generator), alpha=0.1)
    wanted = tensor[0].numel() ** -0.5  # what makes outputs about as large as inputs
    norm = torch.linalg.vector_norm(tensor).item()
    return torch.randn(tensor.shape, generator=generator) * wanted if norm < wanted / 4 * tensor.numel() ** 0.5 else tensor


@torch.no_grad()
def compare(source: nn.Module, network: Network, inputs: Tensor, what: str, path: Path | None = None) -> Verified:
    """How far apart the two are on these inputs, along the full path where none is named. Raises Refused with the figures where that is too far."""
    was_training = network.training
    network.eval()
    wanted, got = source(inputs), network(inputs, path or network.space.full)
    if not torch.is_tensor(wanted) or wanted.shape != got.shape:
        shape = tuple(wanted.shape) if torch.is_tensor(wanted) else type(wanted).__name__
        raise Refused(f"outputs {tuple(got.shape)} for {shape} of the source", wanted="the same shape", do="Use a model whose head gives one row per sample.")
    error, scale = (wanted - got).abs().amax(-1), wanted.abs().amax(-1)
    if not bool((error <= ABSOLUTE + RELATIVE * scale).all()):  # a NaN fails here too
        figures = f"a difference of {error.max():.3g} on outputs of up to {scale.max():.3g}, {what}, batch {len(inputs)}"
        raise Refused(figures, wanted=f"at most {ABSOLUTE} + {RELATIVE} x output", do="Report the model: the reader took it for something that it is not.")
    network.train(was_training)
    return Verified(error.max().item(), (error / scale.clamp_min(ABSOLUTE)).max().item())
