"""The shelf: published modules, one small file each. A file's place is its registration; no list names it."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from pathlib import Path as File

from apportion.errors import PlanError
from apportion.vocab import Card

SLOTS = tuple(sorted(module.name for module in pkgutil.iter_modules([str(File(__file__).parent)]) if module.ispkg))


def names(slot: str) -> tuple[str, ...]:
    """The methods that lie in a slot. Raises PlanError for a slot that does not exist."""
    if slot not in SLOTS:
        raise PlanError(f"slot {slot!r}", wanted=f"one of {', '.join(SLOTS)}", do="Correct the plan.")
    return tuple(sorted(module.name for module in pkgutil.iter_modules([str(File(__file__).parent / slot)])))


def find(slot: str, name: str) -> type:
    """The class that the file `slot/name.py` calls METHOD. Raises PlanError with the names that exist."""
    if name not in names(slot):
        raise PlanError(f"{name!r} in slot {slot!r}", wanted=f"one of {', '.join(names(slot))}", do="Correct the plan, or `make new` the method.")
    return importlib.import_module(f"{__name__}.{slot}.{name}").METHOD


def card(slot: str, name: str) -> Card:
    """The card of a method."""
    return find(slot, name).card


def summary(slot: str, name: str) -> str:
    """The first sentence of a method's file."""
    return (inspect.getdoc(importlib.import_module(f"{__name__}.{slot}.{name}")) or "").split("\n")[0]
