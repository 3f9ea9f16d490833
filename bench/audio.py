"""Sound: a small encoder of our own for spoken digits, trained from nothing, and the same network made adaptive by healing on the same recordings.

`python -m bench audio --data FOLDER` wants FOLDER/fsdd: train|test/DIGIT/*.wav (the Free Spoken Digit Dataset, 8 kHz). A second of sound is 100 frames of
40 bands, of which two convolutions make 50 tokens; half of the recordings are shorter than 0.42 s, and the rest of their second is silence.
A fifth of the training recordings of each digit is held out to learn and place the controller; the test recordings are read once, at the end.
"""

from __future__ import annotations

import copy
import time
from dataclasses import asdict, replace
from pathlib import Path as File

from apportion import verbs
from apportion.intake import Listen, Source
from apportion.network import Architecture, put
from apportion.train import Recipe, Sounds, fit, sandwich
from apportion.vocab import Choice, Path, Plan, Space
from bench import results
from bench.plans import Way, compare

FEED = Listen("whisper", 8000, 100, bands=40, window=200, hop=80)
SHAPE = Architecture(
    image_size=0, patch=0, dim=128, depth=6, heads=4, hidden=512, classes=1, frames=FEED.length, bands=FEED.bands, class_token=False, pool="mean"
)
GLANCE = 1
CHOICES = (Choice("reducer", "tome"), Choice("depth", "skip"))
PLAN = Plan(choices=CHOICES, glance=GLANCE, rungs=5, tolerance=0.3)
WAYS = {"glance": Way(PLAN), "checkpoints": Way(replace(PLAN, control="checkpoints"))}
TRAINING = Recipe(epochs=25, batch=32, learning_rate=1e-3, warmup=0.1, ema=0.99, crop_padding=0, weight_decay=0.05, label_smoothing=0.05)
HEALING = Recipe(epochs=12, batch=32, learning_rate=5e-4, warmup=0.1, ema=0.99, crop_padding=0, weight_decay=0.05, seed=100)


def taught_paths(space: Space) -> list[Path]:
    """Every exit from the glance on; half, and three quarters of the tokens gone right after it, at full depth and at two thirds."""
    found = [space.path(blocks=range(depth)) for depth in range(GLANCE, space.depth)]
    for left in (space.tokens // 2, space.tokens - space.tokens // 2 - space.tokens // 4):
        schedule = [space.tokens] * GLANCE + [max(left, space.tokens // 2)] + [left] * (space.depth - GLANCE - 1)
        found += [space.path(blocks=range(depth), tokens=schedule[:depth]) for depth in (space.depth, 2 * space.depth // 3)]
    return found


def main(data: File, runs: File, *, repeats: int = 30) -> None:
    begin = time.monotonic()

    def tell(text: str) -> None:
        print(f"{time.monotonic() - begin:7.1f} s  {text}", flush=True)

    network, feed, parts = verbs.scratch(data / "fsdd", recipe=TRAINING, architecture=SHAPE, feed=FEED, folder=runs / "dense", tell=tell)
    assert parts.teach is not None
    network.eval()
    reference = copy.deepcopy(network).requires_grad_(False)
    for choice in CHOICES:
        put(network, choice)
    inputs, labels = next(parts.teach.batches(len(parts.teach), feed))
    fit(network, Sounds(inputs, labels), sandwich(taught_paths(network.space), teacher=reference, feature_weight=0.1), recipe=HEALING, folder=runs / "healed")
    network.eval().requires_grad_(False)
    source = Source(network, feed, parts.teach.classes, None, {"source": "bench audio", "trained_on": "fsdd"})
    found = compare(WAYS, network, reference, parts, source, runs, repeats=repeats, tell=tell)
    trained = {"dense": asdict(TRAINING), "healing": asdict(HEALING)}
    results.write("audio", "python -m bench audio --data FOLDER", {"runs": {"fsdd": found}, "recipes": trained})
