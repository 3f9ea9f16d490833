"""Running: every path at every batch size is one static graph, built beforehand; each sample is routed to its own."""

from apportion.engine.buckets import CALL_ROWS, choose, choose_lengths, expected, lengths, offered
from apportion.engine.compile import RUNTIMES, build
from apportion.engine.engine import Engine
from apportion.engine.gate import Gate, never_slower
from apportion.engine.graph import COARSE, Backend, Graph, serving
from apportion.engine.packed import Packs, pack
from apportion.engine.relay import Relay
from apportion.engine.table import Build, plain
from apportion.engine.texts import Lengths, Routed, cut, used

__all__ = [
    "CALL_ROWS",
    "COARSE",
    "RUNTIMES",
    "Backend",
    "Build",
    "Engine",
    "Gate",
    "Graph",
    "Lengths",
    "Packs",
    "Relay",
    "Routed",
    "build",
    "choose",
    "choose_lengths",
    "cut",
    "expected",
    "lengths",
    "never_slower",
    "offered",
    "pack",
    "plain",
    "serving",
    "used",
]
