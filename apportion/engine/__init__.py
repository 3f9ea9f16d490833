"""Running: every path at every batch size is one static graph, built beforehand; each sample is routed to its own."""

from apportion.engine.compile import Backend, build, serving
from apportion.engine.engine import Engine

__all__ = ["Backend", "Engine", "build", "serving"]
