"""What a network is made of, what each part costs, and which axes can adapt: known from its shape alone, before anything is trained or measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from apportion import methods
from apportion.errors import ApportionError
from apportion.network import Architecture, Network
from apportion.network.surgery import builder
from apportion.vocab import Axis, Choice

ADAPTING = ("reducer", "mixer", "ffn", "depth")
OUTPUTS = {"multilabel": "labels", "regression": "numbers", "token_classification": "classes for each word", "segmentation": "classes for each pixel"}


@dataclass(frozen=True, slots=True)
class Part:
    """One part along the full path, for one sample."""

    name: str
    what: str  # the methods in its slots
    parameters: int
    gmacs: float
    share: float  # of all GMACs


@dataclass(frozen=True, slots=True)
class Offer:
    """A method of the shelf that adapts an axis, tried on the first block."""

    axis: Axis
    slot: str
    method: str
    choices: tuple[int, ...]  # heads, hidden units, blocks, or the fewest tokens and all of them, after the first block
    needs: str
    refused: str  # why this network cannot have it; empty where it can
    remark: str  # what is no longer exact below full size, beside what is left out


@dataclass(frozen=True, slots=True)
class Inspection:
    recognised: tuple[tuple[str, str], ...]
    parts: tuple[Part, ...]
    offers: tuple[Offer, ...]


def inspected(network: Network) -> Inspection:
    """Facts, parts and offers, each as rows for a table or for JSON. Nothing is changed and nothing is run.

    GMACs are the closed form and add up to those of the full path. Each method is built for the first block and thrown away; what it raises is quoted.
    """
    return Inspection(_recognised(network), _parts(network), tuple(_offers(network)))


def _recognised(network: Network) -> tuple[tuple[str, str], ...]:
    a, full = network.architecture, network.space.full
    gate, where = "gated, " if a.gated else "", "before each branch" if a.norm_first else "on each branch" if a.norm_branch else "after each sum"
    inputs, outputs = _inputs(a), f"{a.classes} {OUTPUTS.get(a.task, 'classes')}" if a.classes else "features"
    extra = [name for name, here in (("of queries and keys", a.qk_norm), ("over heads", a.mixer_norm), ("over hidden units", a.ffn_norm)) if here]
    return (
        ("inputs", inputs),
        ("tokens", f"{a.tokens}" + (f", of which {a.prefix} {'is' if a.prefix == 1 else 'are'} never reduced" if a.prefix else "")),
        ("blocks", f"{a.depth} of {a.dim} channels"),
        ("mixer", f"{a.heads} heads of {a.dim // a.heads} channels"),
        ("ffn", f"{a.hidden} hidden units, {gate}{a.activation}"),
        ("norms", ", ".join((where, *extra)) + (", with LayerScale" if a.layer_scale else "")),
        ("positions", ", ".join(_positions(a)) or "none"),
        ("answer", f"{a.pool.replace('_', ' ')}, {outputs}"),
        ("parameters", f"{sum(value.numel() for value in network.parameters()):,}"),
        ("GMACs", f"{network.macs(full) / 1e9:.4g}"),
    )


def _inputs(a: Architecture) -> str:
    if a.columns:
        return f"rows of a table: {a.numbers} columns of numbers, {len(a.categories)} of categories"
    if a.words:
        return f"texts of up to {a.length} tokens"
    if a.points:
        return f"series of {a.points} points in {a.channels} channels, in patches of {a.patch}, {a.stride} apart"
    if a.samples:
        return f"sound of {a.samples} samples"
    if a.frames:
        return f"spectrograms of {a.frames} frames and {a.bands} bands" + (f", in patches of {a.patch}" if a.patch else "")
    return f"images of {a.image_size} x {a.image_size} in patches of {a.patch}"


def _positions(a: Architecture) -> list[str]:
    if a.columns:
        return ["each column has vectors of its own"]
    if a.samples or (a.frames and not a.patch):
        return [f"a convolution over {a.position_kernel} tokens" if a.samples else "fixed waves", *(["a bias by distance"] if a.relative_buckets else [])]
    learned = bool(a.positions) if a.words else a.learned_positions
    kinds = (("learned", learned), ("rotary", a.rotary), ("a bias by distance", a.relative_buckets), (f"windows of {a.window} to either side", a.window))
    return [name for name, here in kinds if here]


def _parts(network: Network) -> tuple[Part, ...]:
    full, total = network.space.full, network.macs(network.space.full)
    before, prefix = network.architecture.tokens, network.architecture.prefix
    rows = [("tokeniser", network.tokeniser, type(network.tokeniser).__name__, network.tokeniser.macs(full.patch))]
    for step in full.steps:
        block: Any = network.blocks[step.block]
        what = ", ".join(type(part).__name__ for part in (block.mixer, block.reducer, block.ffn))
        rows.append((f"blocks.{step.block}", block, what, block.macs(before, step, prefix)))
        before = step.tokens
    rows.append(("head", nn.ModuleList((network.norm, network.head)), type(network.head).__name__, network.head.macs(before, prefix)))
    return tuple(Part(name, what, sum(value.numel() for value in part.parameters()), macs / 1e9, macs / total) for name, part, what, macs in rows)


def _offers(network: Network) -> list[Offer]:
    """Every method that listens to an integer of a path, in the order of the shelf."""
    block: Any = network.blocks[0]
    found = []
    for slot in ADAPTING:
        part = network.depth if slot == "depth" else getattr(block, slot)
        for name in methods.names(slot):
            method, card = methods.find(slot, name), methods.card(slot, name)
            if card.axis is None:
                continue
            built, refused = part, ""
            if type(part) is not method:
                try:
                    built = builder(network, method, Choice(slot, name))(part)
                except ApportionError as error:
                    refused = error.found
            choices = () if refused else _choices(network, slot, built)
            found.append(Offer(card.axis, slot, name, choices, card.needs, refused, "" if refused else _remark(network.architecture, slot)))
    return found


def _choices(network: Network, slot: str, built: Any) -> tuple[int, ...]:
    a = network.architecture
    if slot == "depth":
        return tuple(sorted({len(order) for order in built.orders(a.depth)}))
    return (a.tokens - (a.tokens - a.prefix) // 2, a.tokens) if slot == "reducer" else tuple(built.choices)


def _remark(a: Architecture, slot: str) -> str:
    if slot == "reducer" and (a.rotary or a.relative_buckets):
        return "a joined token stands where the first of its tokens stood"
    if (slot == "mixer" and a.mixer_norm) or (slot == "ffn" and a.ffn_norm):
        return "the norm inside is over what is left"
    return ""
