"""What this machine can run, how fast, and by which back-end."""

from __future__ import annotations

import hashlib
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor

from apportion.errors import ApportionError, EngineError
from apportion.measure.latency import Ratio, Timing, interleaved, ratio

PACKAGES = ("timm", "transformers", "tokenizers", "soundfile", "pyarrow", "openvino", "onnxruntime", "lightgbm", "triton")
"""Of the extras, in the order of the pipeline: what reads models, what reads data, what serves."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def cpu_name() -> str:
    """The processor's trade name; where the system keeps none, its architecture."""
    info = File("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def matmul_gflops(dtype: torch.dtype, *, device: str = "cpu", seconds: float = 0.25) -> float:
    """Best rate of a square product in GFLOP/s (two per multiply-add). Takes about twice `seconds`, and under a second at the default."""
    size, taken = 128, 0.0
    square = torch.ones(size, size, dtype=dtype, device=device)
    # Small products time the call, not the arithmetic: grow until one takes a tenth of the time there is.
    while taken < seconds / 10 and size < 8192:
        size *= 2
        square = torch.ones(size, size, dtype=dtype, device=device)
        taken = min(_seconds(square), _seconds(square))
    best, end = taken, time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, _seconds(square))
    return 2 * size**3 / best / 1e9


def _seconds(square: torch.Tensor) -> float:
    begin = time.perf_counter()
    product = square @ square
    if product.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def _facts() -> dict[str, Any]:
    """What stays the same from run to run on one machine with as many threads."""
    return {
        "cpu": cpu_name(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def packages() -> dict[str, str | None]:
    """The version of each package that an extra brings; None where it is not installed."""

    def found(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {name: found(name) for name in PACKAGES}


def fingerprint() -> str:
    """Twelve hex digits that name this device, its threads in use and torch's version: a table measured under another name does not hold here."""
    return hashlib.sha256(repr(sorted(_facts().items())).encode()).hexdigest()[:12]


def device() -> dict[str, Any]:
    """Plain facts about the machine with its measured matmul rates, plus `packages`, `fingerprint` and `advice`. Takes about two seconds.

    Rates are of the GPU where there is one, else of the processor on torch's present number of threads.
    """
    where = "cuda" if torch.cuda.is_available() else "cpu"
    facts = {
        **_facts(),
        "measured_on": where,
        "matmul_gflops": {name: matmul_gflops(dtype, device=where) for name, dtype in DTYPES.items()},
        "packages": packages(),
        "fingerprint": fingerprint(),
    }
    return {**facts, "advice": advice(facts)}


def advice(facts: dict[str, Any]) -> list[str]:
    """Sentences that follow from the facts of `device`."""
    rates: dict[str, float] = facts["matmul_gflops"]
    quick, slow = sorted(rates, key=lambda name: -rates[name])
    said = [f"Run in {quick}: its products are {rates[quick] / rates[slow]:.1f} times as fast as in {slow} here."]
    if facts["measured_on"] == "cpu" and facts["threads"] < facts["cores"]:
        said.append(f"Torch uses {facts['threads']} of {facts['cores']} cores: raise it with torch.set_num_threads when nothing else runs.")
    if facts["measured_on"] == "cpu":
        said.append("No GPU is in reach: savings in tokens and width show as time once batch times tokens passes about 800 rows.")
    return said


@dataclass(frozen=True, slots=True)
class Trial:
    """One back-end on one module: how it did, or why it is out. Times are None where it was not timed."""

    backend: str
    out: str  # why it cannot be used; "" where it can
    build_seconds: float
    distance: float | None  # largest difference to the reference over the largest value of the reference
    timing: Timing | None
    slower: Ratio | None  # its time over that of the fastest

    @property
    def reason(self) -> str:
        """Why it stands where it stands, as a sentence."""
        if self.slower is None:
            return self.out
        if self.slower.value == 1:
            return "the fastest"
        measured = f"{self.slower.value:.2f} of the fastest one's time ({self.slower.low:.2f} to {self.slower.high:.2f})"
        return measured if self.slower.low > 1 else f"as fast within the noise: {measured}"


def rank_backends(
    builders: Mapping[str, Callable[[], Callable[..., Tensor]]],
    reference: Callable[..., Tensor],
    samples: Sequence[Any],
    *,
    tolerance: float = 1e-3,
    repeats: int = 20,
    min_seconds: float = 0.0,
) -> list[Trial]:
    """Every back-end built once, held against the reference, and timed in the same rounds as the others: best first, those that are out last, with the reason.

    `builders`: name -> what builds the same module by that back-end, or raises a typed error (not installed, not one whole graph), which becomes the reason.
    `samples`: real arguments of a call; on blank ones a wrong back-end may look right. `tolerance`: of `distance`; single precision stays below 1e-5, and
    what rounds to 8 bits is out at the default. Those that no 95 % interval tells from the fastest keep the order in which they were given: name the one first
    that is wanted when nothing speaks against it. Call it in the state in which graphs are run. Cost: the builds, and one run for each back-end and round.
    Not for other threads, batch sizes or devices than those of this run. Raises EngineError where none is left.
    """
    wanted, trials, calls = reference(*samples), dict[str, Trial](), dict[str, Callable[[], Any]]()
    for name, builder in builders.items():
        begin = time.perf_counter()
        try:
            graph = builder()
            off = _distance(graph(*samples), wanted)
        except ApportionError as error:
            trials[name] = Trial(name, str(error), time.perf_counter() - begin, None, None, None)
            continue
        wrong = "" if off <= tolerance else f"answers differ by {off:.2g} of the largest, more than {tolerance:.2g}"
        trials[name] = Trial(name, wrong, time.perf_counter() - begin, off, None, None)
        if not wrong:
            calls[name] = partial(graph, *samples)
    if not calls:
        found = "; ".join(f"{name}: {trial.out}" for name, trial in trials.items()) or "no back-end"
        raise EngineError(found, wanted="one back-end that answers as the module does", do="Install one, or leave the module as it is.")
    times = interleaved(calls, repeats=repeats, min_seconds=min_seconds)
    best = min(times, key=lambda name: times[name].median_ms)
    timed = [replace(trials[name], timing=times[name], slower=ratio(times[name], times[best])) for name in calls]
    alike, behind = ([trial for trial in timed if trial.slower and (trial.slower.low <= 1) is near] for near in (True, False))
    return [*alike, *sorted(behind, key=lambda trial: trial.slower or Ratio(0, 0, 0)), *(trial for trial in trials.values() if trial.out)]


def _distance(answer: Tensor, wanted: Tensor) -> float:
    """Infinite where the shapes differ or a value is not a number."""
    if answer.shape != wanted.shape:
        return float("inf")
    off = ((answer - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12)).item()
    return off if off == off else float("inf")
