"""What a path costs a text of a given length: its tokens in closed form at every length that graphs are built for. An image has one length."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from apportion.control import Cascade
from apportion.deliver.bundle import Bundle
from apportion.engine import choose_lengths, lengths
from apportion.intake import Feed, Samples, Tokenise
from apportion.network import Network
from apportion.vocab import Ladder, Path

Profile = Mapping[int, float]
"""Share of the samples (0..1) at each length that graphs are built for."""

WORTH = 0.03
"""Share of the tokens run at doubled lengths that other lengths have to save: they are made for these texts, and doubled ones do for any."""


def macs(network: Network, path: Path, length: int) -> int:
    """Multiply-adds of one text padded to `length` tokens along `path`, closed form; of the full length, what the network says of itself."""
    a = network.architecture
    if length == a.tokens:
        return network.macs(path)
    share = [tokens - a.prefix for tokens in path.tokens]  # what a path states at full length is a share of any other
    fitted = replace(path, tokens=tuple(a.prefix - (-kept * (length - a.prefix) // (a.tokens - a.prefix)) for kept in share))
    return network.tokeniser.macs(path.patch) * length // a.tokens + network.segment_macs(0, len(fitted.steps), fitted, entering=length)


def chosen_lengths(network: Network, seen: Samples, held: Samples, feed: Feed) -> tuple[tuple[int, ...], float]:
    """Lengths for texts like those `seen`, none where doubled ones do as well, and the share of tokens that they save over these on the texts `held`.

    As many as doubled ones at most, none below the shortest of these, which is where a call costs more than padding (`engine.choose_lengths`).
    """
    sizes, others = seen.sizes(feed), held.sizes(feed)
    if sizes is None or others is None:
        return (), 0.0
    doubled, traffic = lengths(network.architecture.length), Counter(map(int, sizes))
    offered = {size: float(size) for size in {doubled[0], doubled[-1], *(size for size in traffic if size > doubled[0])}}
    found = choose_lengths(traffic, at_most=len(doubled), longest=doubled[-1], costs=offered)
    saved = 1 - padded(others, found) / padded(others, doubled)
    return (found, saved) if saved >= WORTH else ((), saved)


def padded(sizes: Tensor, every: Sequence[int]) -> int:
    """Tokens that run where each text is padded to the shortest of these lengths that holds it; `sizes` (n,)."""
    among = torch.tensor(every)
    return int(among[torch.searchsorted(among, sizes)].sum())


def profile(network: Network, samples: Samples, feed: Feed, chosen: Sequence[int] = ()) -> Profile:
    """How these samples are spread over the lengths that they are padded to; `chosen` as in a bundle."""
    every, place = places(network, samples, feed, chosen)
    share = torch.bincount(place, minlength=len(every)).double() / len(place)
    return {length: part for length, part in zip(every, share.tolist(), strict=True) if part}


def places(network: Network, samples: Samples, feed: Feed, chosen: Sequence[int] = ()) -> tuple[tuple[int, ...], Tensor]:
    """The lengths that graphs are built for, and for each sample the place of its own among them, (n,)."""
    sizes = samples.sizes(feed)
    if sizes is None:
        return (network.architecture.tokens,), torch.zeros(len(samples), dtype=torch.int64)
    every = tuple(chosen) or lengths(network.architecture.length)
    return every, torch.searchsorted(torch.tensor(every), sizes)


def mean_macs(network: Network, path: Path, over: Profile | None = None) -> float:
    """Multiply-adds of the average sample; without a profile, of one at full length."""
    return sum(share * macs(network, path, length) for length, share in (over or {network.architecture.tokens: 1.0}).items())


def rung_macs(network: Network, ladder: Ladder, length: int, *, decision: int, checkpoints: bool) -> list[int]:
    """Multiply-adds of each rung for a text padded to `length` tokens, with all that deciding costs.

    One decision: the glance's own answer and `decision`, whichever rung it is. Checkpoints: the answer of every exit that was passed.
    """
    paths = [macs(network, path, length) for path in ladder.paths]
    if checkpoints:
        a = network.architecture
        answers = [network.head.macs(length, a.prefix) + network.over_macs(length, path.blocks[-1], a.depth) for path in ladder.paths]
        return [path + sum(answers[:passed]) for passed, path in enumerate(paths)]
    shared = network.glance(ladder.glance).macs() + decision
    return [path + shared for path in paths]


def mean_rung_macs(network: Network, ladder: Ladder, over: Profile | None = None, *, decision: int = 0, checkpoints: bool = False) -> list[float]:
    """The same of the average sample; without a profile, of one at full length."""
    whole = over or {network.architecture.tokens: 1.0}
    every = [[share * each for each in rung_macs(network, ladder, length, decision=decision, checkpoints=checkpoints)] for length, share in whole.items()]
    return [sum(parts) for parts in zip(*every, strict=True)]


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
        every, checkpoints = bundle.lengths or lengths(network.architecture.length), isinstance(bundle.controller, Cascade)
        found = [rung_macs(network, ladder, length, decision=bundle.controller.macs, checkpoints=checkpoints) for length in every]
        dense = [macs(network, network.space.full, length) / 1e9 for length in every]
        return cls(every, torch.tensor(found, dtype=torch.float64) / 1e9, torch.tensor(dense, dtype=torch.float64))
