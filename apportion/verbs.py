"""The corridor: the verbs that people call. The only library file that knows every room; each verb is the order in which they are visited."""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import chain, islice
from pathlib import Path as File
from typing import Any

import torch
from torch import nn

from apportion import methods
from apportion.control import offered
from apportion.deliver.adapted import Adapted, load
from apportion.deliver.answers import spelled
from apportion.deliver.beginning import Stem, at_once, begin_with, foreseen, graph_lengths, one_of, perceiver_of, to_scale, wanted
from apportion.deliver.costs import profile
from apportion.deliver.deciding import BATCH, control, outcomes
from apportion.deliver.ranking import Ranking, Tell, Wanted, made_up, rank, silent
from apportion.deliver.weighing import Weighed, check_time, fast_enough, typical, weigh
from apportion.errors import DataError, NoEffect, PlanError
from apportion.intake import KINDS, Feed, Parts, Pooling, Preprocess, Samples, TextSet, Tokenise, fresh, matched, opened, read_model, reader
from apportion.intake.labels import span
from apportion.intake.laid import gathered
from apportion.intake.parts import bare
from apportion.measure.inspect import Inspection, inspected
from apportion.methods.task import SURE
from apportion.network import Architecture, Network, Perceiver, coarse, fit_bridges, left_out, put, sort_by_importance
from apportion.train import Data, Images, Recipe, Sounds, Texts, acm, classes, dense, fit, nested, sandwich
from apportion.train.tasks import taught_by
from apportion.vocab import Budget, Choice, Ladder, Plan, Task

BRIDGING = 1000  # samples on which maps are fitted and judged, at most
CHOOSE: tuple[Task, ...] = ("classification", "token_classification", "segmentation")  # one class among several
GATE = 16  # hidden units of an adaptive computation module's gate, as published


def adapt(
    model: str | File | nn.Module,
    data: str | File | Parts,
    *,
    tolerance: float | None = None,
    confidence: float | None = None,
    plan: Plan | None = None,
    out: str | File | None = None,
    timm_name: str | None = None,
    random: bool = False,
    preprocess: Feed | None = None,
    length: int | None = None,
    columns: Mapping[str, str] | None = None,
    task: Task | None = None,
    pooling: Pooling | None = None,
    backend: Wanted = "inductor",
    buckets: Sequence[int] | None = None,
    repeats: int = 30,
    tell: Tell = silent,
) -> Weighed:
    """Read a trained model, make it adapt its compute to each input, weigh the result and, with `out`, write the bundle and its report there.

    `tolerance` is in percentage points of accuracy (of agreement with the model, where the data has no labels); with `confidence`, such as 0.9, it is certified
    on samples that nothing else saw. For other tasks than one class, points are hundredths of the task's own measure (`measure.judge`), and `task` says what
    outputs mean where the model does not. A model of texts is a folder as transformers or sentence-transformers writes it: texts are cut to `length` tokens, an
    encoder without a head takes `pooling`, and `columns` says what "text", "label" and, for a second text, "pair" are called in the data. Graphs are built for
    doubled lengths, or for those that the texts ask for where these save enough. With `backend="auto"` back-ends are timed first. `tell=print` says how far
    it is, with the progress of training; without it nothing is said. Raises the errors of the rooms it visits: Refused for a model that cannot be read
    exactly, DataError for data, ControlError where no budget holds the tolerance, or the samples are too few to certify it.
    """
    plan, buckets = plan or Plan(), at_once(backend, buckets) or (1, 8, 32)
    plan = plan if tolerance is None else replace(plan, tolerance=tolerance)
    plan = plan if confidence is None else replace(plan, confidence=confidence)
    if not isinstance(model, Network):
        tell(f"reading {model if not isinstance(model, nn.Module) else type(model).__name__}")
    source = read_model(model, timm_name=timm_name, random=random, preprocess=preprocess, length=length, task=task, pooling=pooling)
    feed, task = source.fed, source.network.architecture.task
    check_task(task, plan)
    if not isinstance(data, Parts):
        read = reader(feed, source.classes, columns, task=task)
        data = Parts.read(data, seed=plan.seed, teach=plan.epochs > 0, certify=plan.confidence > 0, tell=tell, read=read)
    source, parts = matched(source, data), data.unlabelled() if task == "embedding" else data
    parts.check(source.network.architecture.classes)
    parts.suffice(KINDS[type(source.fed)][1])
    if task == "regression":
        source.network.architecture = replace(source.network.architecture, span=span([samples.labels for samples in (parts.decide, parts.place)]))
    reference = copy.deepcopy(source.network).eval().requires_grad_(False)
    feed = source.fed
    dense_quality = outcomes(reference, Ladder((reference.space.full,), 0), parts.report, feed).quality[:, 0]
    foreseen(dense_quality, parts.report, task, tell)
    chosen = graph_lengths(reference, parts, feed, tell)
    ranking = None
    if backend == "auto":
        ranking = rank(reference, typical(reference, parts.decide, feed, max(buckets), chosen), tell=tell)
        backend = ranking.backend
    taught = prepare(source.network, parts, feed, plan, folder=None if out is None else File(out) / "training", tell=tell)
    adapted, seen = control(taught, reference, parts, source, plan, chosen=chosen, backend=backend, buckets=buckets, tell=tell)
    weighed = weigh(adapted, reference, parts.report, seen, dense_quality, ranking=ranking, repeats=repeats, tell=tell)
    if plan.never_slower and (faster := fast_enough(weighed, tell=tell)) is not None:
        adapted, seen = control(taught, reference, parts, source, plan, ladder=faster, chosen=chosen, backend=backend, buckets=buckets, tell=tell)
        weighed = weigh(adapted, reference, parts.report, seen, dense_quality, ranking=ranking, repeats=repeats, tell=tell)
    if plan.never_slower:
        check_time(weighed)
    if out is not None:
        weighed.adapted.save(out, extra=weighed.files())
        tell(f"written to {out}")
    return weighed


def scratch(
    data: str | File,
    *,
    recipe: Recipe,
    architecture: Architecture | None = None,
    feed: Feed | None = None,
    kind: str | None = None,
    columns: Mapping[str, str] | None = None,
    task: Task = "classification",
    length: int | None = None,
    vocabulary: int = 8000,
    certify: bool = False,
    least_steps: int = 0,
    perceiver: bool = False,
    stem: Stem | None = None,
    folder: File | None = None,
    tell: Tell = silent,
) -> tuple[Network, Feed, Parts]:
    """Train a dense network for people who bring data and no model; then it goes through `adapt`.

    `perceiver`: one network for many numbers of latents, widths and depths instead (`network.Perceiver`, `train.nested`), for classes of pictures; `adapt` then
    chooses among its settings, without a method or teaching. `stem`: how pictures begin; "patch", a product for each, is what the method `apt` can join.

    What the data are, `kind` says ("images", "texts", "recordings", "rows", "series"), or a `feed`, or else the data themselves (`intake.fresh.kind_of`).
    Without an `architecture` it is one of moderate size. Of texts a `vocabulary` of so many pieces of words is learned, from those alone that teach, and they
    are cut to `length` tokens. What a recipe says of pixels counts for images alone. `certify`: samples are kept for a plan that asks for confidence.
    `least_steps`: where samples are so few that the recipe's epochs make fewer, there are more epochs. Raises DataError and PlanError.
    """
    which = type(feed) if feed is not None else fresh.kind_of(data, columns) if kind is None else fresh.kind_called(kind)
    begun = feed or fresh.blank(which, architecture, length)
    parts = Parts.read(data, seed=recipe.seed, certify=certify, tell=tell, read=reader(begun, None, columns, task=task))
    samples, what = parts.teach, KINDS[which][1]
    assert samples is not None  # Parts.read was asked for some
    feed, shape = fresh.fitted(begun, samples, architecture, task=task, length=length, vocabulary=vocabulary)
    shape = begin_with(shape, stem)
    parts.check(shape.classes)
    if task in CHOOSE and (shape.classes < 2 or (samples.labels is not None and samples.labels.ndim == 1 and len(samples.labels.unique()) < 2)):
        one = "" if samples.labels is None else f", {samples.classes[max(0, int(samples.labels.max()))]!r}"
        do = "Add others: each is a label of its own, or a folder just below the one that is named; or name another task."
        raise DataError(f"{what} of one class{one}", wanted="two or more: of one there is nothing to tell apart", do=do)
    parts.suffice(what)
    torch.manual_seed(recipe.seed)
    network = perceiver_of(shape, task) if perceiver else Network(shape)
    if task == "regression" and samples.labels is not None:
        to_scale(network, samples.labels)
    tell(f"training {shape.depth} blocks of width {shape.dim} on {len(samples)} {what}")
    if recipe.steps(len(samples)) < least_steps:
        recipe = replace(recipe, epochs=least_steps * recipe.batch / len(samples))
        tell(f"{recipe.epochs:.0f} epochs, which is {least_steps} steps: there are few {what}")
    recipe = recipe if which is Preprocess else replace(recipe, crop_padding=0, flip=False)
    inputs = _data(samples, feed, folder, tell)
    if isinstance(network, Perceiver):
        fit(network, inputs, nested(classes(label_smoothing=recipe.label_smoothing)), recipe=recipe, folder=folder, progress=tell is not silent)
    else:
        objective = dense(label_smoothing=recipe.label_smoothing, task=task, span=shape.span)
        fit(network, inputs, objective, recipe=recipe, folder=folder, progress=tell is not silent)
    return network, feed, parts


def prepare(network: Network, parts: Parts, feed: Feed, plan: Plan, *, folder: File | None, tell: Tell) -> Network:
    """The plan's methods in their slots, units in order of importance, and the paths taught where the plan gives epochs to it."""
    if isinstance(network, Perceiver):
        if plan.choices or plan.epochs > 0:
            found = f"{len(plan.choices)} methods and {plan.epochs:g} epochs for a perceiver"
            raise PlanError(found, wanted="none: it was taught all its settings", do="Use the method `perceiver`, or a plan without choices and epochs.")
        return network.eval().requires_grad_(False)  # the order of its units is part of what was taught
    if plan.control == "entry" and not network.architecture.grey_level:
        coarse(network, 3 / (255 * sum(feed.std)) if isinstance(feed, Preprocess) else 1 / 255)
    for choice in plan.choices:
        put(network, choice)
    samples = parts.decide if parts.teach is None else parts.teach
    some = samples.rows(range(min(256, len(samples))))
    tell("sorting units by importance")
    sort_by_importance(network, (inputs for inputs, _ in some.batches(BATCH, feed)))
    maps = any((choice.slot, choice.name) == ("bridge", "surrogate") for choice in plan.choices)
    if plan.taught == "maps" and not (maps and plan.epochs > 0):
        raise PlanError("maps that alone are taught, but none or no epochs", wanted="the bridge surrogate, and epochs", do="Use the method `exits`.")
    if maps:
        bridged(network, samples, feed, plan, tell=tell)
    if plan.epochs > 0:
        if parts.teach is None:
            raise PlanError(f"{plan.epochs} epochs and nothing to teach with", wanted="training samples", do="Give some, or set epochs to 0.")
        teacher, a = copy.deepcopy(network).eval().requires_grad_(False), network.architecture
        tell(f"teaching the paths for {plan.epochs} epochs")
        crop = max(1, feed.size // 8) if isinstance(feed, Preprocess) else 0
        recipe = Recipe(epochs=plan.epochs, batch=plan.batch, learning_rate=plan.learning_rate, seed=plan.seed, crop_padding=crop)
        # Tokens of an early exit that had to look like the full path's own would hold it back.
        weight = 0.1 if plan.control == "checkpoints" else 1.0
        if plan.taught == "maps":
            network.requires_grad_(False)
            network.bridge.requires_grad_(True)
            weight = 0.0
        # A full path that stays as it is teaches as well as its copy would; without labels a loss of its own is asked of it, and the copy makes that 0.
        by = None if plan.taught == "maps" and parts.teach.labels is not None else teacher
        objective, data = (
            sandwich(offered(network.space, plan.control, plan.glance), teacher=by, feature_weight=weight, task=a.task, span=a.span),
            _data(parts.teach, feed, folder, tell),
        )
        if gated(plan):
            acm.teach(network, data, teacher=teacher, last=objective, recipe=recipe, folder=folder, progress=tell is not silent)
        else:
            fit(network, data, objective, recipe=recipe, folder=folder, progress=tell is not silent)
    elif gated(plan):
        raise PlanError("a gate that nothing has taught", wanted="some epochs: it would deal out compute by the order of tokens", do="Give the plan epochs.")
    return network.eval().requires_grad_(False)


def bridged(network: Network, samples: Samples, feed: Feed, plan: Plan, *, tell: Tell) -> None:
    """Maps for the runs of blocks that candidate paths leave out, or that the plan names: fitted on three quarters of some samples, judged on the others.

    Those that are to be taught begin as no maps at all."""
    runs = network.bridge.runs or left_out(network, offered(network.space, plan.control, plan.glance))
    if not runs:
        raise NoEffect("a bridge in a network whose blocks all run", wanted="one that may leave some out", do="Put a depth method into the plan.")
    if plan.taught == "maps":
        network.bridge = methods.find("bridge", "surrogate")(network.architecture.dim, runs).to(next(network.parameters()))
        return
    count = min(BRIDGING, len(samples))
    tell(f"fitting maps for {len(runs)} runs of blocks that paths leave out on {count} {KINDS[type(feed)][1]}")
    fit_on, judge_on = ([inputs for inputs, _ in samples.rows(rows).batches(BATCH, feed)] for rows in (range(3 * count // 4), range(3 * count // 4, count)))
    soft, _ = taught_by(network.architecture.task, span=network.architecture.span)
    found = fit_bridges(network, runs, fit_on, held_out=judge_on, apart=lambda answers, full: soft(answers, teacher=full))
    tell(f"{sum(each.pays for each in found)} of {len(runs)} maps answer more like the full path than leaving the blocks out does, and are kept")


def check_task(task: Task, plan: Plan) -> None:
    """Raises PlanError where a plan wants answers that say how sure they are, and those of this task do not."""
    if plan.control == "checkpoints" and task not in SURE:
        raise PlanError(f"control = 'checkpoints' for {task}", wanted=f"one of {', '.join(SURE)}, whose answers say how sure they are", do="Use 'glance'.")
    if gated(plan) and task != "classification":
        raise PlanError(f"the method acm for {task}", wanted="classification, which is what it teaches by", do="Leave it out of the plan.")


def with_method(plan: Plan, name: str) -> Plan:
    """The plan with a method that needs more than its slot: `acm`, a gate for every token in place of nested widths, taught in an order of its own; or
    `surrogate`, fitted maps in place of blocks that are left out; or `exits`, the same maps, taught, before the head of each exit, and nothing else changes; or
    `perceiver`, the settings of a network that brings them; or `apt`, fewer tokens for plain pictures, decided before anything runs. Raises PlanError."""
    if name == "apt":
        return replace(plan, choices=(), control="entry")
    if name == "perceiver":
        return replace(plan, choices=(), glance=0, epochs=0.0)
    if name == "surrogate":
        return replace(plan, choices=(*plan.choices, Choice("bridge", "surrogate")))
    if name == "exits":
        choices = (Choice("depth", "skip"), Choice("bridge", "surrogate"))
        return replace(plan, choices=choices, control="checkpoints", taught="maps", epochs=plan.epochs or 3.0, batch=32, learning_rate=3e-3)
    if name != "acm":
        raise PlanError(f"method {name!r}", wanted="acm, apt, exits, surrogate or perceiver", do="Name other methods in the plan's choices.")
    return replace(plan, choices=(*(choice for choice in plan.choices if choice.slot != "ffn"), Choice("ffn", "acm", options={"gate": GATE})))


def gated(plan: Plan) -> bool:
    """Whether learners with gates are in the plan."""
    return any(choice.name == "acm" and choice.options.get("gate") for choice in plan.choices)


def _data(samples: Samples, feed: Feed, folder: File | None, tell: Tell) -> Data:
    """All samples as inputs, in memory, or where they are too many, in a file in `folder`."""
    if isinstance(feed, Tokenise):
        assert isinstance(samples, TextSet)  # `matched` saw to it
        inputs, labels = samples.gathered(feed, folder=folder, tell=tell)
        return Texts(inputs, labels, padding=feed.padding)
    inputs = gathered(samples, feed, folder=folder, tell=tell)
    return Images(inputs, samples.labels) if isinstance(feed, Preprocess) else Sounds(inputs, samples.labels)


def bench(
    folder: str | File,
    data: str | File,
    *,
    columns: Mapping[str, str] | None = None,
    backend: Wanted = "inductor",
    buckets: Sequence[int] | None = None,
    repeats: int = 30,
    tell: Tell = silent,
) -> Weighed:
    """Measure a bundle again, on this device and this data, and write the times and the report into it. The dense model is its full path, undecided.

    Without `buckets`, at the bundle's own batch sizes.
    """
    adapted, ranking = load(folder, backend="eager" if backend == "auto" else backend, buckets=at_once(backend, buckets)), None
    bundle, feed = adapted.bundle, adapted.bundle.preprocess
    task = bundle.network.architecture.task
    samples = reader(feed, bundle.classes or None, columns, task=task)(data, split="test")
    samples = bare(samples) if task == "embedding" else samples
    samples.check(bundle.network.architecture.classes)
    if backend == "auto":
        ranking = rank(bundle.network, typical(bundle.network, samples, feed, max(adapted.buckets), bundle.lengths), tell=tell)
        adapted = Adapted(bundle, backend=ranking.backend, buckets=buckets)
    checkpoints, over = bundle.plan.control == "checkpoints", profile(bundle.network, samples, feed, bundle.lengths)
    seen = outcomes(bundle.network, bundle.ladder, samples, feed, decision=bundle.controller.macs, checkpoints=checkpoints, over=over)
    weighed = weigh(adapted, bundle.network, samples, seen, seen.quality[:, -1], ranking=ranking, repeats=repeats, tell=tell)
    weighed.adapted.save(folder, extra=weighed.files())
    return weighed


def demo(out: str | File, *, epochs: float = 20.0, backend: Wanted = "inductor", tell: Tell = silent) -> Weighed:
    """The whole way on scikit-learn's handwritten digits: train a small transformer, make it adaptive, weigh it, write bundle and report."""
    architecture = Architecture(image_size=16, patch=2, dim=48, depth=6, heads=3, hidden=192, classes=10, stem="conv")
    recipe = Recipe(epochs=epochs, batch=64, learning_rate=2e-3, crop_padding=1, ema=0.99)
    network, preprocess, parts = scratch("digits", recipe=recipe, architecture=architecture, folder=File(out) / "training" / "dense", tell=tell)
    # Two milliseconds of work are mostly calls: on some machines paths of so small a network are not faster at batch 1. The report says so.
    plan = Plan(glance=1, rungs=4, tolerance=0.5, epochs=epochs / 2, batch=64, learning_rate=1e-3, never_slower=False)
    return adapt(network, parts, plan=plan, out=out, preprocess=preprocess, backend=backend, buckets=(1, 8, 32), tell=tell)


def run(
    folder: str | File,
    inputs: Sequence[str | File],
    *,
    budget: str | None = None,
    columns: Mapping[str, str] | None = None,
    backend: Wanted = "eager",
    cache: File | None = None,
    tell: Tell = silent,
) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """Answer (`spelled`), path and GMACs of each picture or recording in files and folders, or each text, and what could not be read, with the reason."""
    spent = None if budget is None else Budget.parse(budget)  # a wrong word is refused before anything is built
    adapted = load(folder, backend=backend, buckets=at_once(backend, None), cache=cache, tell=tell)
    rows, skipped = list[dict[str, Any]](), list[tuple[str, str]]()
    given = opened(inputs, adapted.bundle.preprocess, columns)
    parts = iter(lambda: list(islice(given, BATCH)), [])
    first = next(parts, [])
    few = adapted.buckets[: bisect_left(adapted.buckets, len(first)) + 1]  # one picture needs no graphs for batches
    if few != adapted.buckets:
        adapted = Adapted(adapted.bundle, backend=adapted.backend, buckets=few, engine=adapted.engine.at(few))
    if adapted.backend != "eager":
        adapted.warm(tell)
    for part in chain([first], parts):
        skipped += [(name, why) for name, _, why in part if why]
        some = [(name, one) for name, one, why in part if not why]
        if not some:
            continue
        answer = adapted([one for _, one in some], spent)
        for (file, one), logits, rung, gmacs in zip(some, answer.logits, answer.path.tolist(), answer.cost.tolist(), strict=True):
            text = {"text": one} if isinstance(adapted.bundle.preprocess, Tokenise) else {}
            path = adapted.bundle.ladder.paths[rung].name
            rows.append({"file": file, **text, **spelled(adapted.bundle, logits, one), "path": path, "gmacs": gmacs})
    return rows, skipped


def inspect(
    model: str | File | nn.Module,
    *,
    timm_name: str | None = None,
    random: bool = False,
    image_size: int | None = None,
    length: int | None = None,
    cache: File | None = None,
) -> Inspection:
    """What a model is read as, or what a bundle holds, when it was held against its source, and which axes of it can adapt; nothing is trained or measured.

    `cache` as `read_model` has it. Raises as `read_model` and `load` do, and NoEffect for a cache with a bundle.
    """
    if not isinstance(model, nn.Module) and (File(model) / "plan.toml").is_file():
        if cache is not None:
            raise NoEffect("a cache for a bundle", wanted="a model of another library", do="Leave it out: a bundle was tested when it was made.")
        bundle = load(model, backend="eager").bundle
        found, day = inspected(bundle.network), bundle.provenance.get("source", {}).get("equality_tested_on")
        return found if day is None else replace(found, recognised=(*found.recognised, ("equality", f"with its source tested on {day}")))
    source = read_model(model, timm_name=timm_name, random=random, image_size=image_size, length=length, cache=cache)
    found = inspected(source.network)
    return replace(found, recognised=(*found.recognised, ("equality", source.equality)))


def backends(
    model: str | File | nn.Module,
    *,
    timm_name: str | None = None,
    random: bool = False,
    length: int | None = None,
    batch: int = 32,
    repeats: int = 20,
    tell: Tell = silent,
) -> Ranking:
    """Back-ends ranked on a model as it is read, on random inputs, texts at full length: one at a time and `batch` at once. Raises like both."""
    network = read_model(model, timm_name=timm_name, random=random, length=length).network.eval().requires_grad_(False)
    return rank(network, made_up(network, batch), repeats=repeats, tell=tell)


def systems(name: str | None = None) -> list[dict[str, Any]]:
    """The cards of the shelf. Raises PlanError for a name that is not there."""
    rows = [{"name": method, "slot": slot, **asdict(methods.card(slot, method))} for slot in methods.SLOTS for method in methods.names(slot)]
    found = [row for row in rows if name in (None, row["name"])]
    if not found:
        raise PlanError(f"method {name!r}", wanted=f"one of {', '.join(row['name'] for row in rows)}", do="Correct the name.")
    return found


__all__ = ["Parts", "adapt", "bench", "demo", "load", "one_of", "run", "scratch", "systems", "wanted"]
