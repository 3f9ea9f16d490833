"""Samples that are larger than a bound: peak memory of reading and passing over them, in a file and in memory, and whether the answers are the same.

`python -m bench reading --part streaming` needs no data, 4 GB of memory and of disk, and a few minutes of one core. A made-up .npz of 3,400 pictures of
256 x 256 (0.67 GB) is read, a fifth held out, the rest made into inputs (2.1 GB of float32) and passed over once in shuffled batches of 32, as training does.
Each way runs in a process of its own, in turn. Memory is what the process holds of its own (RssAnon of Linux), looked at every few milliseconds, less what it
held before it began; pages of files are told apart: the system takes them back when it wants them.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path as File
from typing import Any

import numpy as np
import torch

from bench import results

COUNT, SIDE, BATCH = 3400, 256, 32
BOUNDS = {"in memory": 2**62, "in a file": 256 * 2**20}
KINDS = {"own_mebibytes": "RssAnon", "file_mebibytes": "RssFile"}
ROUNDS = 2


def make(file: File) -> None:
    random = np.random.default_rng(0)
    x = {f"x_{name}": random.integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8) for name, count in (("train", COUNT), ("test", 10))}
    np.savez(file, allow_pickle=False, y_train=np.arange(COUNT) % 10, y_test=np.arange(10), **x)


def once(way: str, folder: str) -> dict[str, Any]:
    """Seconds of reading and of the pass, what was held before, and a digest of every batch."""
    torch.set_num_threads(1)
    from apportion.intake import Preprocess, read_images
    from apportion.intake.laid import gathered
    from apportion.train.data import Images

    bound, feed, place = BOUNDS[way], Preprocess(SIDE, (0.5,) * 3, (0.25,) * 3), File(folder)  # pyright: ignore[reportArgumentType]
    before, start, digest = held(), time.perf_counter(), hashlib.sha256()
    rest, _ = read_images(place / "made.npz", split="train", bound=bound, folder=place).split(0.2)
    inputs = gathered(rest, feed, bound=bound, folder=place)
    read, data = time.perf_counter(), Images(inputs, rest.labels)
    for rows in torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).split(BATCH):
        batch, labels = data.batch(rows)
        digest.update(batch.numpy().data)
        digest.update((torch.zeros(0) if labels is None else labels).numpy().data)
    passed = time.perf_counter()
    return {"before": before, "input_mebibytes": inputs.nbytes / 2**20, "read_s": read - start, "pass_s": passed - read, "digest": digest.hexdigest()}


def held(process: int | str = "self") -> dict[str, float]:
    """Mebibytes that a process holds, by kind; none where it is gone."""
    try:
        lines = dict(line.split(":", 1) for line in File(f"/proc/{process}/status").read_text().splitlines())
        return {kind: int(lines[name].split()[0]) / 1024 for kind, name in KINDS.items()}
    except (OSError, KeyError):
        return {}


def child(way: str, folder: File) -> dict[str, Any]:
    """`once` in a fresh process, with the most that it held beside what it began with."""
    most = dict.fromkeys(KINDS, 0.0)
    with subprocess.Popen([sys.executable, "-m", "bench.streaming", way, str(folder)], stdout=subprocess.PIPE, text=True) as run:
        while run.poll() is None:
            most = {kind: max(most[kind], value) for kind, value in held(run.pid).items()} or most
            time.sleep(0.003)
        said = run.stdout.read() if run.stdout is not None else ""
    if run.returncode:
        raise SystemExit(f"{way}: ended with {run.returncode}")
    found = json.loads(said.splitlines()[-1])
    before = found.pop("before")
    return {**found, **{kind: value - before[kind] for kind, value in most.items()}}


def main() -> None:
    torch.set_num_threads(1)
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in BOUNDS}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "bench.streaming", "make", folder], check=True)
        for turn in range(ROUNDS):
            for way in list(BOUNDS)[:: 1 if turn % 2 else -1]:
                found[way].append(child(way, File(folder)))
                print(way, found[way][-1], flush=True)
        left = sorted(file.name for file in File(folder).iterdir() if file.name != "made.npz")
    same = len({call["digest"] for calls in found.values() for call in calls}) == 1
    names = (*KINDS, "read_s", "pass_s")
    median = {way: {name: statistics.median(call[name] for call in calls) for name in names} for way, calls in found.items()}
    figures = {"bound_mebibytes": BOUNDS["in a file"] / 2**20, "same_answers": same, "left_behind": left, "median": median, "calls": found}
    results.write("streaming", "python -m bench reading --part streaming", {"pictures": COUNT, "side": SIDE, "batch": BATCH, **figures})


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(File(sys.argv[2]) / "made.npz")
    else:
        print(json.dumps(once(*sys.argv[1:])))
