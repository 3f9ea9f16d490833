"""Which back-end is taken, on planted ones and on real ones, and where bytes are."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path as File
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from apportion import verbs
from apportion.deliver import ranking, weighing
from apportion.deliver.adapted import load
from apportion.deliver.page import ledger
from apportion.deliver.ranking import EXACT, made_up, rank
from apportion.deliver.weighing import typical
from apportion.engine import COARSE, Graph
from apportion.errors import EngineError
from apportion.intake import ImageSet, Preprocess
from apportion.measure.doctor import fingerprint
from apportion.measure.memory import memory
from apportion.network import Architecture, Network
from apportion.vocab import Plan
from tests.conftest import images, tiny
from tests.test_cli import painted, shell, small


def planted(speed: dict[tuple[str, int], float], wrong: str = "") -> Any:
    """Builds by pausing: (back-end, batch) -> seconds; the others are not installed."""

    def build(module: nn.Module, example: tuple[Any, ...], *, backend: str, name: str) -> Graph:
        batch = len(example[0])
        if (backend, batch) not in speed:
            raise EngineError(f"no package {backend}", wanted="it", do="Install it.")

        def run(inputs: Tensor) -> Tensor:
            time.sleep(speed[backend, batch])
            return module(inputs) + (backend == wrong)

        return Graph(run, 0)

    return build


SPEED = {("inductor", 1): 0.02, ("inductor", 4): 0.004, ("eager", 1): 0.004, ("eager", 4): 0.008, ("openvino", 1): 0.0, ("openvino", 4): 0.0}


def test_the_fastest_that_agrees_is_taken_over_both_batch_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "build", planted(SPEED, wrong="openvino"))
    told = list[str]()
    found = rank(tiny(), images(4), repeats=5, tell=told.append)
    assert found.backend == "eager"  # behind at batch 4, further ahead at batch 1
    assert [[trial.backend for trial in trials] for trials in found.trials.values()] == [
        ["eager", "inductor", "aotinductor", "cudagraphs", "openvino", "onnxruntime"],
        ["inductor", "eager"],
    ]
    assert any("answers differ" in text for text in told) and any("no package onnxruntime" in text for text in told) and told[-1] == "back-end: eager"
    assert all("\n" not in text for text in told) and len(told) == 2 + 6 + 2 + 1
    plain = json.loads(json.dumps(found.plain(), allow_nan=False))
    assert plain["backend"] == "eager" and [row["batch"] for row in plain["trials"]] == [1, 1, 1, 1, 1, 1, 4, 4]
    assert [row["ms"] is None for row in plain["trials"]] == [False, False, True, True, True, True, False, False]


def test_a_lead_within_the_noise_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "build", planted({(name, batch): 0.002 for name in EXACT for batch in (1, 4)}))
    found = rank(tiny(), images(4), repeats=7, tell=lambda text: None)
    tied = all(trial.slower is not None and trial.slower.low <= 1 for trials in found.trials.values() for trial in trials)
    assert not tied or found.backend == EXACT[0]


def test_none_that_agrees_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "build", planted({("eager", 1): 0.0, ("eager", 4): 0.0}, wrong="eager"))
    with pytest.raises(EngineError, match="answers differ"):
        rank(tiny(), images(4), tell=lambda text: None)
    assert not set(EXACT) & set(COARSE)


def test_inputs_to_time_on() -> None:
    feed, pictures = Preprocess(16, (0.5,) * 3, (0.25,) * 3), np.random.default_rng(0).integers(0, 255, (3, 16, 16, 3), dtype=np.uint8)
    assert typical(tiny(), ImageSet(pictures, None, ()), feed, 5).shape == (5, 3, 16, 16)  # few are repeated
    assert torch.equal(made_up(tiny(), 2), made_up(tiny(), 2)) and made_up(tiny(), 2).shape == (2, 3, 16, 16)
    table = Network(Architecture(0, 0, 16, 1, 2, 32, 2, numbers=2, categories=(2, 5)))
    rows = made_up(table, 90)
    assert rows.shape == (90, 4) and [rows[:, column].unique().tolist() for column in (2, 3)] == [[0, 1], [0, 1, 2, 3, 4]]
    assert table(rows, table.space.full).isfinite().all()
    drawn = made_up(Network(Architecture(0, 0, 16, 1, 2, 32, 2, words=7, length=40, padding=3, positions=40)), 90)
    assert drawn.shape == (90, 40) and set(drawn.unique().tolist()) == {0, 1, 2, 4, 5, 6}


def test_memory_as_people_see_it() -> None:
    network = tiny()
    held = memory([network], [1000], lambda: network(images(2), network.space.full), batch=2)
    shown = ledger({**weighing.asdict(held), "how": dict(held.how)})
    by = {row.name: row for row in shown}
    assert by["weights, once for all paths"].bytes == sum(p.nbytes for p in (*network.parameters(), *network.buffers()))
    assert by["copies of them in graphs"].bytes == 1000 and by["activations, a batch of 2"].bytes == held.activation_bytes > 0
    assert "on the GPU" not in by or torch.cuda.is_available()
    assert len(ledger({**weighing.asdict(replace(held, process_peak_bytes=None, device_peak_bytes=None)), "how": dict(held.how)})) == 3


def test_doctor_ranks_back_ends_on_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    network = tiny()
    monkeypatch.setattr(verbs, "read_model", lambda model, **options: type("Source", (), {"network": network}))
    monkeypatch.setattr("apportion.measure.doctor.device", lambda: {"cpu": "one", "advice": []})
    monkeypatch.setattr(ranking, "build", planted(SPEED, wrong="openvino"))
    found = shell("doctor", "--model", "timm:any", "--batch", 4, "--repeats", 3, "--json")
    said = json.loads(found.stdout)
    assert found.exit_code == 0 and said["cpu"] == "one" and said["backends"]["backend"] == "eager" and "· eager, batch 4" in found.stderr
    table = shell("doctor", "--model", "timm:any", "--batch", 4, "--repeats", 3).stdout
    assert "back-ends on timm:any: eager" in table and "no package onnxruntime" in table


@pytest.mark.slow
def test_real_back_ends_are_ranked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "EXACT", ("eager", "onnxruntime"))
    found = rank(tiny(), images(4), repeats=3, tell=lambda text: None)
    for trials in found.trials.values():
        assert all((trial.distance is not None and trial.distance < 1e-5) is not bool(trial.out) for trial in trials)
    assert {trial.backend for trial in found.trials[1] if not trial.out} == {"eager", *(["onnxruntime"] if find_spec("onnxruntime") else [])}


@pytest.mark.slow
def test_auto_measures_takes_and_keeps_the_reasons(tmp_path: File, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "EXACT", ("eager",))
    data, out, told, here = painted(tmp_path / "data", 40, labels=True), tmp_path / "out", list[str](), fingerprint()
    options: dict[str, Any] = {"backend": "auto", "buckets": (4,), "repeats": 2, "tell": told.append}
    feed = Preprocess(32, (0.5,) * 3, (0.25,) * 3)
    weighed = verbs.adapt(small(), str(data), preprocess=feed, plan=Plan(rungs=3, tolerance=60.0, glance=1, never_slower=False), out=out, **options)
    chosen = weighed.figures["backends"]
    assert [row["batch"] for row in chosen["trials"]] == [1, 4] and all(row["distance"] < 1e-5 for row in chosen["trials"])
    assert weighed.adapted.backend == chosen["backend"] == "eager" and "back-end: eager" in told
    bundle = load(out, backend="eager").bundle
    assert bundle.provenance["backends"] == chosen and bundle.costs[here]["backend"] == chosen["backend"] and fingerprint() == here
    held = weighed.figures["memory"]
    assert held["activation_bytes"] == weighed.figures["peak_bytes"]["adaptive"] and held["batch"] == 4 and held["weight_bytes"] > 0
    assert 'id="memory"' in (out / "report.html").read_text() and json.loads((out / "report.json").read_text())["figures"]["memory"] == held
    again = verbs.bench(out, str(data), **options)
    assert load(out, backend="eager").bundle.provenance["backends"] == again.figures["backends"]
