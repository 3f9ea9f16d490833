"""Running: every path at every batch size is one static graph, built beforehand; each sample is routed to its own."""

from apportion.engine.compile import build
from apportion.engine.engine import Engine
from apportion.engine.gate import Gate, never_slower
from apportion.engine.graph import Backend, Graph, serving

__all__ = ["Backend", "Engine", "Gate", "Graph", "build", "never_slower", "serving"]
