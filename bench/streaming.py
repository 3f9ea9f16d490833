"""Samples that are larger than a bound: peak memory of reading and passing over them, in a file and in memory, and whether the answers are the same.

`python -m bench reading --part streaming` needs no data, 4 GB of memory and of disk, and a few minutes of one core. A made-up .npz of 3,400 pictures of
256 x 256 (0.67 GB) is read, a fifth held out, the rest made into inputs (2.1 GB of float32) and passed over once in shuffled batches of 32, as training does.
`--kind texts`, `rows`, `series`, `recordings` or `masks` does the same with some hundred megabytes of these, and a bound of 8 MiB.
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
import wave
from pathlib import Path as File
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from apportion.intake import Align, Listen, Preprocess, Tabulate, read_audio_set, read_images, read_rows, read_series, read_texts
from apportion.intake.laid import gathered
from apportion.intake.masks import read_masked
from apportion.intake.vocabulary import learned
from apportion.train.data import Images, Sounds, Texts
from bench import results

SIDE, BATCH, WORDS, POINTS = 256, 32, 200, 1000
COUNT = {"pictures": 3400, "texts": 40_000, "rows": 40_000, "series": 10_000, "recordings": 1000, "masks": 300}
BOUNDS = {**dict.fromkeys(COUNT, 8), "pictures": 256}  # mebibytes
WAYS = ("in memory", "in a file")
KINDS = {"own_mebibytes": "RssAnon", "file_mebibytes": "RssFile"}
ROUNDS = 2


def make(kind: str, folder: File) -> None:
    """Data of this kind in FOLDER/made."""
    random, count, place = np.random.default_rng(0), COUNT[kind], folder / "made"
    place.mkdir()
    if kind == "pictures":
        x = {f"x_{name}": random.integers(0, 256, (n, SIDE, SIDE, 3), dtype=np.uint8) for name, n in (("train", count), ("test", 10))}
        np.savez(place / "made.npz", allow_pickle=False, y_train=np.arange(count) % 10, y_test=np.arange(10), **x)
    elif kind == "series":
        np.savez(place / "made.npz", allow_pickle=False, x=random.standard_normal((count, 1, POINTS)), y=np.arange(count) % 10)
    elif kind == "texts":
        words = np.array([f"word{n}" for n in range(5000)])
        with (place / "train.csv").open("w") as file:
            file.write("text,label\n")
            file.writelines(f"{' '.join(words[random.integers(0, 5000, WORDS)])},{n % 10}\n" for n in range(count))
    elif kind == "rows":
        with (place / "train.csv").open("w") as file:
            file.write(",".join(f"c{n}" for n in range(30)) + ",label\n")
            file.writelines(",".join(f"{cell:.4f}" for cell in random.standard_normal(29)) + f",red{n % 7},{n % 10}\n" for n in range(count))
    elif kind == "recordings":
        for n in range(count):
            (place / str(n % 10)).mkdir(exist_ok=True)
            with wave.open(str(place / str(n % 10) / f"{n}.wav"), "wb") as sound:
                sound.setparams((1, 2, 16000, 0, "NONE", ""))
                sound.writeframes(random.integers(-9000, 9000, 16000, dtype=np.int16).tobytes())
    else:
        for name, shape in (("images", (SIDE, SIDE, 3)), ("masks", (SIDE, SIDE))):
            (place / name).mkdir()
            for n in range(count):
                Image.fromarray(random.integers(0, 10, shape, dtype=np.uint8)).save(place / name / f"{n}.png", compress_level=1)


def read(kind: str, source: File, bound: int, folder: File) -> tuple[Tensor, Tensor | None, Any]:
    """Inputs and labels of four fifths of what is there, and how they were fed."""
    picture = Preprocess(SIDE, (0.5,) * 3, (0.25,) * 3)  # pyright: ignore[reportArgumentType]
    place: dict[str, Any] = {"bound": bound, "folder": folder}
    if kind == "texts":
        texts, _ = read_texts(source / "train.csv", **place).split(0.2)
        feed = learned(texts.rows(range(min(1000, len(texts)))).texts, length=256)
        return *texts.gathered(feed, **place), feed
    if kind == "rows":
        rows, _ = read_rows(source / "train.csv", **place).split(0.2)
        feed = Tabulate.learned(rows.cells)
        return gathered(rows, feed, **place), rows.labels, feed
    if kind == "series":
        series, _ = read_series(source / "made.npz", **place).split(0.2)
        feed = Align.learned(series.values)
        return gathered(series, feed, **place), series.labels, feed
    if kind == "recordings":
        feed = Listen("whisper", 16000, 100, bands=40, window=400, hop=160)
        sounds, _ = read_audio_set(source).split(0.2)
        return gathered(sounds, feed, **place), sounds.labels, feed
    whole = read_masked(source, feed=picture, **place) if kind == "masks" else read_images(source / "made.npz", split="train", **place)
    pictures, _ = whole.split(0.2)
    return gathered(pictures, picture, **place), pictures.labels, picture


def once(way: str, kind: str, folder: str) -> dict[str, Any]:
    """Seconds of reading and of the pass, what was held before, and a digest of every batch."""
    torch.set_num_threads(1)
    bound, place = 2**62 if way == "in memory" else BOUNDS[kind] * 2**20, File(folder)
    before, start, digest = held(), time.perf_counter(), hashlib.sha256()
    inputs, labels, feed = read(kind, place / "made", bound, place)
    passing, data = time.perf_counter(), Texts(inputs, labels, padding=feed.padding) if kind == "texts" else Sounds(inputs, labels)
    data = Images(inputs, labels) if kind in ("pictures", "masks") else data
    for rows in torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).split(BATCH):
        batch, some = data.batch(rows)
        digest.update(batch.numpy().data)
        digest.update((torch.zeros(0) if some is None else some).numpy().data)
    passed = time.perf_counter()
    mebibytes = inputs.nbytes / 2**20
    return {"before": before, "input_mebibytes": mebibytes, "read_s": passing - start, "pass_s": passed - passing, "digest": digest.hexdigest()}


def held(process: int | str = "self") -> dict[str, float]:
    """Mebibytes that a process holds, by kind; none where it is gone."""
    try:
        lines = dict(line.split(":", 1) for line in File(f"/proc/{process}/status").read_text().splitlines())
        return {kind: int(lines[name].split()[0]) / 1024 for kind, name in KINDS.items()}
    except (OSError, KeyError):
        return {}


def child(way: str, kind: str, folder: File) -> dict[str, Any]:
    """`once` in a fresh process, with the most that it held beside what it began with."""
    most = dict.fromkeys(KINDS, 0.0)
    with subprocess.Popen([sys.executable, "-m", "bench.streaming", way, kind, str(folder)], stdout=subprocess.PIPE, text=True) as run:
        while run.poll() is None:
            most = {kind: max(most[kind], value) for kind, value in held(run.pid).items()} or most
            time.sleep(0.003)
        said = run.stdout.read() if run.stdout is not None else ""
    if run.returncode:
        raise SystemExit(f"{way}: ended with {run.returncode}")
    found = json.loads(said.splitlines()[-1])
    before = found.pop("before")
    return {**found, **{kind: value - before[kind] for kind, value in most.items()}}


def main(kind: str = "pictures") -> None:
    torch.set_num_threads(1)
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "bench.streaming", "make", kind, folder], check=True)
        for turn in range(ROUNDS):
            for way in WAYS[:: 1 if turn % 2 else -1]:
                found[way].append(child(way, kind, File(folder)))
                print(way, found[way][-1], flush=True)
        left = sorted(file.name for file in File(folder).iterdir() if file.name != "made")
    same = len({call["digest"] for calls in found.values() for call in calls}) == 1
    names = (*KINDS, "read_s", "pass_s")
    median = {way: {name: statistics.median(call[name] for call in calls) for name in names} for way, calls in found.items()}
    figures = {"bound_mebibytes": float(BOUNDS[kind]), "same_answers": same, "left_behind": left, "median": median, "calls": found}
    name, words = ("streaming", "") if kind == "pictures" else (f"streaming-{kind}", f" --kind {kind}")
    results.write(name, f"python -m bench reading --part streaming{words}", {kind: COUNT[kind], "side": SIDE, "batch": BATCH, **figures})


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(sys.argv[2], File(sys.argv[3]))
    else:
        print(json.dumps(once(*sys.argv[1:])))
