"""Milliseconds of any path at any batch size on this device, from a few that were measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor, nn

from apportion.errors import DataError, EngineError
from apportion.measure.doctor import fingerprint
from apportion.measure.latency import Timing, interleaved
from apportion.network import Network
from apportion.vocab import Path

TERMS = ("call", "blocks", "products", "attention", "rows", "activations", "cuts", "matching")
Point = tuple[Path, int]  # a path at a batch size


@dataclass(frozen=True, slots=True)
class Forecast:
    """A time for each kind of work, none negative, so that more work never takes less.

    `error` and `worst` are the median and the largest relative error on paths that were left out of the fit, each in turn. Not for networks whose time depends
    on what they read, nor for batch sizes far from those measured.
    """

    weights: tuple[float, ...]  # ms for each unit of TERMS
    error: float
    worst: float
    points: int
    backend: str
    fingerprint: str

    def ms(self, network: Network, path: Path, batch: int) -> float:
        """Milliseconds of one call of `network.at(path)` with `batch` samples. Raises EngineError on another device than the one it was measured on."""
        if self.fingerprint != fingerprint():
            raise EngineError(f"times of device {self.fingerprint}", wanted=f"of this one, {fingerprint()}", do="Measure again here.")
        return float(work(network, path, batch) @ np.asarray(self.weights))

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "weights": dict(zip(TERMS, self.weights, strict=True))}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Forecast:
        """Raises DataError where the terms are not those of today."""
        if tuple(data["weights"]) != TERMS:
            raise DataError(f"times for {tuple(data['weights'])}", wanted=f"for {TERMS}", do="Measure again.")
        return cls(**{**data, "weights": tuple(data["weights"].values())})


def work(network: Network, path: Path, batch: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """How much of each of TERMS a call does, in closed form: calls, blocks, then millions of multiply-adds and of values passed over."""
    a, prefix = network.architecture, network.architecture.prefix
    channels, before, found = a.dim // a.heads, a.tokens, dict.fromkeys(TERMS, 0.0)
    for step in path.steps:
        attention = 2 * before * before * step.heads * channels
        reducer = network.blocks[step.block].reducer.macs(before, step.tokens, prefix, step.heads)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        found["attention"] += batch * attention / 1e6
        found["matching"] += batch * float(reducer) / 1e6
        found["rows"] += batch * (before + step.tokens) * a.dim / 1e6
        found["activations"] += batch * step.tokens * step.width / 1e6
        found["cuts"] += float(step.tokens < before)
        before = step.tokens
    found["products"] = batch * network.macs(path) / 1e6 - found["attention"] - found["matching"]
    return np.array([1.0, float(len(path.steps)), *(found[term] for term in TERMS[2:])])


def fit(network: Network, times_ms: Mapping[Point, float], *, backend: str) -> Forecast:
    """Non-negative least squares on relative errors (Lawson and Hanson, 1974), and its error on paths left out. Raises DataError on fewer than three paths."""
    paths = list(dict.fromkeys(path for path, _ in times_ms))
    if len(paths) < 3:
        raise DataError(f"times of {len(paths)} paths", wanted="at least three: one is left out at a time", do="Measure more.")
    rows = {point: work(network, *point) / ms for point, ms in times_ms.items()}

    def solved(points: Sequence[Point]) -> np.ndarray[Any, np.dtype[np.float64]]:
        return nnls(np.stack([rows[point] for point in points]), np.ones(len(points)))[0]

    errors = []
    for left in paths:
        weights = solved([point for point in rows if point[0] != left])
        errors += [abs(float(row @ weights) - 1) for (path, _), row in rows.items() if path == left]
    weights = tuple(solved(list(rows)).tolist())
    return Forecast(weights, float(np.median(errors)), float(np.max(errors)), len(rows), backend, fingerprint())


def spread(network: Network, paths: Sequence[Path], count: int) -> list[Path]:
    """`count` of these paths that differ most in the work they do: the first and the last, then always the one farthest from those chosen."""
    rows = np.stack([work(network, path, 1) for path in paths])
    rows = rows / rows.max(0).clip(min=1e-12)
    chosen = list(dict.fromkeys((0, len(paths) - 1)))
    while len(chosen) < min(count, len(paths)):
        chosen.append(int(np.linalg.norm(rows[:, None] - rows[chosen], axis=2).min(1).argmax()))
    return [paths[index] for index in chosen]


def forecast(
    network: Network,
    paths: Sequence[Path],
    example: Tensor,
    *,
    build: Callable[[nn.Module, Tensor], Callable[[Tensor], Any]],
    backend: str,
    batches: Sequence[int] = (1, 8),
    count: int = 8,
    repeats: int = 9,
    tell: Callable[[str], None] = lambda _: None,
) -> Forecast:
    """Build and time `count` of these paths at each batch size, all in the same rounds, and fit. `example`: one input, (1, ...).

    Cost: `count` times `batches` builds; 2 to 6 minutes with a compiler.
    """
    calls: dict[str, Callable[[], Any]] = {}
    points: dict[str, Point] = {}
    with torch.inference_mode(False), torch.no_grad():
        for path in spread(network, paths, count):
            for batch in batches:
                name = f"{path.name}, batch {batch}"
                tell(f"timing {name}")
                inputs = example.expand(batch, *example.shape[1:]).contiguous()
                calls[name] = lambda graph=build(network.at(path), inputs), inputs=inputs: graph(inputs)
                points[name] = (path, batch)
        times: dict[str, Timing] = interleaved(calls, repeats=repeats)
    return fit(network, {points[name]: timing.median_ms for name, timing in times.items()}, backend=backend)
