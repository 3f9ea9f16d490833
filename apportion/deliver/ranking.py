"""Which back-end to run: measured on this device among those that answer alike, or what was measured here before."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from apportion.deliver.bundle import Bundle
from apportion.engine import COARSE, Backend, build, serving
from apportion.measure.doctor import Trial, fingerprint, rank_backends
from apportion.network import Network

Tell = Callable[[str], None]
Wanted = Backend | Literal["auto"]
"""A back-end, or whichever is fastest here on the full path and answers as the modules do."""
EXACT: tuple[Backend, ...] = tuple(name for name in get_args(Backend) if name not in COARSE)
"""Back-ends that answer as the modules do; of those that time does not tell apart, the first is taken."""


def silent(text: str) -> None:
    """Progress for nobody."""


@dataclass(frozen=True, slots=True)
class Ranking:
    """The back-end to take, and how each did on the full path: batch size -> trials, best first."""

    backend: Backend
    trials: Mapping[int, Sequence[Trial]]

    def plain(self) -> dict[str, Any]:
        """As JSON values; milliseconds are medians per input, None for what was not timed."""
        return {
            "backend": self.backend,
            "trials": [
                {
                    "batch": batch,
                    "backend": trial.backend,
                    "ms": None if trial.timing is None else trial.timing.median_ms / batch,
                    "distance": trial.distance if trial.distance is not None and math.isfinite(trial.distance) else None,
                    "build_seconds": trial.build_seconds,
                    "reason": trial.reason,
                }
                for batch, found in self.trials.items()
                for trial in found
            ],
        }


def rank(network: Network, inputs: Tensor, *, repeats: int = 20, tell: Tell) -> Ranking:
    """Every exact back-end on the full path, one input at a time and all of them at once: `rank_backends`, which says what it costs.

    Who is out in one is not tried in the next. The one taken has the smallest product of times over the fastest's; no lead within the noise counts.
    Raises EngineError where none is left.
    """
    whole, trials = network.at(network.space.full), dict[int, list[Trial]]()
    left: tuple[Backend, ...] = EXACT
    with serving():
        for batch in sorted({1, len(inputs)}):
            tell(f"timing {len(left)} back-ends at batch {batch}")
            some = inputs[:batch].contiguous()
            builders = {name: partial(build, whole, (some,), backend=name, name=f"the full path, batch {batch}") for name in left}
            trials[batch] = rank_backends(builders, whole, (some,), repeats=repeats)
            for trial in trials[batch]:
                tell(f"{trial.backend}, batch {batch}: {' '.join(trial.reason.split())}")
            left = tuple(name for name in left if any(trial.backend == name and not trial.out for trial in trials[batch]))
    behind = {name: [trial.slower for found in trials.values() for trial in found if trial.backend == name and trial.slower] for name in left}
    best = min(left, key=lambda name: math.prod(slower.value if slower.low > 1 else 1.0 for slower in behind[name]))
    tell(f"back-end: {best}")
    return Ranking(best, trials)


def best(bundle: Bundle, *, batch: int, tell: Tell) -> Backend:
    """What "auto" comes to for a bundle: what was found when it was measured on this very device, or else `rank` on made-up inputs, up to `batch` at once.

    Packages that came or went since are not looked at: one that is missing is an error when graphs are built; `apportion bench --backend auto` measures anew.
    """
    known = bundle.costs.get(fingerprint(), {}).get("backends")
    if known is None:
        return rank(bundle.network, made_up(bundle.network, batch), tell=tell).backend
    for trial in known["trials"]:
        tell(f"{trial['backend']}, batch {trial['batch']}: {' '.join(trial['reason'].split())}")
    tell(f"back-end: {known['backend']}, as measured with this bundle on this device")
    return known["backend"]


def made_up(network: Network, count: int) -> Tensor:
    """So many random inputs of this network's own size, where there is no data: noise, entries of categories, and words that are no padding."""
    a, generator = network.architecture, torch.Generator().manual_seed(0)
    if not a.words:
        noise = torch.randn(count, *a.input_shape, generator=generator)
        for column, entries in enumerate(a.categories, a.numbers):
            noise[:, column] = torch.randint(entries, (count,), generator=generator).float()
        return noise
    drawn = torch.randint(a.words - 1, (count, *a.input_shape), generator=generator)
    return drawn + (drawn >= a.padding)
