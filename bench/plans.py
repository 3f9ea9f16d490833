"""One healed network under several plans, each placed on the same held-out samples and weighed on the same test samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path as File
from typing import Any, NamedTuple

from apportion.deliver import deciding
from apportion.deliver.weighing import weigh
from apportion.engine import Backend
from apportion.intake import Parts, Source
from apportion.network import Network
from apportion.vocab import Ladder, Plan


class Way(NamedTuple):
    """A plan, and what runs it."""

    plan: Plan
    backend: Backend = "openvino"
    buckets: tuple[int, ...] = (1, 8, 32)


def compare(
    ways: Mapping[str, Way], network: Network, reference: Network, parts: Parts, source: Source, runs: File, *, repeats: int, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Figures, rungs, frontier and times of each way, against `reference`, timed on the same back-end; a bundle of each in `runs`."""
    dense_quality = deciding.outcomes(reference, Ladder((reference.space.full,), 0), parts.report, source.fed).quality[:, 0]
    found: dict[str, Any] = {}
    for name, way in ways.items():
        tell(name)
        adapted, seen = deciding.control(network, reference, parts, source, way.plan, backend=way.backend, buckets=way.buckets, tell=tell)
        weighed = weigh(adapted, reference, parts.report, seen, dense_quality, repeats=repeats, tell=tell)
        weighed.adapted.save(runs / name, extra=weighed.files())
        bundle = weighed.adapted.bundle
        rungs = [{"path": p.name, "gmacs": r.gmacs, "accuracy": r.accuracy} for p, r in zip(bundle.ladder.paths, bundle.rungs, strict=True)]
        times = next(iter(bundle.costs.values()))
        found[name] = {"figures": dict(weighed.figures), "rungs": rungs, "frontier": list(bundle.frontier), "budget": bundle.budget, "times": times}
    return found
