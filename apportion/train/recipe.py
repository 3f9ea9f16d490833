"""The recipe of a run: every number that shapes it, and everything that follows from them alone.

No state is kept: learning rate, averaging and every random draw are functions of the recipe and the step,
so that a run that was cut off goes on bit by bit as if it had not been.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import nn

from apportion.errors import PlanError


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a network is trained. Raises PlanError, naming the field, for a number that makes no sense."""

    epochs: float
    batch: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.05  # share of the steps
    ema: float = 0.999  # highest share of the old average that is kept in each step; 0 averages nothing
    label_smoothing: float = 0.1
    clip: float = 1.0  # highest norm of the gradient
    mixup: float = 0.0  # both parameters of the beta distribution; 0 mixes nothing
    classes: int | None = None  # needed by mixup where there are labels
    crop_padding: int = 4  # pixels
    flip: bool = False  # only where a mirrored image means the same
    dtype: Literal["fp32", "bf16"] = "fp32"
    optimiser: str = "adamw"
    seed: int = 0
    checkpoint_every_s: float = 60.0

    def __post_init__(self) -> None:
        def need(field: str, fits: bool, wanted: str) -> None:
            if not fits:
                raise PlanError(f"{field} {getattr(self, field)!r}", wanted=wanted, do="Correct the recipe.")

        for field in ("epochs", "learning_rate", "clip"):
            need(field, 0 < getattr(self, field) < math.inf, "a number above 0")
        for field in ("weight_decay", "mixup", "checkpoint_every_s", "crop_padding"):
            need(field, getattr(self, field) >= 0, "0 or more")
        for field in ("warmup", "ema", "label_smoothing"):
            need(field, 0 <= getattr(self, field) < 1, "at least 0 and below 1")
        need("batch", self.batch >= 1, "1 or more")
        need("dtype", self.dtype in ("fp32", "bf16"), "fp32 or bf16")

    def steps(self, samples: int) -> int:
        """Optimiser steps over `samples` samples: batches are never cut short, the last one may reach into another epoch."""
        return math.ceil(self.epochs * samples / self.batch)

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a step: a linear rise, then half a cosine down to 0 (Loshchilov and Hutter 2017, arXiv 1608.03983, equation 5)."""
        rise = round(self.warmup * steps)
        if step < rise:
            return self.learning_rate * (step + 1) / rise
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - rise) / (steps - rise)))

    def decay(self, step: int) -> float:
        """Share of the old average kept after a step: it grows with the step, else a short run would mostly average its beginning."""
        return min(self.ema, (1 + step) / (10 + step))

    def derived(self, purpose: str, number: int) -> int:
        """The seed for one purpose in one step (or epoch): the same on every machine."""
        return int.from_bytes(hashlib.sha256(f"{self.seed}/{purpose}/{number}".encode()).digest()[:8], "big") >> 1

    def generator(self, purpose: str, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.derived(purpose, number))

    @property
    def digest(self) -> str:
        """Changes with every field that changes the outcome: all but how often a checkpoint is written."""
        fields = {name: value for name, value in asdict(self).items() if name != "checkpoint_every_s"}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def fast_dtype(device: str = "cpu") -> Literal["fp32", "bf16"]:
    """The dtype in which a linear layer trains faster here, measured in turns, best of three each.

    bf16 wins only where it is at least a tenth faster, since it costs digits. Cost: about 0.1 s on a CPU.
    """
    layer, x = nn.Linear(384, 384, device=device), torch.randn(512, 384, device=device, requires_grad=True)

    def seconds(bf16: bool) -> float:
        start = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = layer(x).square().mean()
        torch.autograd.grad(loss, (x, layer.weight))[0].sum().item()  # .item() waits for the device
        return time.perf_counter() - start

    best = torch.tensor([[seconds(bf16=False), seconds(bf16=True)] for _ in range(4)])[1:].min(0).values
    return "bf16" if best[1] < 0.9 * best[0] else "fp32"
