"""The one training loop: what is taught is an argument, and a run that was killed at any point goes on as if it had not been."""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path as File
from typing import Any, Generic, TypeVar, final

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from apportion.errors import TrainError
from apportion.methods import find
from apportion.train import checkpoint
from apportion.train.augment import augment
from apportion.train.data import Data, Order
from apportion.train.progress import Reporter
from apportion.train.recipe import Recipe

N = TypeVar("N", bound=nn.Module)
Objective = Callable[[N, Tensor, Tensor | None, random.Random], Tensor]
"""(network, inputs, labels, the step's own random numbers) -> loss, a scalar."""


@dataclass(frozen=True, slots=True)
class Mark:
    """What is noted at the end of an epoch, and of the run."""

    epoch: float
    step: int
    loss: float  # mean since the mark before
    learning_rate: float
    score: float | None  # of the averaged weights


@dataclass(frozen=True, slots=True)
class Fitted:
    """What a run came to. The network itself already holds `ema_state`."""

    steps: int
    images: int
    seconds: float  # all its parts, where it was cut off and went on
    history: tuple[Mark, ...]
    ema_state: dict[str, Tensor]


def fit(
    network: N,
    data: Data,
    objective: Objective[N],
    *,
    recipe: Recipe,
    folder: File | None = None,
    validate: Callable[[N], float] | None = None,
    progress: bool = True,
    identity: str = "",
) -> Fitted:
    """Train `network` in place; afterwards it is in eval mode, on the device used, and holds the running average of its weights, not the last ones.

    The average (Polyak and Juditsky 1992; as in Szegedy et al. 2016, arXiv 1512.00567, section 8) covers the parameters that take a gradient. `validate`
    is called with the averaged weights in place, in eval mode, at the end of each epoch. With a `folder` the same call goes on where the last one stopped;
    on a CPU the result is bit-identical to that of a run that never stopped. `identity` says in words what the recipe does not (paths, data):
    a checkpoint that was written under another one is refused. Not for networks whose forward pass writes (batch norm): only what takes a gradient is kept.

    Raises TrainError: a loss or gradient that is not finite (the network then holds the last good weights, which are also in the folder), a checkpoint of
    another run, an altered one, nothing to train, more than one process. KeyboardInterrupt writes a checkpoint first. An objective that raises changes
    nothing on disk. Memory: the weights five times over beside the activations.
    """
    accelerator = Accelerator(mixed_precision="no")  # autocast is entered by the step, so that one process can train in one dtype after another
    if accelerator.num_processes > 1:
        raise TrainError(f"{accelerator.num_processes} processes", wanted="one", do="Start it without a launcher.")
    run = _Run(accelerator, accelerator.prepare(network), data, recipe=recipe, folder=folder, identity=identity)
    run.resume()
    with run.saved_when_interrupted(), Reporter(steps=run.steps, first=run.step, batch=recipe.batch, wanted=progress) as reporter:
        while True:
            if run.mark_due:
                run.mark(validate)
            if run.step == run.steps:
                break
            loss = run.advance(objective)
            reporter.tell(run.step, loss)
            run.save_when_due()
    run.finish()
    return Fitted(run.step, run.step * recipe.batch, run.seconds, tuple(run.history), {name: value.clone() for name, value in run.averages.items()})


@final
class _Run(Generic[N]):
    """Everything that changes while a network is trained, and what it takes to write it down and read it back."""

    def __init__(self, accelerator: Accelerator, network: N, data: Data, *, recipe: Recipe, folder: File | None, identity: str) -> None:
        self.accelerator, self.network, self.data, self.recipe, self.folder = accelerator, network, data, recipe, folder
        self.weights = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
        if not self.weights or not len(data):
            raise TrainError(f"{len(self.weights)} trainable tensors and {len(data)} samples", wanted="some of both", do="Check what was given.")
        self.averages = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.optimiser: torch.optim.Optimizer = find("optimiser", recipe.optimiser)(
            self.weights.items(), learning_rate=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        self.order, self.steps = Order(recipe, len(data), data.sizes), recipe.steps(len(data))
        shapes = [(name, list(weight.shape), str(weight.dtype)) for name, weight in self.weights.items()]
        self.digest = hashlib.sha256(json.dumps([recipe.digest, len(data), identity, shapes]).encode()).hexdigest()
        self.step, self.history = 0, list[Mark]()
        self.loss_sum, self.loss_count = 0.0, 0
        self.seconds_before, self.started, self.saved_at = 0.0, time.monotonic(), time.monotonic()
        self.whole = True  # False while weights, averages and optimiser do not belong to one step

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    def advance(self, objective: Objective[N]) -> float:
        """One step. Whatever raises before the weights are touched leaves the run as it was."""
        recipe, step, device = self.recipe, self.step, self.accelerator.device
        self.network.train()
        inputs, labels = self.data.batch(self.order(step))
        inputs, labels = augment(inputs.to(device), None if labels is None else labels.to(device), recipe, step)
        self.optimiser.zero_grad()
        # Dropout and the like draw from the global generator: within a step it belongs to the step, afterwards it is the caller's again.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(recipe.derived("network", step))
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.dtype == "bf16"):
                loss = objective(self.network, inputs, labels, random.Random(recipe.derived("paths", step)))
            self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(self.weights.values(), recipe.clip)
        value, size = torch.stack((loss.detach().float(), torch.as_tensor(norm, device=device).float())).tolist()
        if not (math.isfinite(value) and math.isfinite(size)):
            self._stop(value, size)
        self._update()
        self.step, self.loss_sum, self.loss_count = step + 1, self.loss_sum + value, self.loss_count + 1
        self.whole = True
        return value

    @torch.no_grad()
    def _update(self) -> None:
        self.whole = False
        for group in self.optimiser.param_groups:
            group["lr"] = self.recipe.rate(self.step, self.steps)
        self.optimiser.step()
        decay = self.recipe.decay(self.step)
        for average, weight in zip(self.averages.values(), self.weights.values(), strict=True):
            average.lerp_(weight, 1 - decay)

    def _stop(self, loss: float, norm: float) -> None:
        self.optimiser.zero_grad()
        file = self.save()
        kept = "in the network" if file is None else f"in the network and in {file}"
        raise TrainError(
            f"loss {loss}, gradient norm {norm} in step {self.step}",
            wanted="finite numbers",
            do=f"The weights from before that step are {kept}. Lower the learning rate, or look at the samples of that step.",
        )

    @property
    def mark_due(self) -> bool:
        """At the end of an epoch and of the run, until it has been made: a run cut off while validating makes it first thing."""
        n, batch = len(self.data), self.recipe.batch
        return self.loss_count > 0 and (self.step == self.steps or self.step * batch // n > (self.step - 1) * batch // n)

    def mark(self, validate: Callable[[N], float] | None) -> None:
        score = None
        if validate is not None:
            with self._averaged():
                score = float(validate(self.network))
            if not math.isfinite(score):
                raise TrainError(f"score {score} after step {self.step}", wanted="a finite number", do="Correct `validate`.")
        epoch, loss = self.step * self.recipe.batch / len(self.data), self.loss_sum / self.loss_count
        self.history.append(Mark(epoch, self.step, loss, self.recipe.rate(self.step - 1, self.steps), score))
        self.loss_sum, self.loss_count = 0.0, 0

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averages in the place of the weights, and back again."""
        kept = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.whole = False
        try:
            self._put(self.averages)
            self.network.eval()
            yield
        finally:
            self._put(kept)
            self.whole = True

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, weight in self.weights.items():
            weight.copy_(values[name])

    def finish(self) -> None:
        self.save()
        self._put(self.averages)
        self.optimiser.zero_grad()
        self.network.eval()

    def save(self) -> File | None:
        """Write everything down; None where there is no folder."""
        self.saved_at = time.monotonic()
        if self.folder is None:
            return None
        meta = {"history": [asdict(mark) for mark in self.history], "loss_sum": self.loss_sum, "loss_count": self.loss_count, "seconds": self.seconds}
        return checkpoint.save(self.folder, self.step, self._tensors(), meta, digest=self.digest)

    def save_when_due(self) -> None:
        if time.monotonic() - self.saved_at >= self.recipe.checkpoint_every_s:
            self.save()

    @contextmanager
    def saved_when_interrupted(self) -> Iterator[None]:
        try:
            yield
        except KeyboardInterrupt:
            if self.folder is None:
                raise
            if self.whole:  # else the file that is there is the better one
                self.save()
            raise KeyboardInterrupt(f"stopped after step {self.step} of {self.steps}; the same call goes on from {self.folder}") from None

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"{kind}/{name}": tensor for kind, group in (("weight", self.weights), ("average", self.averages)) for name, tensor in group.items()}
        for name, weight in self.weights.items():
            tensors |= {f"optimiser/{name}/{key}": value for key, value in self.optimiser.state[weight].items()} if weight in self.optimiser.state else {}
        return tensors

    @torch.no_grad()
    def resume(self) -> None:
        """Go on from the folder's checkpoint, where there is one. Raises TrainError where another run wrote it."""
        found = None if self.folder is None else checkpoint.load(self.folder)
        if found is None:
            return
        if found.digest != self.digest:
            raise TrainError(
                f"a checkpoint of another run in {self.folder} (digest {found.digest[:8]})",
                wanted=f"one of this recipe, network, data and identity ({self.digest[:8]})",
                do="Give the same ones again, another folder, or empty this one.",
            )
        state: dict[str, dict[str, Tensor]] = {name: {} for name in self.weights}
        for label, tensor in found.tensors.items():
            kind, name = label.split("/", 1)
            if kind == "optimiser":
                name, key = name.rsplit("/", 1)
                state[name][key] = tensor
            else:
                {"weight": self.weights, "average": self.averages}[kind][name].copy_(tensor)
        self._load_optimiser(state)
        self._load_meta(found.step, found.meta)

    def _load_optimiser(self, state: dict[str, dict[str, Tensor]]) -> None:
        names = {id(weight): name for name, weight in self.weights.items()}  # torch numbers parameters in the order of the groups
        ordered = [names[id(parameter)] for group in self.optimiser.param_groups for parameter in group["params"]]
        numbered = {number: state[name] for number, name in enumerate(ordered) if state[name]}
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": numbered})

    def _load_meta(self, step: int, meta: dict[str, Any]) -> None:
        self.step, self.history = step, [Mark(**mark) for mark in meta["history"]]
        self.loss_sum, self.loss_count, self.seconds_before = meta["loss_sum"], meta["loss_count"], meta["seconds"]
