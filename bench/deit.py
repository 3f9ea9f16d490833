"""A real ImageNet-trained DeiT-Tiny made adaptive without training: merging only, calibrated on one half of 1,000 images, reported on the other.

`python -m bench deit --data FOLDER --model FILE.safetensors` wants FOLDER/imagenet_samples_1000/<synset>/<n>.webp with a classes.json. Accuracy is paired
against the dense network on the same 500 images, whose standard error is about 1.9 points; of a paired difference it is about 0.7.
"""

from __future__ import annotations

import time
from pathlib import Path as File

import torch

from apportion import verbs
from apportion.intake import read_images
from apportion.vocab import Choice, Plan
from bench import results

PLAN = Plan(choices=(Choice("reducer", "tome"),), glance=3, rungs=5, tolerance=0.3)


def main(data: File, model: File, *, repeats: int = 12) -> None:
    images = read_images(data / "imagenet_samples_1000", split="all")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    quarter = len(images) // 4
    decide, place, report = (images.rows(part) for part in (order[:quarter], order[quarter : 2 * quarter], order[2 * quarter :]))
    begin = time.monotonic()
    weighed = verbs.adapt(
        model,
        verbs.Parts(None, decide, place, report),
        plan=PLAN,
        out=File("runs/deit"),
        timm_name="deit_tiny_patch16_224",
        buckets=(1, 8),
        repeats=repeats,
        tell=lambda text: print(f"{time.monotonic() - begin:7.1f} s  {text}", flush=True),
    )
    bundle = weighed.adapted.bundle
    rungs = [{"path": p.name, "gmacs": r.gmacs, "accuracy": r.accuracy} for p, r in zip(bundle.ladder.paths, bundle.rungs, strict=True)]
    times = next(iter(bundle.costs.values()))
    figures = {"figures": weighed.figures, "rungs": rungs, "frontier": list(bundle.frontier), "budget": bundle.budget, "times": times}
    results.write("deit", "python -m bench deit --data FOLDER --model FILE", {**figures, "seconds": time.monotonic() - begin})
