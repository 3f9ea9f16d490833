"""A decision before the tokeniser: plain pictures enter as fewer tokens, by one threshold for each budget, in control, network, engine and bundle alike."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from apportion.control import Entry, decide, fit_entry, frontier, offered
from apportion.control.entry import first_that_suffices, least
from apportion.deliver import Bundle
from apportion.deliver.adapted import Adapted, load
from apportion.deliver.bundle import Rung
from apportion.deliver.bundle import save as write_bundle
from apportion.deliver.deciding import entering
from apportion.errors import ApportionError, ControlError, PathError, PlanError
from apportion.intake import Preprocess
from apportion.network import Network, coarse
from apportion.verbs import with_method
from apportion.vocab import Ladder, Outcomes, Plan
from tests.conftest import images, shake, tiny

LEVEL = 0.02
caught = pytest.raises(AssertionError)


def pictures(count: int, *, seed: int = 0) -> Tensor:
    """Each with its own number of plain cells, from none to all four."""
    inputs, generator = images(count, seed=seed), torch.Generator().manual_seed(seed)
    plain = torch.rand(count, 1, 2, 2, generator=generator) < torch.rand(count, 1, 1, 1, generator=generator)
    return torch.where(plain.repeat_interleave(8, 2).repeat_interleave(8, 3), 0.02 * inputs, inputs)


def adaptive() -> Network:
    network = tiny()
    coarse(network, LEVEL)
    shake(network.tokeniser.add)
    shake(network.tokeniser.join)
    return network.requires_grad_(False)


def ladder_of(network: Network) -> Ladder:
    return Ladder(tuple(offered(network.space, "entry", 0)), -1)


def table_of(network: Network, inputs: Tensor) -> Outcomes:
    ladder = ladder_of(network)
    glance = network.glance(-1)
    cost = torch.tensor([float(network.macs(path) + glance.macs()) for path in ladder.paths])
    logits = torch.stack([network(inputs, path) for path in ladder.paths], 1)
    quality = (logits.argmax(-1) == logits[:, -1:].argmax(-1)).float()
    return Outcomes(glance(inputs)[1], quality, quality.bool(), 1 - quality, logits.softmax(-1).amax(-1), cost / cost[-1])


@pytest.fixture(scope="module")
def network() -> Network:
    return adaptive()


@pytest.fixture(scope="module")
def table(network: Network) -> Outcomes:
    return table_of(network, pictures(200))


@pytest.fixture(scope="module")
def entry(network: Network, table: Outcomes) -> Entry:
    return entering(network.space, ladder_of(network), table, table)


@pytest.fixture(scope="module")
def bundle(network: Network, table: Outcomes, entry: Entry) -> Bundle:
    ladder, shared = ladder_of(network), network.glance(-1).macs()
    gmacs = [(network.macs(path) + shared) / 1e9 for path in ladder.paths]
    return Bundle(
        network=network,
        ladder=ladder,
        controller=entry,
        preprocess=Preprocess(16, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
        plan=Plan(choices=(), control="entry"),
        budget=0.8,
        rungs=tuple(Rung(g, float(a)) for g, a in zip(gmacs, table.quality.double().mean(0), strict=True)),
        frontier=tuple(frontier(entry, table, [0.75, 1.0])),
        dense_gmacs=network.macs(network.space.full) / 1e9,
    )


def check_needed(choose) -> None:
    """By the definition: the first rung whose tokens are as many as the picture needs at this threshold."""
    network, inputs = adaptive(), pictures(60, seed=3)
    paths, joins = ladder_of(network).paths, torch.tensor([4, 3, 2, 1, 0])
    signal = network.glance(-1)(inputs)[1]
    assert (signal == network.tokeniser.entropy(inputs)).all() and [path.entering for path in paths] == [5, 8, 11, 14, None]
    for bits in (0.0, 2.0, 4.0, 5.0, 5.5, 9.0):
        needed = network.tokeniser.needed(inputs, bits).tolist()
        wanted = [next(k for k, path in enumerate(paths) if (path.entering or 17) >= tokens) for tokens in needed]
        assert choose(least(signal, joins), torch.tensor(bits)).tolist() == wanted
    assert len(set(wanted)) == 1


def test_the_rung_is_the_cheapest_whose_tokens_suffice():
    check_needed(first_that_suffices)


def test_a_rung_that_is_a_cell_short_is_caught():
    with caught:
        check_needed(lambda least, bits: (first_that_suffices(least, bits) - 1).clamp_min(0))


def test_tokens_and_multiply_adds_fall_as_the_threshold_rises(network: Network):
    inputs, paths = pictures(60, seed=4), ladder_of(network).paths
    hardest = least(network.glance(-1)(inputs)[1], torch.tensor([4, 3, 2, 1, 0]))
    macs, before = torch.tensor([network.macs(path) for path in paths]), torch.full((60,), 4)
    assert (macs.diff() > 0).all()
    totals = []
    for bits in torch.linspace(0, 8.5, 18):
        rung = first_that_suffices(hardest, bits)
        assert (rung <= before).all()
        before = rung
        totals.append(int(macs[rung].sum()))
    assert totals == sorted(totals, reverse=True) and totals[0] == 60 * int(macs[-1]) and totals[-1] == 60 * int(macs[0]) and len(set(totals)) > 3


def test_budgets_are_kept_and_spent(table: Outcomes, entry: Entry):
    spent = []
    for budget in torch.linspace(float(table.cost[0]), 1.0, 15).tolist():
        choice = decide(entry, table, budget)
        spent.append(float(table.cost[choice].double().mean()))
        assert spent[-1] <= budget + 1e-6
    assert spent == sorted(spent) and spent[-1] == 1.0
    dearest = max(step for step in torch.tensor(spent).diff().tolist())
    assert dearest < 0.15  # no budget is far above what it buys
    assert (decide(entry, table, float(table.cost[0])) == 0).all() and (decide(entry, table, 1.0) == 4).all()
    assert entry.chosen(table, 1.0, cap=float(table.cost[2])).max() == 2
    with pytest.raises(ControlError):
        entry.chosen(table, 0.9 * float(table.cost[0]))


def test_rungs_that_do_not_differ_in_what_they_join_are_refused(table: Outcomes):
    for joins in ([4, 3, 2, 1, 1], [3, 4, 2, 1, 0], [4, 3, 2, 0], [5, 3, 2, 1, 0]):
        with pytest.raises(ControlError, match="join"):
            fit_entry(table, joins)


@pytest.mark.slow
def test_the_engine_decides_and_answers_as_the_modules_do_alone_as_in_company(bundle: Bundle, network: Network):
    model, inputs = Adapted(bundle, backend="eager", buckets=(1, 4)), pictures(11, seed=5)
    budget = torch.tensor(0.8)
    wanted = bundle.controller(network.glance(-1)(inputs)[1], budget, torch.tensor(math.inf))
    answer = model(inputs)
    assert torch.equal(answer.path, wanted) and len(wanted.unique()) > 2
    paths = bundle.ladder.paths
    for row, rung in enumerate(wanted.tolist()):
        assert_close(answer.logits[row], network(inputs[row : row + 1], paths[rung])[0], rtol=1e-4, atol=1e-5)
        alone = model(inputs[row : row + 1])
        assert alone.path.item() == rung
        assert_close(alone.logits[0], answer.logits[row], rtol=1e-4, atol=1e-5)
    full = model(inputs, budget="1x")
    assert (full.path == 4).all()
    assert_close(full.logits, tiny()(inputs, tiny().space.full), rtol=1e-5, atol=1e-5)


def test_every_path_is_charged_with_the_look(network: Network):
    from apportion.deliver.costs import rung_macs

    ladder, look = ladder_of(network), 4 * 16 * 16 + 256 * 4
    assert network.glance(-1).macs() == look
    assert rung_macs(network, ladder, 17, decision=0, checkpoints=False) == [network.macs(path) + look for path in ladder.paths]


@pytest.mark.slow
def test_a_bundle_comes_back_as_it_was(bundle: Bundle, tmp_path):
    write_bundle(bundle, tmp_path / "made")
    back, inputs = load(tmp_path / "made", backend="eager", buckets=(4,)), pictures(9, seed=6)
    assert isinstance(back.bundle.controller, Entry) and back.bundle.ladder == bundle.ladder and back.bundle.plan == bundle.plan
    ours, theirs = Adapted(bundle, backend="eager", buckets=(4,))(inputs), back(inputs)
    assert torch.equal(ours.path, theirs.path) and torch.equal(ours.logits, theirs.logits)
    text = (tmp_path / "made" / "ladder.json").read_text()
    assert '"glance": -1' in text
    with pytest.raises(ApportionError):
        write_bundle(replace(bundle, plan=Plan(choices=(), control="checkpoints")), tmp_path / "other")


def test_what_cannot_be_decided_before_the_tokeniser_is_refused():
    with pytest.raises(PathError, match="before the tokeniser"):
        tiny().glance(-1)
    with pytest.raises(ControlError, match="all tokens"):
        offered(tiny().space, "entry", 0)
    with pytest.raises(PlanError, match="Sequential"):
        coarse(tiny("conv_stem"), LEVEL)
    plan = with_method(Plan(), "apt")
    assert plan.control == "entry" and plan.choices == ()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["inductor", "openvino", "onnxruntime"])
def test_compiled_graphs_decide_alike(bundle: Bundle, backend):
    inputs = pictures(4, seed=7)
    wanted, found = (Adapted(bundle, backend=name, buckets=(4,))(inputs) for name in ("eager", backend))
    assert torch.equal(wanted.path, found.path)
    assert_close(wanted.logits, found.logits, rtol=1e-3, atol=1e-4)
