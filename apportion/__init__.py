"""Give each input the compute it needs, and no more."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from apportion.deliver.adapted import Adapted, load
    from apportion.verbs import adapt, bench
    from apportion.vocab import Budget, Path, Plan

__version__ = "0.1.0"
__all__ = ["Adapted", "Budget", "Path", "Plan", "adapt", "bench", "load"]

_HOMES = {
    "Adapted": "apportion.deliver.adapted",
    "Budget": "apportion.vocab",
    "Path": "apportion.vocab",
    "Plan": "apportion.vocab",
    "adapt": "apportion.verbs",
    "bench": "apportion.verbs",
    "load": "apportion.deliver.adapted",
}


def __getattr__(name: str) -> object:
    """Public names are imported when they are first used: `apportion --help` should not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'apportion' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
