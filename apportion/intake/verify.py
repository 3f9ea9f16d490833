"""Equality between a model and what was made of it, also where a trained weight happens to hide a difference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from apportion.errors import Refused
from apportion.network import Network

ABSOLUTE, RELATIVE = 1e-5, 1e-4
BATCHES = (1, 3)


@dataclass(frozen=True, slots=True)
class Verified:
    """Largest difference of any output, and the largest as a share of the largest output of its sample; over all runs."""

    max_abs: float
    max_rel: float


@torch.no_grad()
def verify(source: nn.Module, network: Network, example: Tensor, *, reread: Callable[[nn.Module], Network], seed: int = 0) -> Verified:
    """Compare in float32 on batches of 1 and 3 rows of `example`: as they are, and with shaken weights.

    Shaken: every vector and embedding of a copy of the source is multiplied by 0.5 to 1.5 and moved a little, then the copy is read again, so that
    a LayerScale of one or a bias of zero that was forgotten shows. A sample may be off by 1e-5 + 1e-4 of its largest output.
    Raises Refused with the figures. Cost: one copy of the source, one more network, eight forward passes.
    """
    plain = copy.deepcopy(source).float().cpu().eval()
    as_it_is = _compare(plain, network, example, "as it is")
    _shake(plain, seed)
    shaken = _compare(plain, reread(plain), example, "with shaken weights")
    return Verified(max(as_it_is.max_abs, shaken.max_abs), max(as_it_is.max_rel, shaken.max_rel))


def _shake(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 1 or parameter.shape[0] == 1:
            parameter.mul_(torch.rand(parameter.shape, generator=generator) + 0.5).add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def _compare(source: nn.Module, network: Network, example: Tensor, what: str) -> Verified:
    was_training = network.training
    network.eval()
    path, largest, share = network.space.full, 0.0, 0.0
    for batch in BATCHES:
        inputs = example[:batch]
        wanted, got = source(inputs), network(inputs, path)
        if not torch.is_tensor(wanted) or wanted.shape != got.shape:
            shape = tuple(wanted.shape) if torch.is_tensor(wanted) else type(wanted).__name__
            raise Refused(
                f"outputs {tuple(got.shape)} for {shape} of the source", wanted="the same shape", do="Use a model whose head gives one row per sample."
            )
        error, scale = (wanted - got).abs().amax(-1), wanted.abs().amax(-1)
        if not bool((error <= ABSOLUTE + RELATIVE * scale).all()):  # a NaN fails here too
            figures = f"a difference of {error.max():.3g} on outputs of up to {scale.max():.3g}, {what}, batch {len(inputs)}"
            raise Refused(figures, wanted=f"at most {ABSOLUTE} + {RELATIVE} x output", do="Report the model: the reader took it for something that it is not.")
        largest, share = max(largest, error.max().item()), max(share, (error / scale.clamp_min(ABSOLUTE)).max().item())
    network.train(was_training)
    return Verified(largest, share)
