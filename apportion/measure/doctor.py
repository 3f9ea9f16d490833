"""What this machine can run, and how fast."""

from __future__ import annotations

import hashlib
import os
import platform
import time
from pathlib import Path as File
from typing import Any

import torch

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


def fingerprint() -> str:
    """Twelve hex digits that name this device, its threads in use and torch's version: a table measured under another name does not hold here."""
    return hashlib.sha256(repr(sorted(_facts().items())).encode()).hexdigest()[:12]


def device() -> dict[str, Any]:
    """Plain facts about the machine with its measured matmul rates, plus `fingerprint` and `advice`. Takes about two seconds.

    Rates are of the GPU where there is one, else of the processor on torch's present number of threads.
    """
    where = "cuda" if torch.cuda.is_available() else "cpu"
    facts = {
        **_facts(),
        "measured_on": where,
        "matmul_gflops": {name: matmul_gflops(dtype, device=where) for name, dtype in DTYPES.items()},
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
