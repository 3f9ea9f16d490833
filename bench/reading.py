"""What reading a text model costs over loading it: a random BERT of about 90 million parameters, transformers' from_pretrained beside `read_model`.

`python -m bench reading` needs no data and some ten minutes of one core. Each way runs in a process of its own, in turn, with everything imported before
the clock starts and the file in the page cache; memory is the peak that the call adds, pages of the file included. from_pretrained leaves the weights in
the file until they are used, so a second way also answers once: it has read all but the words that it did not meet. "again" finds the test with shaken
weights in a cache, where another process has put it.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path as File
from typing import Any

import torch

from apportion.intake import _torchvision
from bench import results

SHAPE: dict[str, Any] = {"vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 9, "num_attention_heads": 12, "intermediate_size": 3072, "num_labels": 2}
WAYS = (
    *("from_pretrained", "from_pretrained, one answer"),
    *("read_model", "read_model, again", "read_model, 128 tokens", "read_model, 128 tokens, again"),
)
UNITS = ("seconds", "cpu_seconds", "mebibytes")
ROUNDS = 5
LENGTH = 128


def once(way: str, folder: str) -> dict[str, float]:
    """What one call takes: seconds, those of its own work, and the mebibytes that it adds to the peak of what is resident. "make" writes the model instead."""
    torch.set_num_threads(1)
    _torchvision.ready()
    from transformers import BertConfig, BertForSequenceClassification

    from apportion.intake import hf_audio, hf_folder, hf_text, read_model  # noqa: F401

    cache = File(folder) / "cache"

    if way == "make":
        torch.manual_seed(0)
        model = BertForSequenceClassification(BertConfig(**SHAPE))
        model.save_pretrained(folder)
        for length in (None, LENGTH):
            read_model(folder, length=length, cache=cache)
        return {"parameters": sum(parameter.numel() for parameter in model.parameters())}
    before, start, began = _peak(), time.perf_counter(), time.process_time()
    if way.startswith("read_model"):
        source = read_model(folder, length=LENGTH if str(LENGTH) in way else None, cache=cache if "again" in way else None)
        assert (source.provenance["equality_found_in"] is not None) == ("again" in way)
    else:
        model = BertForSequenceClassification.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
        if way != "from_pretrained":
            with torch.no_grad():
                model(input_ids=torch.arange(SHAPE["vocab_size"] - LENGTH, SHAPE["vocab_size"])[None])
    seconds, worked = time.perf_counter() - start, time.process_time() - began
    return {"seconds": seconds, "cpu_seconds": worked, "mebibytes": _peak() - before}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def child(way: str, folder: File) -> dict[str, float]:
    """`once` in a fresh process. This one must stay small: on Linux a process inherits the peak of the one that started it."""
    made = subprocess.run([sys.executable, "-m", "bench.reading", way, str(folder)], capture_output=True, text=True, check=True)
    return json.loads(made.stdout.splitlines()[-1])


def measure(folder: File) -> dict[str, list[dict[str, float]]]:
    """Every way in its own process, ROUNDS times, in turn."""
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for turn in range(ROUNDS):
        for way in WAYS[turn % len(WAYS) :] + WAYS[: turn % len(WAYS)]:
            found[way].append(child(way, folder))
            print(way, found[way][-1], flush=True)
    return found


def summary(parameters: float, found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Each way of ours over each of theirs, round by round, and the peak over what the weights take."""
    weights = 4 * parameters / 2**20
    ratio = {
        ours: {over: {unit: _spread([a[unit] / b[unit] for a, b in zip(found[ours], found[over], strict=True)]) for unit in UNITS} for over in WAYS[:2]}
        for ours in WAYS[2:]
    }
    peak = {way: _spread([call["mebibytes"] / weights for call in calls]) for way, calls in found.items()}
    return {"parameters": parameters, "weights_mebibytes": weights, "rounds": ROUNDS, "calls": found, "ratio": ratio, "peak_over_weights": peak}


def _spread(each: list[float]) -> dict[str, float]:
    return {"median": statistics.median(each), "low": min(each), "high": max(each)}


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        made = child("make", File(folder))
        found = measure(File(folder))
    results.write("reading", "python -m bench reading", summary(made["parameters"], found))


if __name__ == "__main__":
    print(json.dumps(once(*sys.argv[1:])))
