"""What a path costs a text of a given length: its tokens in closed form at every length that graphs are built for. An image has one length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from apportion.deliver.bundle import Bundle
from apportion.engine import lengths
from apportion.intake import Feed, Samples, Tokenise
from apportion.network import Network
from apportion.vocab import Path

Profile = Mapping[int, float]
"""Share of the samples (0..1) at each length that graphs are built for."""


def macs(network: Network, path: Path, length: int) -> int:
    """Multiply-adds of one text padded to `length` tokens along `path`, closed form; of the full length, what the network says of itself."""
    a = network.architecture
    if length == a.tokens:
        return network.macs(path)
    share = [tokens - a.prefix for tokens in path.tokens]  # what a path states at full length is a share of any other
    fitted = replace(path, tokens=tuple(a.prefix - (-kept * (length - a.prefix) // (a.tokens - a.prefix)) for kept in share))
    total, before = network.tokeniser.macs(path.patch) * length // a.tokens, length
    for step in fitted.steps:
        total += network.blocks[step.block].macs(before, step, a.prefix)  # pyright: ignore[reportCallIssue]
        before = step.tokens
    return total + network.head.macs(before, a.prefix)


def profile(network: Network, samples: Samples, feed: Feed) -> Profile:
    """How these samples are spread over the lengths that they are padded to."""
    every, place = places(network, samples, feed)
    share = torch.bincount(place, minlength=len(every)).double() / len(place)
    return {length: part for length, part in zip(every, share.tolist(), strict=True) if part}


def places(network: Network, samples: Samples, feed: Feed) -> tuple[tuple[int, ...], Tensor]:
    """The lengths that graphs are built for, and for each sample the place of its own among them, (n,)."""
    sizes = samples.sizes(feed)
    if sizes is None:
        return (network.architecture.tokens,), torch.zeros(len(samples), dtype=torch.int64)
    every = lengths(network.architecture.length)
    return every, torch.searchsorted(torch.tensor(every), sizes)


def mean_macs(network: Network, path: Path, over: Profile | None = None) -> float:
    """Multiply-adds of the average sample; without a profile, of one at full length."""
    return sum(share * macs(network, path, length) for length, share in (over or {network.architecture.tokens: 1.0}).items())


@dataclass(frozen=True, slots=True)
class Ledger:
    """GMACs at every length: of the rungs with all that the decision costs (lengths, k), and of the dense network (lengths,)."""

    lengths: tuple[int, ...]
    rungs: Tensor
    dense: Tensor

    @classmethod
    def of(cls, bundle: Bundle) -> Ledger:
        """An image costs what the bundle says; a text what the closed form gives for its length."""
        network, ladder = bundle.network, bundle.ladder
        if not isinstance(bundle.preprocess, Tokenise):
            rungs = torch.tensor([[rung.gmacs for rung in bundle.rungs]], dtype=torch.float64)
            return cls((network.architecture.tokens,), rungs, torch.tensor([bundle.dense_gmacs], dtype=torch.float64))
        every, decision = lengths(network.architecture.length), network.glance(ladder.glance).macs() + bundle.controller.macs
        rungs = [[(macs(network, path, length) + decision) / 1e9 for path in ladder.paths] for length in every]
        dense = [macs(network, network.space.full, length) / 1e9 for length in every]
        return cls(every, torch.tensor(rungs, dtype=torch.float64), torch.tensor(dense, dtype=torch.float64))
