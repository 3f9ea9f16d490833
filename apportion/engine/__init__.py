"""Running: every path at every batch size is one static graph, built beforehand; each sample is routed to its own."""

from apportion.engine.buckets import lengths
from apportion.engine.compile import build
from apportion.engine.engine import Engine
from apportion.engine.gate import Gate, never_slower
from apportion.engine.graph import Backend, Graph, serving
from apportion.engine.texts import Lengths, cut, used

__all__ = ["Backend", "Engine", "Gate", "Graph", "Lengths", "build", "cut", "lengths", "never_slower", "serving", "used"]
