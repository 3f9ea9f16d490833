"""The model as a user holds it: what it takes, what it answers, what it never spends."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path as File

import numpy as np
import pytest
import torch
from PIL import Image

from apportion.control.drift import Alarm
from apportion.deliver import Adapted
from apportion.deliver.adapted import load
from apportion.errors import BundleError, DataError, EngineError, NoEffect, PlanError
from apportion.measure.doctor import fingerprint
from apportion.vocab import Answer, Budget
from tests.rooms.test_deliver_bundle import made_up_bundle


@pytest.fixture(scope="module")
def model() -> Adapted:
    made = made_up_bundle()
    adapted = Adapted(replace(made, costs={}), backend="eager", buckets=(1, 4))
    assert adapted.warm() == 8  # decision and three rungs, at two buckets
    return adapted


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """Pictures from flat grey to loud noise: the controller learned to spend on noise."""
    rng = np.random.default_rng(0)
    contrast = np.linspace(2, 127, 11).reshape(-1, 1, 1, 1)
    return (128 + contrast * rng.uniform(-1, 1, (11, 8, 8, 3))).astype(np.uint8)


def timed(model: Adapted, rungs_ms: list[float], *, device: str | None = None) -> Adapted:
    """The same model with times for batch 1."""
    costs = {device or fingerprint(): {"rungs_ms": {"1": rungs_ms}}}
    return Adapted(replace(model.bundle, costs=costs), backend="eager", buckets=(1, 4), engine=model.engine)


def shares(model: Adapted) -> list[float]:
    return [rung.gmacs / model.bundle.rungs[-1].gmacs for rung in model.bundle.rungs]


def equal(first: Answer, second: Answer) -> None:
    assert torch.equal(first.path, second.path) and torch.equal(first.cost, second.cost)
    torch.testing.assert_close(first.logits, second.logits, atol=1e-5, rtol=1e-5)


def test_arrays_pictures_and_tensors_agree(model: Adapted, pixels: np.ndarray) -> None:
    one = model(pixels)
    equal(one, model([Image.fromarray(picture) for picture in pixels]))
    equal(one, model((torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - 0.5).div(0.25).contiguous()))
    assert one.logits.shape == (11, 3) and len(one.path.unique()) > 1


def test_answers_are_those_of_the_network_along_the_path_taken(model: Adapted, pixels: np.ndarray) -> None:
    bundle = model.bundle
    inputs, answer = bundle.preprocess(pixels), model(pixels)
    for row, rung in enumerate(answer.path.tolist()):
        torch.testing.assert_close(answer.logits[row], bundle.network(inputs[row : row + 1], bundle.ladder.paths[rung])[0], atol=1e-5, rtol=1e-5)
        assert answer.cost[row].item() == pytest.approx(bundle.rungs[rung].gmacs)


def test_alone_as_in_company(model: Adapted, pixels: np.ndarray) -> None:
    together = model(pixels, "0.9x")
    alone = [model(pixels[row : row + 1], "0.9x") for row in range(len(pixels))]
    equal(together, Answer(*(torch.cat(parts) for parts in zip(*alone, strict=True))))


@pytest.mark.parametrize("bad", [np.zeros((2, 8, 8, 3), np.float32), np.zeros((8, 8, 3), np.uint8), np.zeros((2, 8, 8, 1), np.uint8)])
def test_arrays_of_another_kind_are_data_errors(model: Adapted, bad: np.ndarray) -> None:
    with pytest.raises(DataError, match="images of shape"):
        model(bad)


def test_bytes_in_a_tensor_and_no_input_are_engine_errors(model: Adapted) -> None:
    for bad in (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, 3, 16, 16), torch.zeros(0, 3, 8, 8)):
        with pytest.raises(EngineError, match="inputs of shape"):
            model(bad)


def test_a_larger_budget_buys_more(model: Adapted, pixels: np.ndarray) -> None:
    cheapest = shares(model)[0]
    spent = [model(pixels, f"{budget}x").cost.mean().item() for budget in (cheapest, 0.9, 1.0)]
    assert spent[0] < spent[1] < spent[2]
    assert (model(pixels, 5).path == 2).all()  # more than all there is
    equal(model(pixels), model(pixels, model.bundle.budget))  # nothing said: the operating point


def test_a_cap_is_never_passed(model: Adapted, pixels: np.ndarray) -> None:
    full, own = model.bundle.rungs[-1].gmacs, shares(model)
    seen = set()
    # Just below and just above each path's share, where the controller's own cost decides; between, and the cheapest share itself.
    for share in (own[0], own[1] - 1e-5, own[1] + 1e-5, (own[0] + own[1]) / 2, 1 - 1e-5, 1.0):
        answer = model(pixels, Budget(share, cap=True))
        assert answer.cost.max().item() <= share * full * (1 + 1e-6), share
        seen.add(answer.path.max().item())
    assert seen == {0, 1, 2}  # and what a cap allows is used
    assert model(pixels, "<0.99x").cost.max() <= 0.99 * full < model(pixels, "1x").cost.max()


def test_caps_hold_also_for_a_controller_that_thinks_paths_cheaper(model: Adapted, pixels: np.ndarray) -> None:
    dear = replace(model.bundle, rungs=tuple(replace(rung, gmacs=rung.gmacs + model.bundle.rungs[-1].gmacs) for rung in model.bundle.rungs))
    adapted = Adapted(dear, backend="eager", buckets=(1, 4), engine=model.engine)
    share = (shares(adapted)[0] + shares(adapted)[1]) / 2
    assert share > shares(model)[1]  # by the controller's own costs the second path would do
    assert (adapted(pixels, Budget(share, cap=True)).path == 0).all()


def test_gmacs_are_a_share_of_the_full_path(model: Adapted) -> None:
    full = model.bundle.rungs[-1].gmacs
    assert model.shares(f"{0.9 * full:.12f}GMACs")[0] == pytest.approx(0.9)
    assert model.shares(f"<{0.999 * full:.12f}GMACs") == (1.0, pytest.approx(float(model.bundle.controller.cost[1])))


def test_milliseconds_need_a_table_of_this_device(model: Adapted, pixels: np.ndarray) -> None:
    for other in (model, timed(model, [1.0, 2.0, 4.0], device="another")):
        with pytest.raises(BundleError, match="apportion bench"):
            other(pixels, "2ms")
    here = timed(model, [1.0, 2.0, 4.0])
    own = shares(here)
    assert here.shares("2ms")[0] == pytest.approx(own[1])
    assert here.shares("3ms")[0] == pytest.approx((own[1] + 1) / 2)
    assert here.shares("99ms") == (1.0, float("inf"))
    assert (here(pixels, "<2ms").path <= 1).all() and (here(pixels, "<1.99ms").path == 0).all()


def test_a_cheaper_path_that_is_slower_here_is_not_taken_for_a_faster_one(model: Adapted, pixels: np.ndarray) -> None:
    here = timed(model, [1.0, 5.0, 4.0])
    assert (here(pixels, "<4.5ms").path == 0).all()  # the second takes 5 ms
    assert here.shares("<5ms")[1] == float(here.bundle.controller.cost[2])


@pytest.mark.parametrize("budget", ["0.01x", "<0.01x", "1e-12GMACs", "0.5ms", "<0.5ms"])
def test_out_of_reach_is_refused(model: Adapted, pixels: np.ndarray, budget: str) -> None:
    with pytest.raises(PlanError, match="the cheapest path"):
        timed(model, [1.0, 2.0, 4.0])(pixels, budget)


@pytest.mark.parametrize("budget", ["fast", "-1x", "0", "nan", "2 hours"])
def test_nonsense_is_refused(model: Adapted, pixels: np.ndarray, budget: str) -> None:
    with pytest.raises(PlanError, match="budget"):
        model(pixels, budget)


def test_the_frontier_has_every_path_and_every_budget(model: Adapted) -> None:
    bundle, places = model.bundle, model.frontier()
    assert [place.name for place in places[:3]] == [path.name for path in bundle.ladder.paths]
    assert [(place.gmacs, place.accuracy) for place in places[:3]] == [(rung.gmacs, rung.accuracy) for rung in bundle.rungs]
    assert [place.name for place in places[3:]] == ["controller at 0.75x", "controller at 0.90x", "controller at 1.00x"]
    assert all(place.latency_ms is None for place in places)
    here = timed(model, [1.0, 2.0, 4.0]).frontier()
    assert [place.latency_ms for place in here[:3]] == [1.0, 2.0, 4.0]
    share = bundle.frontier[1]["share"]
    assert here[4].latency_ms == pytest.approx(share[0] + 2 * share[1] + 4 * share[2])


def test_an_alarm_hears_of_every_path_and_changes_no_answer(model: Adapted, pixels: np.ndarray) -> None:
    mixed = np.tile(pixels, (6, 1, 1, 1))[np.random.default_rng(0).permutation(66)]
    alarm = Alarm.start(model(mixed, "0.9x").path, rungs=3, run_length=100)
    usual, other = model.watch(alarm, "0.9x"), model.watch(alarm, "0.9x")
    for part in np.split(mixed, 6):
        equal(usual(part), model(part, "0.9x"))
        other(pixels[-1:].repeat(11, 0))  # nothing but loud noise
    assert not usual.drifted and usual.alarm.count == other.alarm.count == 66
    assert other.drifted and other.alarm.raised_at is not None and alarm.count == 0
    assert torch.equal(usual.alarm.seen, alarm.after(model(mixed, "0.9x").path).seen)
    with pytest.raises(PlanError, match="an alarm on 4 rungs"):
        model.watch(Alarm.start(model(mixed).path, rungs=4))


@pytest.fixture
def compiler_closed() -> Iterator[None]:
    """From here on, a new graph is an error."""
    with torch.compiler.set_stance("fail_on_recompile"):
        yield


def test_no_graph_is_built_after_the_first(model: Adapted, pixels: np.ndarray, compiler_closed: None) -> None:
    heard: list[str] = []
    assert model.warm(heard.append) == model.engine.wanted == 8 and not heard
    for count in (1, 2, 3, 4, 5, 11):
        for budget in (None, "0.8x", "<0.9x"):
            assert len(model(pixels[:count], budget).path) == count


@pytest.mark.slow
def test_a_second_start_finds_its_graphs_again(tmp_path: File, pixels: np.ndarray) -> None:
    pytest.importorskip("openvino")
    made_up = Adapted(replace(made_up_bundle(), costs={}), backend="eager", buckets=(1, 4))
    made_up.save(tmp_path / "bundle")
    first = load(tmp_path / "bundle", backend="openvino", buckets=(1, 4), cache=tmp_path / "cache")
    wanted = first(pixels)
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()}
    second = load(tmp_path / "bundle", backend="openvino", buckets=(1, 4), cache=tmp_path / "cache")
    equal(second(pixels), wanted)
    assert kept and {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()} == kept
    with pytest.raises(NoEffect, match="cache"):
        load(tmp_path / "bundle", backend="eager", cache=tmp_path / "cache").warm()
