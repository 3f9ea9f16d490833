"""The corridor: the verbs that people call. The only library file that knows every room; each verb is the order in which they are visited."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path as File
from typing import Any, get_args

import torch
from torch import Tensor, nn

from apportion import methods
from apportion.control import Certificate, Controller, OperatingPoint, candidates, certify, choose_rungs, decide, fit_controller, frontier, operating_point
from apportion.control.complexity import Complexity
from apportion.control.policy import Policy
from apportion.deliver.adapted import Adapted, load
from apportion.deliver.bundle import Bundle, Rung
from apportion.deliver.costs import Profile, mean_macs, profile
from apportion.deliver.weighing import Weighed, check_time, fast_enough, weigh
from apportion.engine import Backend, build
from apportion.errors import ControlError, DataError, EngineError, PlanError
from apportion.intake import Feed, Parts, Preprocess, Samples, Source, Tokenise, matched, opened, read_model, reader
from apportion.measure.doctor import device
from apportion.measure.forecast import forecast
from apportion.measure.inspect import Inspection, inspected
from apportion.measure.outcomes import measure_outcomes
from apportion.network import Architecture, Network, put, sort_by_importance
from apportion.train import Data, Images, Recipe, Texts, acm, dense, fit, sandwich
from apportion.vocab import Choice, Ladder, Outcomes, Plan

Tell = Callable[[str], None]
GATE = 16  # hidden units of an adaptive computation module's gate, as published
BATCH = 100  # rows at a time while tables are measured
CERTIFIED_BUDGETS = 9  # tested one after the other, from the full path's down to the one that was placed
TRIAL_ROWS = 500  # on which every candidate path is tried; the chosen few are measured on all rows


def silent(text: str) -> None:
    """Progress for nobody."""


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
    backend: Backend = "inductor",
    buckets: Sequence[int] = (1, 8, 32),
    repeats: int = 30,
    tell: Tell = silent,
) -> Weighed:
    """Read a trained model, make it adapt its compute to each input, weigh the result and, with `out`, write the bundle and its report there.

    `tolerance` is in percentage points of accuracy (of agreement with the model, where the data has no labels); with `confidence`, such as 0.9, it is certified
    on samples that nothing else saw. A model of texts is the folder of a text classifier as transformers writes it: texts are cut to `length` tokens, and
    `columns` says what the columns "text", "label" and, for a second text, "pair" are called in the data. Raises the errors of the rooms it visits: Refused for
    a model that cannot be read exactly, DataError for data, ControlError where no budget holds the tolerance, or the samples are too few to certify it.
    """
    plan = plan or Plan()
    plan = plan if tolerance is None else replace(plan, tolerance=tolerance)
    plan = plan if confidence is None else replace(plan, confidence=confidence)
    tell(f"reading {model if not isinstance(model, nn.Module) else type(model).__name__}")
    source = read_model(model, timm_name=timm_name, random=random, preprocess=preprocess, length=length)
    feed = source.feed or source.tokenise
    if not isinstance(data, Parts):
        read = reader(feed, source.classes, columns)
        data = Parts.read(data, seed=plan.seed, teach=plan.epochs > 0, certify=plan.confidence > 0, tell=tell, read=read)
    source, parts = matched(source, data), data
    parts.check(source.network.architecture.classes)
    reference = copy.deepcopy(source.network).eval().requires_grad_(False)
    feed = source.feed or source.tokenise
    taught = prepare(source.network, parts, feed, plan, folder=None if out is None else File(out) / "training", tell=tell)
    adapted, seen = control(taught, reference, parts, source, plan, backend=backend, buckets=buckets, tell=tell)
    dense_correct = outcomes(reference, Ladder((reference.space.full,), 0), parts.report, feed).correct[:, 0]
    weighed = weigh(adapted, reference, parts.report, seen, dense_correct, repeats=repeats, tell=tell)
    if plan.never_slower and (faster := fast_enough(weighed, tell=tell)) is not None:
        adapted, seen = control(taught, reference, parts, source, plan, ladder=faster, backend=backend, buckets=buckets, tell=tell)
        weighed = weigh(adapted, reference, parts.report, seen, dense_correct, repeats=repeats, tell=tell)
    if plan.never_slower:
        check_time(weighed)
    if out is not None:
        weighed.adapted.save(out, extra=weighed.files())
        tell(f"written to {out}")
    return weighed


def scratch(
    data: str | File, *, recipe: Recipe, architecture: Architecture, folder: File | None = None, tell: Tell = silent
) -> tuple[Network, Preprocess, Parts]:
    """Train a dense network for people who bring data and no model; it then goes through `adapt` like any other."""
    parts = Parts.read(data, seed=recipe.seed, tell=tell)
    images = parts.teach
    if images is None or images.labels is None:
        raise DataError("images without labels", wanted="a class for each", do="Put the images of each class into a folder of their own.")
    preprocess = Preprocess(architecture.image_size, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    torch.manual_seed(recipe.seed)
    network = Network(replace(architecture, classes=len(images.classes)))
    tell(f"training {architecture.depth} blocks of width {architecture.dim} on {len(images)} images")
    fit(network, _memory(images, preprocess), dense(label_smoothing=recipe.label_smoothing), recipe=recipe, folder=folder)
    return network, preprocess, parts


def prepare(network: Network, parts: Parts, feed: Feed, plan: Plan, *, folder: File | None, tell: Tell) -> Network:
    """The plan's methods in their slots, units in order of importance, and the paths taught where the plan gives epochs to it."""
    for choice in plan.choices:
        put(network, choice)
    samples = parts.decide if parts.teach is None else parts.teach
    some = samples.rows(range(min(256, len(samples))))
    tell("sorting units by importance")
    sort_by_importance(network, (inputs for inputs, _ in some.batches(BATCH, feed)))
    if plan.epochs > 0:
        if parts.teach is None:
            raise PlanError(f"{plan.epochs} epochs and nothing to teach with", wanted="training samples", do="Give some, or set epochs to 0.")
        teacher = copy.deepcopy(network).eval().requires_grad_(False)
        tell(f"teaching the paths for {plan.epochs} epochs")
        crop = max(1, feed.size // 8) if isinstance(feed, Preprocess) else 0
        recipe = Recipe(epochs=plan.epochs, batch=plan.batch, learning_rate=plan.learning_rate, seed=plan.seed, crop_padding=crop)
        objective, data = sandwich(candidates(network.space, plan.glance), teacher=teacher), _memory(parts.teach, feed)
        if gated(plan):
            acm.teach(network, data, teacher=teacher, last=objective, recipe=recipe, folder=folder)
        else:
            fit(network, data, objective, recipe=recipe, folder=folder)
    elif gated(plan):
        raise PlanError("a gate that nothing has taught", wanted="some epochs: it would deal out compute by the order of tokens", do="Give the plan epochs.")
    return network.eval().requires_grad_(False)


def with_method(plan: Plan, name: str) -> Plan:
    """The plan with a method whose parts are taught in an order of their own: `acm`, a gate for every token in place of nested widths. Raises PlanError."""
    if name != "acm":
        raise PlanError(f"method {name!r}", wanted="acm", do="Name other methods in the plan's choices.")
    return replace(plan, choices=(*(choice for choice in plan.choices if choice.slot != "ffn"), Choice("ffn", "acm", options={"gate": GATE})))


def gated(plan: Plan) -> bool:
    """Whether learners with gates are in the plan."""
    return any(choice.name == "acm" and choice.options.get("gate") for choice in plan.choices)


def choose_ladder(
    network: Network, reference: Network, samples: Samples, feed: Feed, plan: Plan, over: Profile, *, backend: Backend, buckets: Sequence[int], tell: Tell
) -> Ladder:
    """Try every candidate path on some samples and keep the few that are worth serving, in multiply-adds or in the plan's milliseconds."""
    trial = samples.rows(range(min(TRIAL_ROWS, len(samples))))
    every = candidates(network.space, plan.glance)
    tell(f"trying {len(every)} paths on {len(trial)} {'texts' if isinstance(feed, Tokenise) else 'images'}")
    tried = sorted(every, key=lambda path: mean_macs(network, path, over))
    table = outcomes(network, Ladder(tuple(tried), plan.glance), trial, feed, reference=reference, over=over)
    cost = table.cost
    if plan.search == "ms":
        example, _ = next(samples.rows([0]).batches(1, feed))
        times = forecast(network, tried, example, build=builder(backend), backend=backend, batches=(1, max(buckets)), tell=tell)
        tell(f"times foretold from {times.points} that were measured: {100 * times.error:.1f} % off on paths left out, {100 * times.worst:.1f} % at worst")
        ms = torch.tensor([times.ms(network, path, max(buckets)) for path in tried], dtype=cost.dtype)
        cost = ms / ms[-1]
    chosen = choose_rungs(table.correct.double().mean(0), cost, plan.rungs, correct=table.correct)
    return Ladder(tuple(tried[index] for index in sorted(chosen)), plan.glance)  # cheapest first in multiply-adds: the table's order


def builder(backend: Backend) -> Callable[[nn.Module, Tensor], Callable[[Tensor], Any]]:
    """What makes a static graph of a module and its input."""
    return lambda module, inputs: build(module, (inputs,), backend=backend, name="a path to time")


def control(
    network: Network,
    reference: Network,
    parts: Parts,
    source: Source,
    plan: Plan,
    *,
    ladder: Ladder | None = None,
    backend: Backend,
    buckets: Sequence[int],
    tell: Tell,
) -> tuple[Adapted, Outcomes]:
    """Choose the paths to serve (where no ladder is given), learn to decide between them, and find the operating point that holds the tolerance."""
    feed = source.feed or source.tokenise
    over = profile(network, parts.place, feed)
    ladder = ladder or choose_ladder(network, reference, parts.decide, feed, plan, over, backend=backend, buckets=buckets, tell=tell)
    tell(f"learning to decide between {len(ladder.paths)} paths")
    one, _ = next(parts.decide.rows([0]).batches(1, feed))
    decision = decision_macs(network.glance(ladder.glance)(one)[1].shape[1], len(ladder.paths))
    fitted, placed = (outcomes(network, ladder, part, feed, decision=decision, reference=reference, over=over) for part in (parts.decide, parts.place))
    # The tolerance is against the model that was read, so what healing gave or took at full counts too.
    before = outcomes(reference, Ladder((reference.space.full,), 0), parts.place, feed)
    lost = 100 * (before.correct.double().mean() - placed.correct[:, -1].double().mean()).item()
    first, controller, point = settle(fitted, placed, plan.tolerance - lost, seed=plan.seed)
    ladder = Ladder(ladder.paths[first:], plan.glance)
    tell(f"operating at {point.mean_cost:.3f} of the full path, on {len(ladder.paths)} paths")
    certificate = None
    if plan.confidence > 0:
        certificate = certified(network, reference, ladder, controller, parts, feed, plan, over, least=point.budget)
        tell(f"certified at {certificate.mean_cost:.3f} of the full path: at most {plan.tolerance:g} points lost, with confidence {plan.confidence:g}")
    shared = network.glance(ladder.glance).macs() + controller.macs
    gmacs = [(mean_macs(network, path, over) + shared) / 1e9 for path in ladder.paths]
    seen = outcomes(network, ladder, parts.report, feed, decision=controller.macs, reference=reference, over=over)
    accuracy = seen.correct.double().mean(0).tolist()
    bundle = Bundle(
        network=network,
        ladder=ladder,
        controller=controller,
        preprocess=feed,
        plan=plan,
        budget=point.budget if certificate is None else certificate.budget,
        rungs=tuple(Rung(g, a) for g, a in zip(gmacs, accuracy, strict=True)),
        frontier=tuple(frontier(controller, seen, torch.linspace(gmacs[0] / gmacs[-1] + 1e-3, 1.0, 12).tolist())),
        dense_gmacs=mean_macs(reference, reference.space.full, over) / 1e9,
        classes=named(tuple(source.classes or parts.report.classes), network.architecture.classes),
        certificate=certificate,
        provenance={
            "source": source.provenance,
            "made_on": device(),
            "rows": {"decide": len(parts.decide), "place": len(parts.place), "report": len(parts.report), "certify": len(parts.certify or ())},
        },
    )
    return Adapted(bundle, backend=backend, buckets=buckets), seen


def certified(
    network: Network, reference: Network, ladder: Ladder, controller: Controller, parts: Parts, feed: Feed, plan: Plan, over: Profile, *, least: float
) -> Certificate:
    """The cheapest budget from `least` on at which the drop against `reference` is certified; PlanError where there are no samples for it."""
    if parts.certify is None:
        raise PlanError(f"confidence {plan.confidence:g} and nothing to certify on", wanted="samples that nothing else saw", do="Give Parts some.")
    table = outcomes(network, ladder, parts.certify, feed, decision=controller.macs, reference=reference, over=over)
    before = outcomes(reference, Ladder((reference.space.full,), 0), parts.certify, feed).correct[:, 0]
    return certify(
        lambda budget: decide(controller, table, budget),
        table,
        tolerance_points=plan.tolerance,
        budgets=torch.linspace(least, float(table.cost[-1]), CERTIFIED_BUDGETS).tolist(),
        delta=1 - plan.confidence,
        reference=before,
    )


def settle(fitted: Outcomes, placed: Outcomes, tolerance: float, *, seed: int) -> tuple[int, Controller, OperatingPoint]:
    """The first rung to serve, a controller of those from it on, and the cheapest operating point that keeps the tolerance.

    With few rows to learn from, a poor cheapest rung tempts a controller more than it helps it; with one rung fewer below, the same budget goes further. The
    smallest budget of each choice sends everything to its cheapest rung, so static paths are among what is compared. A second controller learns on `placed`
    and is judged on `fitted`, so that all rows place the point and none judges what it taught. Raises ControlError where nothing holds.
    """
    rungs, found = torch.arange(len(fitted.cost)), list[tuple[int, Controller, OperatingPoint]]()
    for first in range(len(rungs) - 1):
        ours, theirs = fitted.columns(rungs[first:]), placed.columns(rungs[first:])
        controller, swapped = learned(ours, theirs, seed=seed), learned(theirs, ours, seed=seed)

        def choose(budget: float, taught: Outcomes = ours, kept: Outcomes = theirs, a: Controller = controller, b: Controller = swapped) -> Tensor:
            return torch.cat((decide(a, kept, budget), decide(b, taught, budget)))

        try:
            found.append((first, controller, operating_point(choose, joined(theirs, ours), tolerance)))
        except ControlError as error:
            if first == len(rungs) - 2 and not found:
                raise error
    return min(found, key=lambda choice: choice[2].mean_cost)


def learned(fit: Outcomes, held: Outcomes, *, seed: int) -> Controller:
    """A controller taught on `fit`, its probabilities and budgets made true on `held`."""
    rows = torch.arange(len(fit.correct) + len(held.correct))
    return fit_controller(joined(fit, held), fit_rows=rows[: len(fit.correct)], calibrate_rows=rows[len(fit.correct) :], seed=seed)


def outcomes(
    network: Network, ladder: Ladder, samples: Samples, feed: Feed, *, decision: int = 0, reference: Network | None = None, over: Profile | None = None
) -> Outcomes:
    """The table of these samples along the paths of the ladder; costs are closed-form multiply-adds with the glance's, as shares of the full path.

    `decision`: multiply-adds of the controller. Without labels, right is what `reference` answers, or where there is none the ladder's own full path.
    `over`: how texts are spread over lengths; costs are means over it.
    """
    rungs = [network.segment(ladder.glance, len(path.steps), path) for path in ladder.paths]
    glance = network.glance(ladder.glance)
    cost = torch.tensor([mean_macs(network, path, over) + glance.macs() + decision for path in ladder.paths], dtype=torch.float64)
    sizes = samples.sizes(feed)
    order = None if sizes is None else sizes.argsort(stable=True)  # texts of one length share a batch
    batches = (samples if order is None else samples.rows(order)).batches(BATCH, feed)
    if samples.labels is None and reference is not None:
        batches = ((inputs, reference(inputs, reference.space.full).argmax(-1)) for inputs, _ in batches)
    table = measure_outcomes(glance, rungs, batches, cost=(cost / cost[-1]).float())
    return table if order is None else table.rows(order.argsort())


def decision_macs(features: int, rungs: int) -> int:
    """Multiply-adds of the controller that `fit_controller` will make of such a table."""
    return Complexity(features=features, rungs=rungs).macs + Policy(features=features, rungs=rungs).macs


def named(classes: tuple[str, ...], outputs: int) -> tuple[str, ...]:
    """A name for every output: its number where the data does not name it; none where nothing is named."""
    return (*classes, *map(str, range(len(classes), outputs))) if classes else ()


def joined(first: Outcomes, second: Outcomes) -> Outcomes:
    columns = {name: torch.cat((getattr(first, name), getattr(second, name))) for name in ("signal", "correct", "agree", "loss", "margin")}
    return Outcomes(**columns, cost=first.cost)


def _memory(samples: Samples, feed: Feed) -> Data:
    """All samples in memory, as inputs."""
    if isinstance(feed, Tokenise):
        inputs, labels = next(samples.batches(len(samples), feed))
        return Texts(inputs, labels, padding=feed.padding)
    return Images(torch.cat([inputs for inputs, _ in samples.batches(BATCH, feed)]), samples.labels)


def bench(
    folder: str | File,
    data: str | File,
    *,
    columns: Mapping[str, str] | None = None,
    backend: Backend = "inductor",
    buckets: Sequence[int] = (1, 8, 32),
    repeats: int = 30,
    tell: Tell = silent,
) -> Weighed:
    """Measure a bundle again, on this device and this data, and write the times and the report into it. The dense model is its full path, undecided."""
    adapted = load(folder, backend=backend, buckets=buckets)
    bundle, feed = adapted.bundle, adapted.bundle.preprocess
    samples = reader(feed, bundle.classes or None, columns)(data, split="test")
    samples.check(bundle.network.architecture.classes)
    seen = outcomes(bundle.network, bundle.ladder, samples, feed, decision=bundle.controller.macs, over=profile(bundle.network, samples, feed))
    weighed = weigh(adapted, bundle.network, samples, seen, seen.correct[:, -1], repeats=repeats, tell=tell)
    weighed.adapted.save(folder, extra=weighed.files())
    return weighed


def demo(out: str | File, *, epochs: float = 20.0, backend: Backend = "inductor", tell: Tell = silent) -> Weighed:
    """The whole way on scikit-learn's handwritten digits: train a small transformer, make it adaptive, weigh it, write bundle and report."""
    architecture = Architecture(image_size=16, patch=2, dim=48, depth=6, heads=3, hidden=192, classes=10, stem="conv")
    recipe = Recipe(epochs=epochs, batch=64, learning_rate=2e-3, crop_padding=1, ema=0.99)
    network, preprocess, parts = scratch("digits", recipe=recipe, architecture=architecture, folder=File(out) / "training" / "dense", tell=tell)
    # Two milliseconds of work are mostly calls: on some machines paths of so small a network are not faster at batch 1. The report says so.
    plan = Plan(glance=1, rungs=4, tolerance=0.5, epochs=epochs / 2, batch=64, learning_rate=1e-3, never_slower=False)
    return adapt(network, parts, plan=plan, out=out, preprocess=preprocess, backend=backend, buckets=(1, 8, 32), tell=tell)


def run(
    folder: str | File, inputs: Sequence[str | File], *, budget: str | None = None, columns: Mapping[str, str] | None = None, backend: Backend = "eager"
) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """Label, probability, path and GMACs of each picture among files and folders, or of each text, and what could not be read, each with the reason."""
    adapted, rows, skipped = load(folder, backend=backend), list[dict[str, Any]](), list[tuple[str, str]]()
    given = opened(inputs, adapted.bundle.preprocess, columns)
    while part := list(islice(given, BATCH)):
        skipped += [(name, why) for name, _, why in part if why]
        some = [(name, one) for name, one, why in part if not why]
        if not some:
            continue
        answer = adapted([one for _, one in some], budget)
        top = answer.logits.softmax(-1).max(-1)
        for (file, one), label, probability, rung, gmacs in zip(
            some, top.indices.tolist(), top.values.tolist(), answer.path.tolist(), answer.cost.tolist(), strict=True
        ):
            name = adapted.bundle.classes[label] if adapted.bundle.classes else str(label)
            text = {"text": one} if isinstance(one, str | tuple) else {}
            path = adapted.bundle.ladder.paths[rung].name
            rows.append({"file": file, **text, "label": name, "probability": probability, "path": path, "gmacs": gmacs})
    return rows, skipped


def inspect(
    model: str | File | nn.Module, *, timm_name: str | None = None, random: bool = False, image_size: int | None = None, length: int | None = None
) -> Inspection:
    """What a model is read as, and which axes of it can adapt; nothing is trained or measured. Raises as `read_model` does."""
    return inspected(read_model(model, timm_name=timm_name, random=random, image_size=image_size, length=length).network)


def systems(name: str | None = None) -> list[dict[str, Any]]:
    """The cards of the shelf. Raises PlanError for a name that is not there."""
    rows = [{"name": method, "slot": slot, **asdict(methods.card(slot, method))} for slot in methods.SLOTS for method in methods.names(slot)]
    found = [row for row in rows if name in (None, row["name"])]
    if not found:
        raise PlanError(f"method {name!r}", wanted=f"one of {', '.join(row['name'] for row in rows)}", do="Correct the name.")
    return found


def backend(name: str) -> Backend:
    """A back-end by name. Raises EngineError."""
    for known in get_args(Backend):
        if name == known:
            return known
    raise EngineError(f"back-end {name!r}", wanted=f"one of {get_args(Backend)}", do="Name one of these.")


__all__ = ["Parts", "adapt", "bench", "demo", "load", "run", "scratch", "systems"]
