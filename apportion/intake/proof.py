"""A network, and how it was held against the model that it was read from: now, or in part before, where a folder remembers that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path as File

import torch
from torch import Tensor, nn

from apportion.errors import DataError
from apportion.intake import remembered
from apportion.intake.verify import FEW, Verified, as_it_is, when_shaken
from apportion.network import Architecture, Network


@dataclass(frozen=True, slots=True)
class Proof:
    """The network, how far it is from its source, and facts for where it is from: on which day its shape was tested, and where that was found."""

    network: Network
    figures: Verified
    facts: dict[str, str | int | bool | None]


def proved(
    source: nn.Module,
    read: Callable[[nn.Module, bool], Network],
    a: Architecture,
    runs: Sequence[Tensor],
    example: Tensor | None,
    *,
    own: bool,
    cache: File | None = None,
) -> Proof:
    """The network that `read` makes of `source`, as the shape `a`: with shaken weights it equals on all runs, now or at a time that `cache` remembers; with
    those that are there it equals on FEW rows of the last run and on `example`, now.

    What is read of the shaken source is gone before ours is made. Without `own`, ours looks into the source's memory, no two parts of it into the same.
    Raises Refused with the figures, DataError for a cache that cannot be written to.
    """
    record, kept = None, {}
    name = None if cache is None else _key(source, a, kept)
    if cache is not None and name is not None:
        record = remembered.found(cache, name)
    found = record is not None
    record = record or remembered.Record.now(when_shaken(source, *runs, reread=lambda made: read(made, False)))
    network = read(source, own)
    if not own:
        _apart(network)
    figures = record.figures.worst(as_it_is(source, network, runs[-1][:FEW], *([] if example is None else [example])))
    if cache is not None and name is not None and not found:
        _keep(cache, name, record)
    return Proof(network, figures, {"equality_tested_on": record.day, "equality_found_in": str(cache) if found else None, **kept})


def _key(source: nn.Module, a: Architecture, kept: dict[str, str | int | bool | None]) -> str | None:
    try:
        return remembered.key(source, a)
    except remembered.Untold as why:
        kept["equality_not_kept"] = str(why)
        return None


def _keep(cache: File, name: str, record: remembered.Record) -> None:
    try:
        remembered.keep(cache, name, record)
    except OSError as error:
        raise DataError(f"{cache}, in which nothing can be kept ({error})", wanted="a folder for the cache", do="Name another, or leave it out.") from error


def _apart(network: Network) -> None:
    """Memory of its own for each tensor that shares it with another, or looks into a part of more."""
    seen: set[int] = set()
    for value in (*network.parameters(), *network.buffers()):
        memory = value.untyped_storage()
        if memory.data_ptr() in seen or memory.nbytes() != value.nbytes or not value.is_contiguous():
            value.data = value.data.clone(memory_format=torch.contiguous_format)
        seen.add(value.untyped_storage().data_ptr())
