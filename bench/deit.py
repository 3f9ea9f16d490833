"""A real ImageNet-trained DeiT-Tiny made adaptive by merging: without training, and after a short healing on small pictures without labels.

`python -m bench deit --data FOLDER --model FILE.safetensors` wants FOLDER/imagenet_samples_1000/<synset>/<n>.webp with a classes.json, and for healing
FOLDER/tiny_imagenet_50. Control learns on one half of the 1,000 images, the other is reported on. Accuracy is paired against the dense network on the same
500 images, whose standard error is about 1.9 points; of a paired difference it is about 0.7.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path as File
from typing import Any

import torch

from apportion import verbs
from apportion.intake import read_images
from apportion.vocab import Choice, Plan
from bench import results

# Also where it takes longer than the dense network: what is measured here is whether it does.
PLAN = Plan(choices=(Choice("reducer", "tome"),), glance=3, rungs=5, tolerance=0.3, never_slower=False)
HEALED = replace(PLAN, epochs=1.0, batch=16, learning_rate=3e-5)
TAUGHT = 2400  # pictures of 64 pixels, without their labels


def main(data: File, model: File, runs: File, *, repeats: int = 12) -> None:
    images = read_images(data / "imagenet_samples_1000", split="all")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    quarter = len(images) // 4
    decide, place, report = (images.rows(part) for part in (order[:quarter], order[quarter : 2 * quarter], order[2 * quarter :]))
    small = read_images(data / "tiny_imagenet_50", split="train")
    some = torch.randperm(len(small), generator=torch.Generator().manual_seed(0))[:TAUGHT]
    teach = replace(small.rows(some), labels=None, classes=())
    found = {
        "training_free": one(model, verbs.Parts(None, decide, place, report), PLAN, runs / "training-free", repeats),
        "healed": one(model, verbs.Parts(teach, decide, place, report), HEALED, runs / "healed", repeats),
    }
    results.write("deit", "python -m bench deit --data FOLDER --model FILE", {"runs": found})


def one(model: File, parts: verbs.Parts, plan: Plan, out: File, repeats: int) -> dict[str, Any]:
    begin = time.monotonic()
    weighed = verbs.adapt(
        model,
        parts,
        plan=plan,
        out=out,
        timm_name="deit_tiny_patch16_224",
        buckets=(1, 8),
        repeats=repeats,
        tell=lambda text: print(f"{time.monotonic() - begin:7.1f} s  {text}", flush=True),
    )
    bundle = weighed.adapted.bundle
    rungs = [{"path": p.name, "gmacs": r.gmacs, "accuracy": r.accuracy} for p, r in zip(bundle.ladder.paths, bundle.rungs, strict=True)]
    times = next(iter(bundle.costs.values()))
    figures = {"figures": weighed.figures, "rungs": rungs, "frontier": list(bundle.frontier), "budget": bundle.budget, "times": times}
    return {**figures, "plan": {"epochs": plan.epochs, "learning_rate": plan.learning_rate, "batch": plan.batch}, "seconds": time.monotonic() - begin}
