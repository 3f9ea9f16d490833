"""Weighing an adaptive model against the network that it came from: one run, the same inputs, the same dtype and compiler, in turn."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import cycle
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from apportion.control import acceptable_chance, adaptive_gain, bounds, collapse, decide
from apportion.control.rules import confidence_cascade, oracle, random_at, static_hull
from apportion.deliver.adapted import Adapted
from apportion.deliver.bundle import Bundle
from apportion.engine import build, serving
from apportion.intake import ImageSet
from apportion.measure.doctor import device, fingerprint
from apportion.measure.latency import Timing, interleaved, ratio, realisation_ratio
from apportion.measure.memory import peak_bytes
from apportion.measure.pictures import Point, merge_map
from apportion.measure.quality import mcnemar, paired_drop, wilson
from apportion.measure.report import Decision, PathRow, Picture, Report, Summary, render, report_dict
from apportion.network import Network
from apportion.vocab import Outcomes

Tell = Callable[[str], None]
BINS = 10
SHOWN = 6  # pictures in each group


@dataclass(frozen=True, slots=True)
class Weighed:
    """The model with its times in it, the page for people and the same figures for machines."""

    adapted: Adapted
    report: Report
    figures: Mapping[str, Any]

    def files(self) -> dict[str, str]:
        """Files of text for the bundle."""
        figures = json.dumps({"figures": self.figures, "report": report_dict(self.report)}, indent=1, allow_nan=False)
        return {"report.html": render(self.report), "report.json": figures + "\n", "README.md": card(self)}


def weigh(adapted: Adapted, dense: Network, images: ImageSet, seen: Outcomes, dense_correct: Tensor, *, repeats: int, tell: Tell) -> Weighed:
    """Accuracy on `images`, of which `seen` is the table; times at batch 1 and at the engine's largest bucket; peak of activations.

    `dense` is the network that was read, compiled whole with the same back-end; `dense_correct` (n,) says where it is right.
    """
    bundle = adapted.bundle
    tell(f"compiling {adapted.engine.wanted} graphs")
    adapted.warm(tell)
    batches = (1, max(adapted.buckets))
    rows = torch.arange(4 * batches[1]) % len(images)  # few images are repeated: every batch has to be full
    sample = torch.cat([inputs for inputs, _ in images.rows(rows).batches(batches[1], bundle.preprocess)])
    choice = decide(bundle.controller, seen, bundle.budget)
    times = {batch: timed(adapted, dense, sample, batch, repeats=repeats, tell=tell) for batch in batches}
    rungs_ms = {str(batch): [found[f"rung {k}"].median_ms for k in range(len(bundle.rungs))] for batch, found in times.items()}
    full = dense.space.full
    peaks = {
        "dense": peak_bytes(lambda: _quiet(dense.at(full), sample[: batches[1]])),
        "adaptive": peak_bytes(lambda: _routed(adapted, sample[: batches[1]])),
    }
    ratios = {batch: ratio(found["adaptive"], found["dense"]) for batch, found in times.items()}
    figures = judged(bundle, seen, choice, dense_correct)
    saved = bundle.dense_gmacs > figures["gmacs_adaptive"]
    figures |= {
        "time_ratio": {str(batch): found._asdict() for batch, found in ratios.items()},
        "realisation": {
            str(batch): realisation_ratio(1.0, found.value, bundle.dense_gmacs, figures["gmacs_adaptive"]) if saved else None for batch, found in ratios.items()
        },
        "peak_bytes": peaks,
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
    measured = Adapted(replace(bundle, costs={**bundle.costs, fingerprint(): table}), backend=adapted.backend, buckets=adapted.buckets, engine=adapted.engine)
    report = page(measured, images, seen, choice, dense_correct, times, peaks, figures)
    return Weighed(measured, report, figures)


def judged(bundle: Bundle, seen: Outcomes, choice: Tensor, dense_correct: Tensor) -> dict[str, Any]:
    """Accuracy and multiply-adds of these choices against the dense network's answers to the same inputs; no times."""
    correct = seen.correct.gather(1, choice[:, None])[:, 0]
    gmacs = float(np.mean([bundle.rungs[k].gmacs for k in choice.tolist()]))
    return {
        "samples": len(correct),
        "accuracy_dense": float(dense_correct.double().mean()),
        "accuracy_full": float(seen.correct[:, -1].double().mean()),
        "accuracy_adaptive": float(correct.double().mean()),
        "drop_points": paired_drop(dense_correct.numpy(), correct.numpy())._asdict(),
        "gmacs_dense": bundle.dense_gmacs,
        "gmacs_adaptive": gmacs,
        "gmacs_saved_share": 1 - gmacs / bundle.dense_gmacs,
        "adaptive_gain_points": dict(zip(("value", "low", "high"), adaptive_gain(seen, choice), strict=True)),
        "share": _share(choice, len(bundle.rungs)),
        "collapse": collapse(choice, rungs=len(bundle.rungs))._asdict(),
        "bounds": standing(bundle, seen, choice),
        "certificate": None if bundle.certificate is None else asdict(bundle.certificate),
        "mcnemar_p": mcnemar(dense_correct.numpy(), correct.numpy()),
    }


def standing(bundle: Bundle, seen: Outcomes, choice: Tensor) -> dict[str, Any]:
    """The controller between its bounds, on these inputs; `hull` is None where no mix of paths is as accurate."""
    found = bounds(seen, acceptable_chance(bundle.controller.complexity(seen.signal)), choice)
    plain = {**found._asdict(), "fano": found.fano._asdict()}
    return {name: None if value == math.inf else value for name, value in plain.items()}


def timed(adapted: Adapted, dense: Network, sample: Tensor, batch: int, *, repeats: int, tell: Tell) -> dict[str, Timing]:
    """Milliseconds per input: the dense network compiled whole, the adaptive model at its operating point, and every rung, in turn on the same inputs."""
    tell(f"timing at batch {batch}")
    graph = build(dense.at(dense.space.full), (sample[:batch].contiguous(),), backend=adapted.backend, name=f"dense, batch {batch}")
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


def page(
    adapted: Adapted,
    images: ImageSet,
    seen: Outcomes,
    choice: Tensor,
    dense_correct: Tensor,
    times: Mapping[int, Mapping[str, Timing]],
    peaks: Mapping[str, int],
    figures: Mapping[str, Any],
) -> Report:
    """The report: every point in both costs, what goes where, and what that looks like."""
    bundle, last = adapted.bundle, max(times)
    full, n = bundle.rungs[-1].gmacs, len(choice)
    rung_ms = [times[last][f"rung {k}"].median_ms for k in range(len(bundle.rungs))]

    def ms(share: list[float]) -> float:
        return float(np.dot(share, rung_ms))

    def at(cost: float) -> float:
        """Milliseconds of a mix of paths at this mean cost, between the two neighbours."""
        return float(np.interp(cost, [rung.gmacs / full for rung in bundle.rungs], rung_ms))

    dense_n = int(dense_correct.sum())
    points = [Point("dense", 100 * dense_n / n, bundle.dense_gmacs, times[last]["dense"].median_ms, "dense", _interval(dense_n, n))]
    points += [Point("static", 100 * rung.accuracy, rung.gmacs, ms, f"rung {k}") for k, (rung, ms) in enumerate(zip(bundle.rungs, rung_ms, strict=True))]
    hull = static_hull(seen)
    points += [Point("hull", 100 * a, c * full, at(c)) for c, a in zip(hull.cost.tolist(), hull.accuracy.tolist(), strict=True)]
    for number, place in enumerate(bundle.frontier):
        word = "" if number % 4 else f"{place['budget']:.2f}x"  # a word at every point would cover the line
        points.append(Point("ours", 100 * place["accuracy"], place["cost"] * full, ms(place["share"]), word))
        random = random_at(seen, max(place["cost"], float(seen.cost[0])))
        points.append(Point("random", 100 * random.accuracy, random.cost * full, at(random.cost)))
    for threshold in (0.2, 0.4, 0.6, 0.8, 0.9, 0.97):
        reuse = torch.full_like(seen.cost, float(seen.cost[0]) if len(bundle.ladder.paths[0].steps) == bundle.ladder.glance else 0.0)
        found = confidence_cascade(seen, torch.full((len(bundle.rungs) - 1,), threshold), reuse)
        points.append(Point("cascade", 100 * found.accuracy, found.cost * full, at(min(found.cost, 1.0))))
    best = oracle(seen)
    points.append(Point("oracle", 100 * best.accuracy, best.cost * full, at(best.cost)))

    def whole(name: str, correct: int, gmacs: float) -> Summary:
        spent = {batch: found[name].median_ms for batch, found in times.items()}
        return Summary(name, 100 * correct / n, _interval(correct, n), gmacs, spent, peaks[name])

    summary = (whole("dense", dense_n, bundle.dense_gmacs), whole("adaptive", round(figures["accuracy_adaptive"] * n), figures["gmacs_adaptive"]))
    dense_ms = times[last]["dense"].median_ms
    rows = tuple(
        PathRow(
            path.name,
            rung.gmacs,
            {batch: found[f"rung {k}"].median_ms for batch, found in times.items()},
            100 * rung.accuracy,
            figures["share"][k],
            realisation_ratio(dense_ms, rung_ms[k], bundle.dense_gmacs, rung.gmacs) if rung.gmacs < bundle.dense_gmacs else None,
        )
        for k, (path, rung) in enumerate(zip(bundle.ladder.paths, bundle.rungs, strict=True))
    )
    shares = {f"{place['budget']:.2f}x": tuple(place["share"]) for place in bundle.frontier[::3]}
    drop, gain, certificate = figures["drop_points"], figures["adaptive_gain_points"], bundle.certificate
    against = "the labels" if images.labels is not None else "the dense model's answers"
    notes = (
        f"Accuracy is against {against} on {n} inputs that nothing was fitted on. "
        f"The drop is {drop['points']:.2f} points, 95 % interval {drop['low']:.2f} to {drop['high']:.2f}, paired.",
        f"Above the best static mix at the same mean cost by {gain['value']:.2f} points (95 % interval {gain['low']:.2f} to {gain['high']:.2f}).",
        "GMACs include the glance, its extra head and the controller. Milliseconds are medians per input, in turn with the dense model compiled alike.",
        "Peak is of activations, weights apart. The glance runs on the whole batch at full width: at the same batch, the peak falls only with what follows.",
    )
    if certificate is not None:
        notes += (
            f"Certified: at most {certificate.tolerance_points:g} points are lost against the dense model, with confidence {certificate.confidence:g}, on"
            f" inputs like the {certificate.rows} that were kept for this alone (drop there {certificate.drop_points:.2f} points).",
        )
    else:
        notes += ("The tolerance held on the images that placed the operating point; it was not certified: ask with a confidence.",)
    if figures["slower_than_dense"]:
        notes += (f"Slower than dense here although cheaper: {'; '.join(figures['slower_than_dense'])}.",)
    conditions = {**{key: value for key, value in device().items() if isinstance(value, str | int | float)}, "dtype": "float32", "back-end": adapted.backend}
    return Report(
        title=f"Adaptive {bundle.provenance.get('source', {}).get('source', 'network')}",
        summary=summary,
        paths=rows,
        points=tuple(points),
        shares={f"operating point ({bundle.budget:.2f}x)": tuple(figures["share"]), **shares},
        decision=decision(bundle, seen, figures["bounds"]),
        pictures=tuple(pictures(adapted, images, seen, choice)),
        notes=notes,
        conditions=conditions,
    )


def decision(bundle: Bundle, seen: Outcomes, found: Mapping[str, Any]) -> Decision:
    """What the controller believed of these inputs, and what came of it."""
    said = bundle.controller.complexity(seen.signal)
    bins = (said * BINS).long().clamp(0, BINS - 1).flatten()
    kept = [(bins == number).nonzero()[:, 0] for number in range(BINS)]
    choice = decide(bundle.controller, seen, bundle.budget)
    tenths = said[:, 0].argsort(descending=True).tensor_split(BINS)
    costs = {"oracle": found["oracle"], "information bound (estimate)": found["information"], "this model": found["cost"], "hull, as accurate": found["hull"]}
    return Decision(
        tuple((float(said.flatten()[rows].mean()), float(seen.correct.flatten()[rows].double().mean()), len(rows)) for rows in kept if len(rows)),
        tuple(tuple(_share(choice[rows], len(bundle.rungs))) for rows in tenths if len(rows)),
        {name: cost for name, cost in costs.items() if cost is not None},
    )


def pictures(adapted: Adapted, images: ImageSet, seen: Outcomes, choice: Tensor) -> list[Picture]:
    """The inputs decided to be easiest and hardest, and where the path that merges most joined tokens on the image."""
    bundle, shown = adapted.bundle, []
    margin = seen.margin[:, -1]
    easy = torch.argsort(choice.double() - margin.double())
    groups: tuple[tuple[Literal["easiest", "hardest"], Tensor], ...] = (("easiest", easy[:SHOWN]), ("hardest", easy.flip(0)[:SHOWN]))
    for group, order in groups:
        for row in order.tolist():
            rung = int(choice[row])
            right = "right" if bool(seen.correct[row, rung]) else "wrong"
            name = "" if images.labels is None or not images.classes else f"{images.classes[int(images.labels[row])]}, "
            shown.append(Picture(pixels(bundle.preprocess, images, row), f"{name}rung {rung} of {len(bundle.rungs) - 1}, {right}", group))
    merging = [path for path in bundle.ladder.paths if path.tokens and path.tokens[-1] < bundle.network.architecture.tokens]
    if merging:
        path = min(merging, key=lambda path: path.tokens[-1])
        side = bundle.network.architecture.image_size // bundle.network.architecture.patch
        for row in torch.linspace(0, len(choice) - 1, SHOWN).long().tolist():
            inputs = next(images.rows([row]).batches(1, bundle.preprocess))[0]
            notes: dict[str, list[Tensor]] = {}
            with serving():
                bundle.network(inputs, path, notes)
            origin = notes["origin"][-1][0].numpy()
            picture = merge_map(pixels(bundle.preprocess, images, row), origin, (side, side), bundle.network.architecture.prefix)
            shown.append(Picture(picture, f"{path.tokens[-1]} of {bundle.network.architecture.tokens} tokens left", "merged"))
    return shown


def pixels(preprocess: Any, images: ImageSet, row: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """What the network sees of one image, as bytes again."""
    inputs = next(images.rows([row]).batches(1, preprocess))[0][0]
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (preprocess.mean, preprocess.std))
    return ((inputs * std + mean) * 255).round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy()


def card(weighed: Weighed) -> str:
    """The model card: what it is, how good, how fast, where it was measured, how to load it."""
    bundle, figures = weighed.adapted.bundle, weighed.figures
    facts = device()
    rows = [
        f"| {path.name} | {rung.gmacs:.4f} | {100 * rung.accuracy:.2f} | {100 * share:.1f} |"
        for path, rung, share in zip(bundle.ladder.paths, bundle.rungs, figures["share"], strict=True)
    ]
    drop, right, before = figures["drop_points"], 100 * figures["accuracy_adaptive"], 100 * figures["accuracy_dense"]
    return "\n".join(
        [
            f"# {weighed.report.title}",
            "",
            "```python",
            "import apportion",
            'model = apportion.load("this folder")',
            'answer = model(images)  # .logits, .path, .cost; model(images, budget="0.5x") for another budget',
            "```",
            "",
            f"Accuracy {right:.2f} % against {before:.2f} % of the dense network on {figures['samples']} inputs"
            f" (drop {drop['points']:.2f} points, 95 % interval {drop['low']:.2f} to {drop['high']:.2f}),"
            f" at {figures['gmacs_adaptive']:.4f} GMACs per input against {bundle.dense_gmacs:.4f}, the decision included.",
            f"Measured on {facts['cpu']}, {facts['cores']} cores, torch {facts['torch']}, float32, back-end {weighed.adapted.backend}.",
            "",
            "| path | GMACs | accuracy, % | share of inputs, % |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )


def _slower(adapted: Adapted, times: Mapping[int, Mapping[str, Timing]]) -> list[str]:
    """Cheaper paths that take longer than the dense network at some batch size: work saved that is not time saved."""
    paths = adapted.bundle.ladder.paths[:-1]
    return [f"{path.name}, batch {b}" for k, path in enumerate(paths) for b, t in times.items() if t[f"rung {k}"].median_ms > t["dense"].median_ms]


def _share(choice: Tensor, rungs: int) -> list[float]:
    return (torch.bincount(choice, minlength=rungs).double() / len(choice)).tolist()


def _interval(correct: int, n: int) -> tuple[float, float]:
    low, high = wilson(correct, n)
    return (100 * low, 100 * high)


def _quiet(module: nn.Module, inputs: Tensor) -> Any:
    with serving():
        return module(inputs)


def _routed(adapted: Adapted, inputs: Tensor) -> None:
    """What the engine does with one batch, operator by operator, so that its allocations can be followed."""
    with serving():
        state, index = adapted.decide(inputs, torch.tensor(adapted.bundle.budget), torch.tensor(float("inf")))
        for rung in index.unique().tolist():
            rows = (index == rung).nonzero()[:, 0]
            adapted.rungs[rung](state._replace(x=state.x[rows], size=state.size[rows], origin=state.origin[rows]))
