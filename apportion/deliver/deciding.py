"""From a network with its paths to a bundle: which paths to serve, how to decide between them, and where to operate so that the tolerance holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from apportion.control import (
    Cascade,
    Certificate,
    Controller,
    Decider,
    Entry,
    OperatingPoint,
    certify,
    choose_rungs,
    decide,
    fit_cascade,
    fit_controller,
    fit_entry,
    frontier,
    offered,
    operating_point,
)
from apportion.control.complexity import Complexity
from apportion.control.policy import Policy
from apportion.deliver.adapted import Adapted, routed
from apportion.deliver.bundle import Bundle, Rung
from apportion.deliver.costs import Profile, mean_macs, mean_rung_macs, profile
from apportion.engine import COARSE, Backend, Lengths, Relay, build, lengths
from apportion.errors import ControlError, PlanError
from apportion.intake import KINDS, Feed, Parts, Samples, Source, Tokenise
from apportion.measure.doctor import device
from apportion.measure.forecast import forecast
from apportion.measure.outcomes import Look, measure_outcomes, relayed
from apportion.measure.outcomes import look as look_at
from apportion.methods.task import said, sureness
from apportion.network import Network, keep_bridges
from apportion.vocab import Ladder, Outcomes, Plan, Space

Tell = Callable[[str], None]
BATCH = 100  # rows at a time while tables are measured
CERTIFIED_BUDGETS = 9  # tested one after the other, from the full path's down to the one that was placed
TRIAL_ROWS = 500  # on which every candidate path is tried; the chosen few are measured on all rows


def choose_ladder(
    network: Network, reference: Network, samples: Samples, feed: Feed, plan: Plan, over: Profile, *, backend: Backend, buckets: Sequence[int], tell: Tell
) -> Ladder:
    """Try every candidate path on some samples and keep the few that are worth serving, in multiply-adds or in the plan's milliseconds."""
    trial = samples.rows(range(min(TRIAL_ROWS, len(samples))))
    every, glance = offered(network.space, plan.control, plan.glance), -1 if plan.control == "entry" else plan.glance
    tell(f"trying {len(every)} paths on {len(trial)} {KINDS[type(feed)][1]}")
    tried = sorted(every, key=lambda path: mean_macs(network, path, over))
    table = outcomes(network, Ladder(tuple(tried), glance), trial, feed, reference=reference, over=over)
    cost = table.cost
    if plan.search == "ms":
        example, _ = next(samples.rows([0]).batches(1, feed))
        times = forecast(network, tried, example, build=builder(backend), backend=backend, batches=(1, max(buckets)), tell=tell)
        tell(f"times foretold from {times.points} that were measured: {100 * times.error:.1f} % off on paths left out, {100 * times.worst:.1f} % at worst")
        ms = torch.tensor([times.ms(network, path, max(buckets)) for path in tried], dtype=cost.dtype)
        cost = ms / ms[-1]
    chosen = choose_rungs(table.quality.double().mean(0), cost, plan.rungs, quality=table.quality)
    return Ladder(tuple(tried[index] for index in sorted(chosen)), glance)  # cheapest first in multiply-adds: the table's order


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
    chosen: tuple[int, ...] = (),
    backend: Backend,
    buckets: Sequence[int],
    tell: Tell,
) -> tuple[Adapted, Outcomes]:
    """Choose the paths to serve (where no ladder is given), learn to decide between them, and find the operating point that holds the tolerance.

    `chosen`: lengths of text that graphs are built for, as in a bundle.
    """
    feed = source.fed
    over = profile(network, parts.place, feed, chosen)
    ladder = ladder or choose_ladder(network, reference, parts.decide, feed, plan, over, backend=backend, buckets=buckets, tell=tell)
    tell(f"learning to decide between {len(ladder.paths)} paths")
    one, _ = next(parts.decide.rows([0]).batches(1, feed))
    checkpoints = plan.control == "checkpoints"
    decision = 0 if plan.control != "glance" else decision_macs(network.glance(ladder.glance)(one)[1].shape[1], len(ladder.paths))

    every = served(network, ladder, feed, plan, chosen, backend=backend, tell=tell) if backend in COARSE else None
    first = 0

    def table(ladder: Ladder, part: Samples, decision: int) -> Outcomes:
        look = None if every is None else partial(every, first=first)
        return outcomes(network, ladder, part, feed, decision=decision, checkpoints=checkpoints, reference=reference, over=over, look=look)

    fitted, placed = table(ladder, parts.decide, decision), table(ladder, parts.place, decision)
    # The tolerance is against the model that was read, so what healing gave or took at full counts too.
    before = outcomes(reference, Ladder((reference.space.full,), 0), parts.place, feed)
    lost = 100 * (before.quality.double().mean() - placed.quality[:, -1].double().mean()).item()
    learn = {"glance": partial(learned, seed=plan.seed), "checkpoints": stopping, "entry": partial(entering, network.space, ladder)}[plan.control]
    first, controller, point = settle(fitted, placed, plan.tolerance - lost, learn=learn)
    ladder = Ladder(ladder.paths[first:], ladder.glance)
    keep_bridges(network, {(plan.glance, network.architecture.depth), *(run for path in ladder.paths for run in network.bridged(path))})
    tell(f"operating at {point.mean_cost:.3f} of the full path, on {len(ladder.paths)} paths")
    certificate = None
    if plan.confidence > 0:
        if parts.certify is None:
            raise PlanError(f"confidence {plan.confidence:g} and nothing to certify on", wanted="samples that nothing else saw", do="Give Parts some.")
        kept = outcomes(reference, Ladder((reference.space.full,), 0), parts.certify, feed).quality[:, 0]
        certificate = certified(table(ladder, parts.certify, controller.macs), kept, controller, plan, least=point.budget)
        tell(f"certified at {certificate.mean_cost:.3f} of the full path: at most {plan.tolerance:g} points lost, with confidence {plan.confidence:g}")
    gmacs = [each / 1e9 for each in mean_rung_macs(network, ladder, over, decision=controller.macs, checkpoints=checkpoints)]
    seen = table(ladder, parts.report, controller.macs)
    accuracy = seen.quality.double().mean(0).tolist()
    bundle = Bundle(
        network=network,
        ladder=ladder,
        controller=controller,
        preprocess=feed,
        plan=stated(plan, network),
        budget=point.budget if certificate is None else certificate.budget,
        rungs=tuple(Rung(g, a) for g, a in zip(gmacs, accuracy, strict=True)),
        frontier=tuple(frontier(controller, seen, torch.linspace(gmacs[0] / gmacs[-1] + 1e-3, 1.0, 12).tolist())),
        dense_gmacs=mean_macs(reference, reference.space.full, over) / 1e9,
        classes=named(tuple(source.classes or parts.report.classes), network.architecture.classes),
        certificate=certificate,
        lengths=chosen,
        provenance={
            "source": source.provenance,
            "made_on": device(),
            "rows": {"decide": len(parts.decide), "place": len(parts.place), "report": len(parts.report), "certify": len(parts.certify or ())},
        },
    )
    return Adapted(bundle, backend=backend, buckets=buckets), seen


def stated(plan: Plan, network: Network) -> Plan:
    """The plan with the runs of blocks for which maps stand, so that a bundle can be built again."""
    runs = " ".join(f"{first}-{last}" for first, last in network.bridge.runs)
    return replace(plan, choices=tuple(replace(each, options={**each.options, "runs": runs}) if each.name == "surrogate" else each for each in plan.choices))


def served(
    network: Network, ladder: Ladder, feed: Feed, plan: Plan, chosen: tuple[int, ...], *, backend: Backend, tell: Tell
) -> Callable[..., tuple[Tensor, Tensor]]:
    """What the graphs of a back-end that rounds answer, from a rung on: (inputs, first=) -> (sureness for a signal, logits (b, k, classes)).

    Raises PlanError where paths are decided for at a glance: what it sees would not be what it learned from.
    """
    if plan.control != "checkpoints":
        raise PlanError(f"back-end {backend!r} with control = {plan.control!r}", wanted='control = "checkpoints"', do="Set it in the plan.")
    tokens = (chosen or lengths(network.architecture.length)) if isinstance(feed, Tokenise) else (network.architecture.tokens,)
    engine = routed(network, ladder, Cascade(len(ladder.paths)), feed, dict.fromkeys(tokens, torch.zeros(len(ladder.paths))), backend=backend, buckets=(1,))
    assert isinstance(engine, Relay | Lengths)
    engine.warm(tell)

    def answers(inputs: Tensor, first: int) -> tuple[Tensor, Tensor]:
        logits = engine.every(inputs)[:, first:].float()
        return sureness(logits, network.architecture.task), logits

    return answers


def certified(table: Outcomes, before: Tensor, controller: Decider, plan: Plan, *, least: float) -> Certificate:
    """The cheapest budget from `least` on at which the drop against the network that was read, which is right where `before` (n,) says, is certified."""
    return certify(
        lambda budget: decide(controller, table, budget),
        table,
        tolerance_points=plan.tolerance,
        budgets=torch.linspace(least, float(table.cost[-1]), CERTIFIED_BUDGETS).tolist(),
        delta=1 - plan.confidence,
        reference=before,
    )


def settle(fitted: Outcomes, placed: Outcomes, tolerance: float, *, learn: Callable[[Outcomes, Outcomes], Decider]) -> tuple[int, Decider, OperatingPoint]:
    """The first rung to serve, a controller of those from it on, and the cheapest operating point that keeps the tolerance.

    With few rows to learn from, a poor cheapest rung tempts a controller more than it helps it; with one rung fewer below, the same budget goes further. The
    smallest budget of each choice sends everything to its cheapest rung, so static paths are among what is compared. A second controller learns on `placed`
    and is judged on `fitted`, so that all rows place the point and none judges what it taught. Raises ControlError where nothing holds.
    """
    rungs, found = torch.arange(len(fitted.cost)), list[tuple[int, Decider, OperatingPoint]]()
    for first in range(len(rungs) - 1):
        ours, theirs = fitted.columns(rungs[first:]), placed.columns(rungs[first:])
        controller, swapped = learn(ours, theirs), learn(theirs, ours)

        def choose(budget: float, taught: Outcomes = ours, kept: Outcomes = theirs, a: Decider = controller, b: Decider = swapped) -> Tensor:
            return torch.cat((decide(a, kept, budget), decide(b, taught, budget)))

        try:
            found.append((first, controller, operating_point(choose, joined(theirs, ours), tolerance)))
        except ControlError as error:
            if first == len(rungs) - 2 and not found:
                raise error
    return min(found, key=lambda choice: choice[2].mean_cost)


def learned(fit: Outcomes, held: Outcomes, *, seed: int) -> Controller:
    """A controller taught on `fit`, its probabilities and budgets made true on `held`."""
    return fit_controller(joined(fit, held), **_parts(fit, held), seed=seed)


def stopping(fit: Outcomes, held: Outcomes) -> Cascade:
    """Thresholds for checkpoints from `fit`, their budgets and probabilities made true on `held`."""
    return fit_cascade(joined(fit, held), **_parts(fit, held))


def entering(space: Space, ladder: Ladder, _: Outcomes, held: Outcomes) -> Entry:
    """Thresholds on how plain a picture is, placed on `held`, for the dearest rungs of the ladder, as many as the table has."""
    joined = [0 if path.entering is None else (space.tokens - path.entering) // 3 for path in ladder.paths]  # four patches become one token
    return fit_entry(held, joined[-len(held.cost) :])


def _parts(fit: Outcomes, held: Outcomes) -> dict[str, Tensor]:
    fit_rows, calibrate_rows = torch.arange(len(fit.quality) + len(held.quality)).split([len(fit.quality), len(held.quality)])
    return {"fit_rows": fit_rows, "calibrate_rows": calibrate_rows}


def outcomes(
    network: Network,
    ladder: Ladder,
    samples: Samples,
    feed: Feed,
    *,
    decision: int = 0,
    checkpoints: bool = False,
    reference: Network | None = None,
    over: Profile | None = None,
    look: Look | None = None,
) -> Outcomes:
    """The table of these samples along the paths of the ladder; costs are closed-form multiply-adds with those of deciding, as shares of the full path.

    `decision`: multiply-adds of the controller. Without labels, right is what `reference` answers, or where there is none the ladder's own full path.
    `over`: how texts are spread over lengths; costs are means over it. `look`: what answers, where the modules themselves do not.
    """
    if look is None:
        look = looked(network, ladder)
    cost = torch.tensor(mean_rung_macs(network, ladder, over, decision=decision, checkpoints=checkpoints), dtype=torch.float64)
    sizes = samples.sizes(feed)
    order = None if sizes is None else sizes.argsort(stable=True)  # texts of one length share a batch
    batches = (samples if order is None else samples.rows(order)).batches(BATCH, feed)
    a = network.architecture
    if samples.labels is None and reference is not None:
        batches = ((inputs, said(reference(inputs, reference.space.full), a.task)) for inputs, _ in batches)
    table = measure_outcomes(look, batches, cost=(cost / cost[-1]).float(), task=a.task, span=a.span)
    return table if order is None else table.rows(order.argsort())


def looked(network: Network, ladder: Ladder) -> Look:
    """What the modules themselves answer on every rung; exits of the full path share the work that they have in common."""
    glance, full = network.glance(ladder.glance), network.space.full
    ends = [ladder.glance, *(len(path.steps) for path in ladder.paths)]
    if all(path.same_start(full, len(path.steps)) for path in ladder.paths) and 0 <= ladder.glance and ends[1] and all(a <= b for a, b in pairwise(ends)):
        return relayed(glance, [network.station(first, last) for first, last in pairwise(ends)])
    return look_at(glance, [network.segment(ladder.glance, end, path) for path, end in zip(ladder.paths, ends[1:], strict=True)])


def decision_macs(features: int, rungs: int) -> int:
    """Multiply-adds of the controller that `fit_controller` will make of such a table."""
    return Complexity(features=features, rungs=rungs).macs + Policy(features=features, rungs=rungs).macs


def named(classes: tuple[str, ...], outputs: int) -> tuple[str, ...]:
    """A name for every output: its number where the data does not name it; none where nothing is named, or nothing has a class."""
    return (*classes, *map(str, range(len(classes), outputs))) if classes and outputs else ()


def joined(first: Outcomes, second: Outcomes) -> Outcomes:
    columns = {name: torch.cat((getattr(first, name), getattr(second, name))) for name in ("signal", "quality", "agree", "loss", "margin")}
    return Outcomes(**columns, cost=first.cost)
