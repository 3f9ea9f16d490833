"""Weighing an adaptive model against the network that it came from: one run, the same inputs, the same dtype and compiler, in turn."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

from apportion.control import acceptable_chance, adaptive_gain, bounds, collapse, decide
from apportion.deliver.adapted import Adapted
from apportion.deliver.bundle import Bundle
from apportion.deliver.costs import Ledger, places
from apportion.deliver.page import card, page, shares_of
from apportion.deliver.ranking import Ranking
from apportion.engine import build, cut, never_slower, plain, serving
from apportion.errors import ControlError
from apportion.intake import Feed, Samples, Tokenise
from apportion.measure.doctor import device, fingerprint
from apportion.measure.judge import METRICS, judge
from apportion.measure.latency import Timing, interleaved, ratio, realisation_ratio
from apportion.measure.memory import memory, peak_bytes
from apportion.measure.quality import mcnemar, paired_drop
from apportion.measure.report import Report, render, report_dict
from apportion.network import Network
from apportion.vocab import Ladder, Outcomes

Tell = Callable[[str], None]
ROWS = 128  # at a time, where all samples are answered


@dataclass(frozen=True, slots=True)
class Weighed:
    """The model with its times in it, the page for people and the same figures for machines."""

    adapted: Adapted
    report: Report
    figures: Mapping[str, Any]

    def files(self) -> dict[str, str]:
        """Files of text for the bundle."""
        figures = json.dumps({"figures": self.figures, "report": report_dict(self.report)}, indent=1, allow_nan=False)
        return {"report.html": render(self.report), "report.json": figures + "\n", "README.md": card(self.adapted, self.report.title, self.figures)}


def typical(network: Network, samples: Samples, feed: Feed, count: int, chosen: Sequence[int] = ()) -> Tensor:
    """So many inputs; of texts, those padded to the length that most of them are padded to."""
    every, place = places(network, samples, feed, chosen)
    most = int(place.mode().values)
    return group(feed, samples, place == most, every[most], count)[1]


def weigh(
    adapted: Adapted, dense: Network, samples: Samples, seen: Outcomes, dense_quality: Tensor, *, ranking: Ranking | None = None, repeats: int, tell: Tell
) -> Weighed:
    """Accuracy on `samples`, of which `seen` is the table; times at batch 1 and at the engine's largest bucket; peak of activations.

    `dense` is the network that was read, compiled whole with the same back-end; `dense_quality` (n,) says how good its answers are. Texts are timed in batches
    of one length, the dense network padded to the same; times are means over the lengths of these texts, the peak is that of the longest.
    `ranking`: why it is this back-end, for the record.
    """
    bundle = adapted.bundle
    tell(f"compiling {adapted.engine.wanted} graphs")
    adapted.warm(tell)
    batches = (1, max(adapted.buckets))
    every, place = places(bundle.network, samples, bundle.preprocess, bundle.lengths)
    here = [number for number in range(len(every)) if bool((place == number).any())]
    groups = [group(bundle.preprocess, samples, place == number, every[number], 4 * batches[1]) for number in here]
    choice = decide(bundle.controller, seen, bundle.budget)
    times = {batch: mixed([(share, timed(adapted, dense, sample, batch, repeats=repeats, tell=tell)) for share, sample in groups]) for batch in batches}
    rungs_ms = {str(batch): [found[f"rung {k}"].median_ms for k in range(len(bundle.rungs))] for batch, found in times.items()}
    full, sample = dense.space.full, groups[-1][1]
    followed = adapted.built("eager", make=plain)
    followed.warm()
    modules, batch = (bundle.network, bundle.controller), sample[: batches[1]]
    held = memory(modules, [adapted.engine.weight_bytes], lambda: followed(batch, budget=bundle.budget), batch=len(batch))
    peaks = {"dense": peak_bytes(lambda: _quiet(dense.at(full), batch)), "adaptive": held.activation_bytes}
    ratios = {batch: ratio(found["adaptive"], found["dense"]) for batch, found in times.items()}
    figures = judged(bundle, seen, choice, dense_quality, place=place)
    saved = figures["gmacs_dense"] > figures["gmacs_adaptive"]
    figures |= {
        "served": kept(adapted, samples, choice),
        "time_ratio": {str(batch): found._asdict() for batch, found in ratios.items()},
        "realisation": {
            str(batch): realisation_ratio(1.0, found.value, figures["gmacs_dense"], figures["gmacs_adaptive"]) if saved else None
            for batch, found in ratios.items()
        },
        "peak_bytes": peaks,
        "memory": {**asdict(held), "how": dict(held.how)},
        "backends": None if ranking is None else ranking.plain(),
        "graphs": adapted.engine.wanted,
        "slower_than_dense": _slower(adapted, times),
    }
    table = {
        "device": device(),
        "dtype": "float32",
        "backend": adapted.backend,
        "threads": torch.get_num_threads(),
        "rungs_ms": rungs_ms,
        "dense_ms": {str(batch): found["dense"].median_ms for batch, found in times.items()},
        "adaptive_ms": {str(batch): found["adaptive"].median_ms for batch, found in times.items()},
        "quartiles_ms": {str(batch): {name: [timing.low_ms, timing.high_ms] for name, timing in found.items()} for batch, found in times.items()},
    }
    chosen = {} if ranking is None else {"backends": ranking.plain()}
    table |= chosen  # beside the times, so that `load` need not measure it again here
    recorded = replace(bundle, costs={**bundle.costs, fingerprint(): table}, provenance={**bundle.provenance, **chosen})
    adapted.engine.forget()  # what was measured here is no traffic
    measured = Adapted(recorded, backend=adapted.backend, buckets=adapted.buckets, engine=adapted.engine)
    report = page(measured, samples, seen, choice, dense_quality, times, peaks, figures)
    return Weighed(measured, report, figures)


def kept(adapted: Adapted, samples: Samples, choice: Tensor) -> dict[str, float | None]:
    """What the engine itself does with these samples at the operating point: the share on the path that the table says, and accuracy where there are labels."""
    a = adapted.bundle.network.architecture
    answers = [(adapted.engine(inputs, budget=adapted.bundle.budget), labels) for inputs, labels in samples.batches(ROWS, adapted.bundle.preprocess)]
    path = torch.cat([answer.path.cpu() for answer, _ in answers])
    good = [judge(answer.logits.cpu()[:, None], labels, task=a.task, span=a.span).quality for answer, labels in answers if labels is not None]
    return {"same_path": (path == choice).double().mean().item(), "accuracy": torch.cat(good).double().mean().item() if good else None}


def group(feed: Feed, samples: Samples, mine: Tensor, length: int, count: int) -> tuple[float, Tensor]:
    """The share of the samples that are `mine` (n,) bool, and `count` inputs of them at this length; few are repeated: every batch has to be full."""
    rows = mine.nonzero()[:, 0]
    inputs = [inputs for inputs, _ in samples.rows(rows[torch.arange(count) % len(rows)]).batches(count, feed)]
    return len(rows) / len(mine), torch.cat([cut(part, length, feed.padding) if isinstance(feed, Tokenise) else part for part in inputs])


def mixed(found: Sequence[tuple[float, Mapping[str, Timing]]]) -> dict[str, Timing]:
    """Times of the average sample, round by round, from those of each group and its share."""
    if len(found) == 1:
        return dict(found[0][1])

    def rounds(name: str) -> list[float]:
        return [sum(parts) for parts in zip(*([share * ms for ms in times[name].rounds_ms] for share, times in found), strict=True)]

    return {name: Timing.of(rounds(name)) for name in found[0][1]}


def judged(bundle: Bundle, seen: Outcomes, choice: Tensor, dense_quality: Tensor, *, place: Tensor | None = None) -> dict[str, Any]:
    """Accuracy and multiply-adds of these choices against the dense network's answers to the same inputs; no times. `place` (n,): of each text's length."""
    ours = seen.quality.gather(1, choice[:, None])[:, 0]
    exact = all(bool(((of == 0) | (of == 1)).all()) for of in (dense_quality, ours))  # answers are right or wrong
    pair = (dense_quality.bool().numpy(), ours.bool().numpy()) if exact else (dense_quality.double().numpy(), ours.double().numpy())
    ledger, place = Ledger.of(bundle), torch.zeros_like(choice) if place is None else place
    gmacs, full = ledger.rungs[place, choice].mean().item(), ledger.dense[place].mean().item()
    return {
        "samples": len(ours),
        "metric": METRICS[bundle.network.architecture.task],
        "accuracy_dense": float(dense_quality.double().mean()),
        "accuracy_full": float(seen.quality[:, -1].double().mean()),
        "accuracy_adaptive": float(ours.double().mean()),
        "drop_points": paired_drop(*pair)._asdict(),
        "gmacs_dense": full,
        "gmacs_adaptive": gmacs,
        "gmacs_saved_share": 1 - gmacs / full,
        "adaptive_gain_points": dict(zip(("value", "low", "high"), adaptive_gain(seen, choice), strict=True)),
        "share": shares_of(choice, len(bundle.rungs)),
        "collapse": collapse(choice, rungs=len(bundle.rungs))._asdict(),
        "bounds": standing(bundle, seen, choice),
        "certificate": None if bundle.certificate is None else asdict(bundle.certificate),
        "mcnemar_p": mcnemar(*pair) if exact else None,
    }


def standing(bundle: Bundle, seen: Outcomes, choice: Tensor) -> dict[str, Any]:
    """The controller between its bounds, on these inputs; `hull` is None where no mix of paths is as accurate."""
    found = bounds(seen, acceptable_chance(bundle.controller.chance(seen)), choice)
    plain = {**found._asdict(), "fano": found.fano._asdict()}
    return {name: None if value == math.inf else value for name, value in plain.items()}


def timed(adapted: Adapted, dense: Network, sample: Tensor, batch: int, *, repeats: int, tell: Tell) -> dict[str, Timing]:
    """Milliseconds per input: the dense network compiled whole, the adaptive model at its operating point, and every rung, in turn on the same inputs."""
    size = f"batch {batch}" if sample.is_floating_point() else f"batch {batch}, {sample.shape[-1]} tokens"
    tell(f"timing at {size}")
    graph = build(dense.at(dense.space.full), (sample[:batch].contiguous(),), backend=adapted.backend, name=f"dense, {size}")
    pieces = [piece.contiguous() for piece in sample.split(batch) if len(piece) == batch]
    at_once = max(1, min(len(pieces), 16 // batch))  # single inputs are timed by the dozen: the clock and the choice of paths both even out
    engine, budget = adapted.engine, adapted.bundle.budget

    def over(call: Callable[[Tensor], Any]) -> Callable[[], None]:
        turn = cycle(range(len(pieces)))

        def run() -> None:
            with serving():
                for _ in range(at_once):
                    call(pieces[next(turn)])

        return run

    calls = {"dense": over(graph), "adaptive": over(lambda x: engine(x, budget=budget))}
    calls |= {f"rung {k}": over(lambda x, k=k: engine.forced(x, k)) for k in range(len(adapted.bundle.rungs))}
    each = at_once * batch
    found = interleaved(calls, repeats=repeats)
    return {name: Timing.of([ms / each for ms in timing.rounds_ms]) for name, timing in found.items()}


def _slower(adapted: Adapted, times: Mapping[int, Mapping[str, Timing]]) -> list[str]:
    """Cheaper paths that take longer than the dense network at some batch size: work saved that is not time saved."""
    paths = adapted.bundle.ladder.paths[:-1]
    return [f"{path.name}, batch {b}" for k, path in enumerate(paths) for b, t in times.items() if t[f"rung {k}"].median_ms > t["dense"].median_ms]


def _quiet(module: nn.Module, inputs: Tensor) -> Any:
    with serving():
        return module(inputs)


def fast_enough(weighed: Weighed, *, tell: Tell) -> Ladder | None:
    """The paths that are faster than the dense model at every batch size timed; None where all are. Raises ControlError where only the full one is left."""
    bundle = weighed.adapted.bundle
    table = bundle.costs[fingerprint()]
    gate = never_slower({int(batch): row for batch, row in table["rungs_ms"].items()}, {int(batch): ms for batch, ms in table["dense_ms"].items()})
    for dropped in gate.dropped:
        tell(f"not served, since not faster: {bundle.ladder.paths[dropped.rung].name}, {dropped.reason}")
    if not gate.adapts:
        raise ControlError(
            "no path that is faster than the dense model here: " + "; ".join(dropped.reason for dropped in gate.dropped),
            wanted="one at most 0.98 times its time at every batch size",
            do="Serve the dense model on this device, name larger batches alone, or set never_slower = false in the plan.",
        )
    return Ladder(tuple(bundle.ladder.paths[rung] for rung in gate.served), bundle.ladder.glance) if gate.dropped else None


def check_time(weighed: Weighed) -> None:
    """Raises ControlError where the whole, with the decision and all that goes to the full path, takes longer than the dense model."""
    slow = {batch: found["value"] for batch, found in weighed.figures["time_ratio"].items() if found["value"] > 1}
    if slow:
        raise ControlError(
            "an operating point that takes " + ", ".join(f"{value:.3f} of the dense model's time at batch {batch}" for batch, value in slow.items()),
            wanted="less, the decision included",
            do="Raise the tolerance, teach the paths, choose another back-end or larger batches, or set never_slower = false in the plan.",
        )
