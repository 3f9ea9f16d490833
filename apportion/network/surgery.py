"""Putting methods into slots: every change is reported, and a choice that changes nothing is an error."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import NamedTuple

from apportion.errors import NoEffect, PlanError
from apportion.methods import find
from apportion.network.model import Network
from apportion.vocab import Choice

ON_BLOCK = ("mixer", "reducer", "ffn", "adapter", "residual")
ON_NETWORK = ("depth", "bridge")


class Change(NamedTuple):
    where: str
    before: str
    after: str


def put(network: Network, choice: Choice) -> tuple[Change, ...]:
    """Put a method into its slot of the chosen blocks (in place). Raises PlanError for an unknown name, block or option, NoEffect where nothing changes."""
    method = find(choice.slot, choice.name)
    if choice.slot in ON_NETWORK and not choice.blocks:
        owners = [("network", network)]
    elif choice.slot in ON_BLOCK:
        which = choice.blocks or tuple(range(len(network.blocks)))
        if any(not 0 <= block < len(network.blocks) for block in which):
            raise PlanError(f"blocks {which}", wanted=f"0 to {len(network.blocks) - 1}", do="Correct the plan.")
        owners = [(f"blocks.{block}", network.blocks[block]) for block in which]
    elif choice.slot in ON_NETWORK:
        raise PlanError(f"blocks {choice.blocks} for slot {choice.slot!r}", wanted="none: the network has one of it", do="Leave blocks out of this choice.")
    else:
        raise PlanError(
            f"slot {choice.slot!r} of a trained network", wanted=f"one of {(*ON_BLOCK, *ON_NETWORK)}", do="Choose that part when the network is built."
        )
    attributes = ["residual1", "residual2"] if choice.slot == "residual" else [choice.slot]
    build = builder(network, method, choice)
    changes = []
    for name, owner in owners:
        for attribute in attributes:
            part = getattr(owner, attribute)
            if type(part) is method:
                raise NoEffect(f"{choice.slot} {choice.name!r} at {name}", wanted="a method that is not there yet", do="Take the choice out of the plan.")
            changes.append((owner, attribute, build(part), Change(f"{name}.{attribute}", type(part).__name__, method.__name__)))
    for owner, attribute, part, _ in changes:  # nothing has been touched until every part could be built
        setattr(owner, attribute, part)
    return tuple(change for *_, change in changes)


def builder(network: Network, method: type, choice: Choice) -> Callable[[object], object]:
    """`from_dense` with the plan's options and those facts of the network that it asks for by name."""
    from_dense = getattr(method, "from_dense", None)
    if from_dense is None:
        raise PlanError(f"{choice.name!r}, which a {choice.slot} is built with", wanted="a method that adapts it", do="Take the choice out of the plan.")
    a = network.architecture
    facts = {"channels": a.dim // a.heads, "dim": a.dim, "class_token": a.class_token}
    asked = list(inspect.signature(from_dense).parameters)[1:]
    open_to_choice = [name for name in asked if name not in facts]
    unknown = set(choice.options) - set(open_to_choice)
    if unknown:
        raise PlanError(f"options {sorted(unknown)} for {choice.name!r}", wanted=f"some of {open_to_choice}", do="Correct the plan.")
    options = {**{name: facts[name] for name in asked if name in facts}, **choice.options}
    return lambda part: from_dense(part, **options)
