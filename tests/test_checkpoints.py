"""Leaving on the way, from `adapt` to the answer of a bundle that was read back: on images and on texts."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path as File

import numpy as np
import pytest
import torch
from PIL import Image

from apportion import verbs
from apportion.control import Cascade
from apportion.deliver.adapted import load
from apportion.deliver.costs import rung_macs
from apportion.errors import ControlError, EngineError, PlanError
from apportion.intake import Preprocess
from apportion.measure.macs import executed_macs
from apportion.methods import ops
from apportion.vocab import Choice, Plan
from tests.rooms.test_deliver_bundle import rewrite, toml
from tests.test_cli import eager, painted, small

PLAN = Plan(control="checkpoints", rungs=3, tolerance=60.0, glance=1, never_slower=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[verbs.Weighed, File, np.ndarray]:
    folder = tmp_path_factory.mktemp("checkpoints")
    data = painted(folder / "data", 40, labels=True)
    weighed = eager(small(), data, folder / "out", plan=PLAN)
    return weighed, folder, np.stack([np.asarray(Image.open(file)) for file in sorted(data.rglob("*.png"))[:17]])


@pytest.mark.slow
def test_every_answer_is_that_of_the_exit_where_its_margin_was_enough(whole: tuple[verbs.Weighed, File, np.ndarray]) -> None:
    weighed, folder, pixels = whole
    model = load(folder / "out", backend="eager", buckets=(1, 4))
    bundle, controller = model.bundle, model.bundle.controller
    assert isinstance(controller, Cascade)
    inputs, last = bundle.preprocess(pixels), len(bundle.ladder.paths) - 1
    exits = torch.stack([bundle.network(inputs, path) for path in bundle.ladder.paths], 1)
    for budget in (float(controller.cost[0]) + 1e-4, 0.7, 0.9, 1.0):
        limits = controller.limits(*controller.setting(budget=budget))
        chosen = [next((k for k in range(last) if row[k] >= limits[k]), last) for row in ops.margin(exits)]
        for answer in (model(pixels, f"{budget}x"), weighed.adapted(pixels, f"{budget}x")):
            assert answer.path.tolist() == chosen
            torch.testing.assert_close(answer.logits, exits[torch.arange(17), answer.path], atol=1e-5, rtol=1e-5)
    assert model(pixels, 1.0).path.tolist() == [last] * 17  # exact at full: nobody leaves
    alone = torch.cat([model(pixels[row : row + 1], 0.9).path for row in range(17)])
    assert torch.equal(alone, model(pixels, 0.9).path)
    capped = model(pixels, f"<{float(controller.cost[1]) + 1e-4}x")
    assert int(capped.path.max()) <= 1


@pytest.mark.slow
def test_what_is_charged_is_what_runs(whole: tuple[verbs.Weighed, File, np.ndarray]) -> None:
    """Stretch by stretch, every answer on the way included."""
    bundle = whole[0].adapted.bundle
    network, ladder = bundle.network, bundle.ladder
    charged = rung_macs(network, ladder, network.architecture.tokens, decision=0, checkpoints=True)
    given: object = torch.randn(1, 3, 32, 32)
    spent, before = 0, 0
    for rung, path in enumerate(ladder.paths):
        station = network.station(before, len(path.steps))
        spent += executed_macs(partial(station, given))
        given, before = station(given)[0], len(path.steps)
        assert spent == charged[rung] and bundle.rungs[rung].gmacs == pytest.approx(spent / 1e9)


@pytest.mark.slow
def test_report_and_bench_know_of_it(whole: tuple[verbs.Weighed, File, np.ndarray]) -> None:
    weighed, folder, _ = whole
    assert sum(weighed.figures["share"]) == pytest.approx(1.0) and weighed.figures["graphs"] == 2 * len(weighed.adapted.bundle.ladder.paths)
    assert weighed.figures["bounds"]["information"] is None or weighed.figures["bounds"]["information"] <= 1.0
    assert "checkpoint" in (folder / "out" / "report.html").read_text()
    again = verbs.bench(folder / "out", str(folder / "data"), backend="eager", buckets=(1, 4), repeats=3)
    for name in ("accuracy_adaptive", "gmacs_adaptive", "share"):
        assert again.figures[name] == pytest.approx(weighed.figures[name])


@pytest.mark.slow
def test_a_bundle_whose_parts_do_not_fit_is_refused(whole: tuple[verbs.Weighed, File, np.ndarray]) -> None:
    folder = whole[1] / "out"
    rewrite(folder, "plan.toml", toml(lambda data: data["plan"].update(control="glance")))
    with pytest.raises(PlanError, match="control = 'glance'"):
        load(folder)
    rewrite(folder, "plan.toml", toml(lambda data: data["plan"].update(control="checkpoints")))
    assert load(folder).bundle.plan.control == "checkpoints"


@pytest.mark.slow
def test_where_every_block_runs_there_is_nothing_to_leave(tmp_path: File) -> None:
    plan = replace(PLAN, choices=(Choice("ffn", "matformer"),))
    with pytest.raises(ControlError, match="whose blocks all run"):
        eager(small(), painted(tmp_path, 40, labels=True), plan=plan)


@pytest.mark.slow
def test_what_rounds_is_measured_through_its_own_graphs(tmp_path: File) -> None:
    """Products in 8 bits answer otherwise than the modules: the tables are those of the graphs that serve, to the last sample."""
    pytest.importorskip("onnxruntime")
    data, network = painted(tmp_path / "data", 40, labels=True), small()
    int8 = {"preprocess": Preprocess(32, (0.5,) * 3, (0.25,) * 3), "backend": "onnxruntime-int8", "repeats": 2}
    with pytest.raises(PlanError, match='control = "checkpoints"'):
        verbs.adapt(small(), str(data), plan=replace(PLAN, control="glance"), buckets=(1,), **int8)  # pyright: ignore
    with pytest.raises(EngineError, match="one sample at a time"):
        verbs.adapt(small(), str(data), plan=PLAN, buckets=(1, 4), **int8)  # pyright: ignore
    weighed = verbs.adapt(network, str(data), plan=PLAN, buckets=(1,), **int8)  # pyright: ignore
    adapted, figures = weighed.adapted, weighed.figures
    assert figures["served"] == {"same_path": 1.0, "accuracy": figures["accuracy_adaptive"]}
    inputs = adapted.bundle.preprocess([Image.open(file) for file in sorted(data.rglob("*.png"))[:9]])
    whole, plain = adapted(inputs, 1.0).logits, adapted.bundle.network(inputs, adapted.bundle.ladder.paths[-1])
    assert not torch.allclose(whole, plain, rtol=1e-3, atol=1e-3) and torch.cosine_similarity(whole.flatten(), plain.flatten(), dim=0) > 0.8  # rounded
    torch.testing.assert_close(torch.cat([adapted(row[None], 1.0).logits for row in inputs]), whole, rtol=0, atol=0)  # alone as in company
