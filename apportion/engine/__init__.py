"""Running: every path at every batch size is one static graph, built beforehand; each sample is routed to its own."""

from apportion.engine.buckets import lengths
from apportion.engine.compile import build
from apportion.engine.engine import Engine
from apportion.engine.gate import Gate, never_slower
from apportion.engine.graph import COARSE, Backend, Graph, serving
from apportion.engine.relay import Relay
from apportion.engine.table import Build, plain
from apportion.engine.texts import Lengths, Routed, cut, used

__all__ = [
    "COARSE",
    "Backend",
    "Build",
    "Engine",
    "Gate",
    "Graph",
    "Lengths",
    "Relay",
    "Routed",
    "build",
    "cut",
    "lengths",
    "never_slower",
    "plain",
    "serving",
    "used",
]
