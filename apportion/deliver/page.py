"""What people read of a bundle: the report's page and the model card, from what was weighed."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from apportion.control import decide
from apportion.control.rules import confidence_cascade, oracle, random_at, static_hull
from apportion.deliver.adapted import Adapted
from apportion.deliver.bundle import Bundle
from apportion.engine import serving
from apportion.intake import KINDS, ImageSet, Samples, TextSet, Tokenise
from apportion.measure.doctor import device
from apportion.measure.latency import Timing, realisation_ratio
from apportion.measure.pictures import Point, merge_map
from apportion.measure.quality import mean_interval
from apportion.measure.report import Decision, Held, Passage, PathRow, Picture, Report, Summary, decimals
from apportion.vocab import Outcomes

BINS = 10
SHOWN = 6  # pictures in each group
LETTERS = 400  # of a text that is shown


def page(
    adapted: Adapted,
    samples: Samples,
    seen: Outcomes,
    choice: Tensor,
    dense_quality: Tensor,
    times: Mapping[int, Mapping[str, Timing]],
    peaks: Mapping[str, int],
    figures: Mapping[str, Any],
) -> Report:
    """The report: every point in both costs, what goes where, and what that looks like."""
    bundle, last = adapted.bundle, max(times)
    full, n, metric = bundle.rungs[-1].gmacs, len(choice), figures["metric"]
    rung_ms = [times[last][f"rung {k}"].median_ms for k in range(len(bundle.rungs))]

    def ms(share: list[float]) -> float:
        return float(np.dot(share, rung_ms))

    def at(cost: float) -> float:
        """Milliseconds of a mix of paths at this mean cost, between the two neighbours."""
        return float(np.interp(cost, [rung.gmacs / full for rung in bundle.rungs], rung_ms))

    dense, ours = dense_quality, seen.quality.gather(1, choice[:, None])[:, 0]
    points = [Point("dense", _percent(dense), figures["gmacs_dense"], times[last]["dense"].median_ms, "dense", _interval(dense))]
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
        if bundle.plan.control == "checkpoints":  # exits go on from each other
            reuse[1:] = seen.cost[:-1]
        found = confidence_cascade(seen, torch.full((len(bundle.rungs) - 1,), threshold), reuse)
        points.append(Point("cascade", 100 * found.accuracy, found.cost * full, at(min(found.cost, 1.0))))
    best = oracle(seen)
    points.append(Point("oracle", 100 * best.accuracy, best.cost * full, at(best.cost)))

    def whole(name: str, quality: Tensor, gmacs: float) -> Summary:
        spent = {batch: found[name].median_ms for batch, found in times.items()}
        return Summary(name, _percent(quality), _interval(quality), gmacs, spent, peaks[name])

    summary = (whole("dense", dense, figures["gmacs_dense"]), whole("adaptive", ours, figures["gmacs_adaptive"]))
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
    against = "the labels" if samples.labels is not None else "the dense model's answers"
    notes = (
        f"{metric[0].upper()}{metric[1:]} is against {against} on {n} inputs that nothing was fitted on. "
        f"The drop is {drop['points']:.2f} points, 95 % interval {drop['low']:.2f} to {drop['high']:.2f}, paired.",
        f"Above the best static mix at the same mean cost by {gain['value']:.2f} points (95 % interval {gain['low']:.2f} to {gain['high']:.2f}).",
        "GMACs include the glance, its extra head and the controller. Milliseconds are medians per input, in turn with the dense model compiled alike.",
        "Peak is of activations, weights apart. The glance runs on the whole batch at full width: at the same batch, the peak falls only with what follows.",
    )
    if isinstance(samples, TextSet):
        notes += (
            "A text is padded to the next length that graphs are built for, in the dense model as here, and both are timed on batches of one length:"
            " GMACs and milliseconds are means over the lengths of these texts.",
        )
    if certificate is not None:
        notes += (
            f"Certified: at most {certificate.tolerance_points:g} points are lost against the dense model, with confidence {certificate.confidence:g}, on"
            f" inputs like the {certificate.rows} that were kept for this alone (drop there {certificate.drop_points:.2f} points).",
        )
    else:
        notes += ("The tolerance held on the samples that placed the operating point; it was not certified: ask with a confidence.",)
    if bundle.plan.control == "checkpoints":
        notes += ("Every checkpoint answers, and whoever is sure enough leaves there: a path costs the answers on its way as well.",)
    if figures["slower_than_dense"]:
        notes += (f"Slower than dense here although cheaper: {'; '.join(figures['slower_than_dense'])}.",)
    conditions = {**{key: value for key, value in device().items() if isinstance(value, str | int | float)}, "dtype": "float32", "back-end": adapted.backend}
    return Report(
        metric=metric,
        title=f"Adaptive {bundle.provenance.get('source', {}).get('source', 'network')}",
        summary=summary,
        paths=rows,
        points=tuple(points),
        shares={f"operating point ({bundle.budget:.2f}x)": tuple(figures["share"]), **shares},
        decision=decision(bundle, seen, figures["bounds"]),
        memory=ledger(figures["memory"]),
        pictures=tuple(pictures(adapted, samples, seen, choice)) if isinstance(samples, ImageSet) else (),
        passages=tuple(passages(adapted, samples, seen, choice)) if isinstance(samples, TextSet) else (),
        notes=notes,
        conditions=conditions,
    )


def ledger(found: Mapping[str, Any]) -> tuple[Held, ...]:
    """Where bytes are; what the system does not say is left out."""
    names = {
        "weight_bytes": "weights, once for all paths",
        "copy_bytes": "copies of them in graphs",
        "activation_bytes": f"activations, a batch of {found['batch']}",
        "process_peak_bytes": "the whole process",
        "device_peak_bytes": "on the GPU",
    }
    return tuple(Held(name, found[key], found["how"][key]) for key, name in names.items() if found[key] is not None)


def decision(bundle: Bundle, seen: Outcomes, found: Mapping[str, Any]) -> Decision:
    """What the controller believed of these inputs, and what came of it."""
    said = bundle.controller.chance(seen)
    bins = (said * BINS).long().clamp(0, BINS - 1).flatten()
    kept = [(bins == number).nonzero()[:, 0] for number in range(BINS)]
    choice = decide(bundle.controller, seen, bundle.budget)
    tenths = said[:, 0].argsort(descending=True).tensor_split(BINS)
    costs = {"oracle": found["oracle"], "information bound (estimate)": found["information"], "this model": found["cost"], "hull, as accurate": found["hull"]}
    return Decision(
        tuple((float(said.flatten()[rows].mean()), float(seen.quality.flatten()[rows].double().mean()), len(rows)) for rows in kept if len(rows)),
        tuple(tuple(shares_of(choice[rows], len(bundle.rungs))) for rows in tenths if len(rows)),
        {name: cost for name, cost in costs.items() if cost is not None},
    )


def extremes(bundle: Bundle, samples: Samples, seen: Outcomes, choice: Tensor) -> list[tuple[Literal["easiest", "hardest"], int, str]]:
    """Group, row and caption of the inputs decided to be easiest and hardest."""
    shown, task = list[tuple[Literal["easiest", "hardest"], int, str]](), bundle.network.architecture.task
    easy = torch.argsort(choice.double() - seen.margin[:, -1].double())
    groups: tuple[tuple[Literal["easiest", "hardest"], Tensor], ...] = (("easiest", easy[:SHOWN]), ("hardest", easy.flip(0)[:SHOWN]))
    for group, order in groups:
        for row in order.tolist():
            rung = int(choice[row])
            right = (
                "right" if task == "classification" and seen.correct[row, rung] else "wrong" if task == "classification" else f"{seen.quality[row, rung]:.2f}"
            )
            name = f"{samples.classes[int(samples.labels[row])]}, " if task == "classification" and samples.labels is not None and samples.classes else ""
            shown.append((group, row, f"{name}rung {rung} of {len(bundle.rungs) - 1}, {right}"))
    return shown


def joins(adapted: Adapted, samples: Samples) -> list[tuple[int, str, Tensor]]:
    """Row, caption and origin of a few inputs along the path that merges most; none where no path merges, as where latents are read from an image."""
    bundle, space = adapted.bundle, adapted.bundle.network.space
    paths = bundle.ladder.paths if space.reduces or space.entering else ()
    merging = [path for path in paths if path.tokens and path.tokens[-1] < bundle.network.architecture.tokens]
    found = list[tuple[int, str, Tensor]]()
    for row in torch.linspace(0, len(samples) - 1, SHOWN).long().tolist() if merging else ():
        inputs = next(samples.rows([row]).batches(1, bundle.preprocess))[0]
        notes: dict[str, list[Tensor]] = {}
        with serving():
            bundle.network(inputs, min(merging, key=lambda path: path.tokens[-1]), notes)
        left, sources = notes["feature"][-1].shape[1], bundle.network.architecture.tokens if inputs.is_floating_point() else inputs.shape[-1]
        found.append((row, f"{left} of {sources} tokens left", notes["origin"][-1][0]))
    return found


def pictures(adapted: Adapted, images: ImageSet, seen: Outcomes, choice: Tensor) -> list[Picture]:
    """The inputs decided to be easiest and hardest, and where the path that merges most joined tokens on the image."""
    bundle, a = adapted.bundle, adapted.bundle.network.architecture
    shown = [Picture(pixels(bundle.preprocess, images, row), caption, group) for group, row, caption in extremes(bundle, images, seen, choice)]
    for row, caption, origin in joins(adapted, images):
        side = a.image_size // a.patch
        shown.append(Picture(merge_map(pixels(bundle.preprocess, images, row), origin.numpy(), (side, side), a.prefix), caption, "merged"))
    return shown


def passages(adapted: Adapted, texts: TextSet, seen: Outcomes, choice: Tensor) -> list[Passage]:
    """The same for texts: what stands for itself alone at the end of the path that merges most is marked."""
    shown = [Passage(((plain(texts, row), False),), caption, group) for group, row, caption in extremes(adapted.bundle, texts, seen, choice)]
    feed = adapted.bundle.preprocess
    for row, caption, origin in joins(adapted, texts):
        text = texts.texts[row]
        if isinstance(text, str) and isinstance(feed, Tokenise):
            shown.append(Passage(marked(text, feed.spans(text), origin.tolist()), caption, "merged"))
    return shown


def plain(texts: TextSet, row: int) -> str:
    text = texts.texts[row]
    return (text if isinstance(text, str) else " / ".join(text))[:LETTERS]


def marked(text: str, spans: list[tuple[int, int]], origin: list[int]) -> tuple[tuple[str, bool], ...]:
    """The text in pieces, each with whether its tokens stand for themselves alone. `spans`: first and last letter of each token, `origin`: where it went."""
    alone, went = [False] * len(text), origin[: len(spans)]
    for (start, end), place in zip(spans, went, strict=True):
        alone[start:end] = [went.count(place) == 1] * (end - start)
    return tuple(("".join(letter for letter, _ in run), flag) for flag, run in groupby(zip(text[:LETTERS], alone, strict=False), key=lambda pair: pair[1]))


def pixels(preprocess: Any, images: ImageSet, row: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """What the network sees of one image, as bytes again."""
    inputs = next(images.rows([row]).batches(1, preprocess))[0][0]
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (preprocess.mean, preprocess.std))
    return ((inputs * std + mean) * 255).round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy()


def card(adapted: Adapted, title: str, figures: Mapping[str, Any]) -> str:
    """The model card: what it is, how good, how fast, where it was measured, how to load it."""
    bundle, facts = adapted.bundle, device()
    inputs = KINDS[type(bundle.preprocess)][1]
    digits = decimals(figures["gmacs_dense"])
    rows = [
        f"| {path.name} | {rung.gmacs:.{digits}f} | {100 * rung.accuracy:.2f} | {100 * share:.1f} |"
        for path, rung, share in zip(bundle.ladder.paths, bundle.rungs, figures["share"], strict=True)
    ]
    drop, right, before = figures["drop_points"], 100 * figures["accuracy_adaptive"], 100 * figures["accuracy_dense"]
    return "\n".join(
        [
            f"# {title}",
            "",
            "```python",
            "import apportion",
            'model = apportion.load("this folder")',
            f'answer = model({inputs})  # .logits, .path, .cost; model({inputs}, budget="0.5x") for another budget',
            "```",
            "",
            f"{figures['metric'].capitalize()} {right:.2f} % against {before:.2f} % of the dense network on {figures['samples']} inputs"
            f" (drop {drop['points']:.2f} points, 95 % interval {drop['low']:.2f} to {drop['high']:.2f}),"
            f" at {figures['gmacs_adaptive']:.{digits}f} GMACs per input against {figures['gmacs_dense']:.{digits}f}, the decision included.",
            f"Measured on {facts['cpu']}, {facts['cores']} cores, torch {facts['torch']}, float32, back-end {adapted.backend}.",
            "",
            f"| path | GMACs | {figures['metric']}, % | share of inputs, % |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )


def shares_of(choice: Tensor, rungs: int) -> list[float]:
    return (torch.bincount(choice, minlength=rungs).double() / len(choice)).tolist()


def _percent(quality: Tensor) -> float:
    return 100 * float(quality.double().mean())


def _interval(quality: Tensor) -> tuple[float, float]:
    low, high = mean_interval(quality.double().numpy())
    return (100 * low, 100 * high)
