"""Equality between a model and what was made of it, also where a trained weight happens to hide a difference."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from apportion.errors import Refused
from apportion.network import Network
from apportion.vocab import Path

ABSOLUTE, RELATIVE = 1e-5, 1e-4
BATCHES = (1, 3)
FEW = 3


@dataclass(frozen=True, slots=True)
class Verified:
    """Largest difference of any output, and the largest as a share of the largest output of its sample; over all runs."""

    max_abs: float
    max_rel: float

    def worst(self, other: Verified) -> Verified:
        return Verified(max(self.max_abs, other.max_abs), max(self.max_rel, other.max_rel))


def verify(
    source: nn.Module,
    network: Network,
    *examples: Tensor,
    reread: Callable[[nn.Module], Network],
    batches: tuple[int, ...] | None = BATCHES,
    given: Tensor | None = None,
    seed: int = 0,
) -> Verified:
    """`as_it_is` on FEW rows of the last example and on what is `given`, then `when_shaken` on `batches` of the rows of each example, or the examples whole."""
    runs = [*examples] if batches is None else [example[:batch] for example in examples for batch in sorted({min(batch, len(example)) for batch in batches})]
    real = as_it_is(source, network, examples[-1][:FEW], *([] if given is None else [given]))
    return real.worst(when_shaken(source, *runs, reread=reread, seed=seed))


@torch.no_grad()
def as_it_is(source: nn.Module, network: Network, *runs: Tensor) -> Verified:
    """Compare the two in float32, weights as they are. Raises Refused with the figures. Cost: two forward passes for each run."""
    plain = _copy(source, lambda tensor: tensor)
    return _worst([compare(plain, network, inputs, "as it is") for inputs in runs])


@torch.no_grad()
def when_shaken(source: nn.Module, *runs: Tensor, reread: Callable[[nn.Module], Network], seed: int = 0) -> Verified:
    """Compare in float32 a copy of the source with other weights, and what is read of it: whatever differs shows, also where trained weights hide it.

    Every vector is multiplied by 0.5 to 1.5 and moved a little, and every matrix that hardly counts is made to: so a LayerScale of one, a bias of zero or a
    table of zeros that was forgotten shows, also through a head that was born small. A sample may be off by 1e-5 + 1e-4 of its largest output.
    Raises Refused with the figures. Cost: what `reread` makes, copies of what is shaken or not in float32, two forward passes for each run.
    """
    generator = torch.Generator().manual_seed(seed)
    made = _copy(source, lambda tensor: _shaken(tensor, generator))
    network = reread(made)
    return _worst([compare(made, network, inputs, "with shaken weights") for inputs in runs])


def _worst(figures: Sequence[Verified]) -> Verified:
    return functools.reduce(Verified.worst, figures)


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
