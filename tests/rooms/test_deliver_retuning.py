"""Batch sizes from traffic: none better, built before they serve, nothing lost meanwhile; and a back-end that is chosen when a bundle is loaded."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path as File
from threading import Event, Thread
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from apportion.control import Cascade
from apportion.deliver import Bundle, ranking, retuning
from apportion.deliver.adapted import Adapted, load
from apportion.deliver.bundle import save as write_bundle
from apportion.deliver.retuning import call_rows, chosen, pieces
from apportion.engine import CALL_ROWS, Build, Graph, Lengths, Relay, build, plain
from apportion.engine.buckets import split
from apportion.errors import BundleError, EngineError
from apportion.measure.doctor import fingerprint
from apportion.vocab import Ladder
from tests.rooms.test_deliver_bundle import made_up_bundle, rewrite
from tests.rooms.test_deliver_weighing import SPEED, planted
from tests.test_cli import shell

TRAFFIC = {1: 5, 3: 40, 6: 9, 11: 20, 12: 1}


def relayed() -> Bundle:
    """The same network with an answer at every block."""
    made = made_up_bundle()
    paths = tuple(made.network.space.path(blocks=range(depth)) for depth in (1, 2, 3))
    plan = replace(made.plan, control="checkpoints")
    return replace(made, ladder=Ladder(paths, 1), controller=Cascade(3), plan=plan, frontier=(), costs={})


def inputs(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 3, 8, 8, generator=generator) * torch.linspace(0.2, 3, count).view(-1, 1, 1, 1)


class Counting:
    """Builds, and says what it built; `stop` is called before each."""

    def __init__(self, make: Build = plain) -> None:
        self.names, self.stop, self.make = list[str](), lambda: None, make

    def __call__(self, module: nn.Module, example: tuple[Any, ...], /, *, backend: Any, name: str) -> Graph:
        self.stop()
        self.names.append(name)
        return self.make(module, example, backend=backend, name=name)


def model(bundle: Bundle, make: Counting) -> Adapted:
    made = Adapted(replace(bundle, costs={}), backend="eager", buckets=(1, 8))
    made.engine = made.built("eager", make=make)
    made.warm()
    return made


@pytest.mark.parametrize("call", [0.1, 0.5, 7.0])
def test_no_other_sizes_cost_less(call: float) -> None:
    def cost(sizes: tuple[int, ...]) -> float:
        prices = [size + call for size in sizes]
        return sum(often * sum(size + call for size in split(group, sizes, prices)) for group, often in TRAFFIC.items())

    found = chosen(TRAFFIC, (1, 8), sizes=2, largest=12, call=call)
    best = min(cost(some) for count in (1, 2) for some in combinations(range(1, 13), count))
    assert cost(found.after) == pytest.approx(best) and found.groups == 75
    assert found.saved == pytest.approx(1 - best / cost((1, 8))) and found.saved > 0
    fewer = chosen(TRAFFIC, (1, 8), sizes=1, largest=8, call=call)
    assert len(fewer.after) == 1 and max(fewer.after) <= 8


def test_large_groups_come_in_pieces() -> None:
    assert pieces({100: 2, 32: 1, 5: 3}, 32) == {32: 7, 4: 2, 5: 3} and pieces({64: 1}, 32) == {32: 2}
    assert chosen({10_000: 1}, (1, 8, 32), sizes=3, largest=32, call=0.5).after == (16, 32)
    for wrong in ({}, {0: 1}, {4: -1}):
        with pytest.raises(EngineError, match="traffic of"):
            chosen(wrong, (1, 8), sizes=2, largest=8, call=0.5)
    with pytest.raises(EngineError, match="a largest batch of 0"):
        chosen({3: 1}, (1, 8), sizes=2, largest=0, call=0.5)
    with pytest.raises(EngineError, match="for at most 0 sizes"):
        chosen({3: 1}, (1, 8), sizes=0, largest=8, call=0.5)


def test_what_a_call_is_worth_is_read_from_times_of_this_back_end() -> None:
    def table(call: float, row: float) -> dict[str, Any]:
        return {"backend": "openvino", "rungs_ms": {str(batch): [share * (call + batch * row) / batch for share in (0.4, 1.0)] for batch in (1, 16)}}

    assert call_rows(table(3.0, 2.0), "openvino") == pytest.approx(1.5)
    assert call_rows(table(-0.5, 2.0), "openvino") == 0  # a large batch that is slower for each row
    assert call_rows(table(3.0, 0.0), "openvino") == call_rows(table(30.0, -1.0), "openvino") == retuning.STEEPEST
    assert call_rows(table(3.0, 2.0), "inductor") == call_rows(None, "inductor") == CALL_ROWS
    assert call_rows({"backend": "eager", "rungs_ms": {"1": [1.0]}}, "eager") == CALL_ROWS


@pytest.mark.parametrize("kind", [plain, pytest.param(build, marks=pytest.mark.slow)])
@pytest.mark.parametrize("made", [made_up_bundle, relayed])
def test_new_graphs_are_built_first_and_answers_stay(made: Any, kind: Build, tmp_path: File) -> None:
    make, told = Counting(kind), list[str]()
    adapted = model(made(), make)
    parts = len(make.names) // 2
    assert parts == 4 - isinstance(adapted.engine, Relay)
    before = {count: adapted(inputs(count)) for count in (5, 5, 5, 6, 6)}
    seen, old = adapted.engine.traffic, adapted.engine
    make.names.clear()
    found = adapted.retune(largest=8, worth=0.0, tell=told.append)
    assert (found.before, found.after) == ((1, 8), adapted.buckets) and 0 < found.saved < 1 and found.groups == sum(seen.values())
    new = sorted(set(found.after) - {1, 8})
    assert new and Counter(int(name.rsplit(" ", 1)[1]) for name in make.names) == dict.fromkeys(new, parts)  # the others were there
    assert (found.kept, found.built) == (parts * (len(found.after) - len(new)), parts * len(new)) and adapted.engine.built == adapted.engine.wanted
    assert told[0].startswith(f"batch sizes {', '.join(map(str, found.after))} in place of 1, 8") and len(told) == 1 + found.built
    graphs, names, kept = counters["stats"]["unique_graphs"], make.names.copy(), old.wanted
    for count, wanted in before.items():
        again = adapted(inputs(count))
        torch.testing.assert_close(again.logits, wanted.logits, atol=1e-5, rtol=1e-5)
        assert torch.equal(again.path, wanted.path)
    for count in (1, 2, 7, 30):
        assert len(adapted(inputs(count)).path) == count
    assert counters["stats"]["unique_graphs"] == graphs and make.names == names  # none after sealing
    assert old.wanted == old.built == kept  # and none taken away
    adapted.save(tmp_path / "bundle")
    assert load(tmp_path / "bundle", backend="eager").buckets == found.after and load(tmp_path / "bundle", buckets=(2,)).buckets == (2,)


def test_requests_are_answered_while_it_builds_and_none_is_lost() -> None:
    make = Counting()
    adapted = model(made_up_bundle(), make)
    wanted, asked, go, served = adapted(inputs(5)), Event(), Event(), list[Any]()
    old = adapted.engine

    def wait() -> None:
        asked.set()
        assert go.wait(20)

    make.stop = wait
    tuning = Thread(target=lambda: served.append(adapted.retune(traffic={5: 1}, largest=8)))
    tuning.start()
    assert asked.wait(20)  # in the middle of a build
    for _ in range(7):
        answer = adapted(inputs(5))
        assert adapted.engine is old and torch.equal(answer.path, wanted.path)
    go.set()
    tuning.join(60)
    assert served[0].after == (5,) and adapted.engine is not old
    adapted(inputs(5))
    assert adapted.engine.traffic[5] >= 9 and adapted.engine.traffic == old.traffic  # one count for both
    adapted.engine.forget()
    assert not adapted.engine.traffic


def test_a_build_that_fails_leaves_everything_as_it_was() -> None:
    make = Counting()
    adapted = model(made_up_bundle(), make)
    adapted(inputs(5))
    before, bundle = adapted.engine, adapted.bundle

    def refuse() -> None:
        raise EngineError("no room", wanted="some", do="Free some.")

    make.stop = refuse
    with pytest.raises(EngineError, match="no room"):
        adapted.retune()
    assert adapted.engine is before and adapted.buckets == (1, 8) and adapted.bundle is bundle and len(adapted(inputs(5)).path) == 5


def test_what_would_save_little_changes_nothing() -> None:
    make, told = Counting(), list[str]()
    adapted = model(made_up_bundle(), make)
    with pytest.raises(EngineError, match="traffic"):
        adapted.retune()
    make.names.clear()
    found = adapted.retune(traffic={1: 100, 8: 100, 7: 1}, tell=told.append)
    assert found.after == adapted.buckets == (1, 8) and not make.names and found.built == 0 and adapted.bundle.buckets == ()
    assert told == ["batch sizes stay 1, 8: 1, 8 save 0.0 % of the expected cost of 201 groups"]
    fewer = adapted.retune(sizes=1, traffic={1: 100, 8: 100})
    assert fewer.saved < 0 and adapted.buckets == fewer.after == (2,)  # asked for, though it costs more


def test_texts_of_every_length_get_the_same_sizes() -> None:
    texts = pytest.importorskip("tests.rooms.test_deliver_texts")
    adapted = Adapted(texts.made_up(texts.tokenise()), backend="eager", buckets=(1, 4))
    adapted.engine = adapted.built("eager", make=plain)
    some = ["the good film", "a bad film is not good " * 7, "was"]
    wanted = adapted(some)
    tokens = adapted.engine.tokens if isinstance(adapted.engine, Lengths) else None
    found = adapted.retune(largest=4, worth=0.0, traffic={3: 1, 2: 1})
    assert found.after == (2, 3) and adapted.engine.built == adapted.engine.wanted == found.built and isinstance(adapted.engine, Lengths)
    torch.testing.assert_close(adapted(some).logits, wanted.logits, atol=1e-5, rtol=1e-5)
    assert tokens and adapted.engine.tokens.total() == 2 * tokens.total()


def test_sizes_that_make_no_sense_are_refused_by_name(tmp_path: File) -> None:
    write_bundle(replace(made_up_bundle(), costs={}, buckets=(2, 5)), tmp_path)
    assert Adapted(load(tmp_path, backend="eager").bundle).buckets == (2, 5)
    rewrite(tmp_path, "ladder.json", lambda data: json.dumps({**json.loads(data), "buckets": [5, 2]}).encode())
    with pytest.raises(BundleError, match="buckets"):
        load(tmp_path)


# The back-end that is chosen on loading.


def test_auto_measures_here_and_says_why(tmp_path: File, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "build", planted(SPEED, wrong="openvino"))
    write_bundle(replace(made_up_bundle(), costs={}), tmp_path / "bundle")
    told = list[str]()
    found = load(tmp_path / "bundle", backend="auto", buckets=(1, 4), cache=tmp_path / "cache", tell=told.append)
    assert found.backend == "eager" and found.buckets == (1, 4)
    assert told[0] == f"timing {len(ranking.EXACT)} back-ends at batch 1" and any("answers differ" in text for text in told)
    assert told[-2:] == ["back-end: eager", "no cache: eager keeps no converted graphs"]
    monkeypatch.setattr(ranking, "build", planted({}))
    with pytest.raises(EngineError, match="no package inductor"):
        load(tmp_path / "bundle", backend="auto")  # nothing else is taken in its place


def test_auto_takes_what_was_measured_on_this_device_and_no_other(tmp_path: File, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "build", planted({("eager", batch): 0.0 for batch in (1, 4)}))
    trials = [{"backend": "onnxruntime", "batch": 1, "reason": "the fastest"}, {"backend": "eager", "batch": 1, "reason": "1.40 of the fastest one's time"}]
    table = {"rungs_ms": {"1": [1.0, 2.0, 3.0]}, "backend": "onnxruntime", "backends": {"backend": "onnxruntime", "trials": trials}}
    for device, wanted in ((fingerprint(), "onnxruntime"), ("aaaabbbbcccc", "eager")):
        write_bundle(replace(made_up_bundle(), costs={device: table}), tmp_path)
        told = list[str]()
        found = load(tmp_path, backend="auto", buckets=(1, 4), tell=told.append)
        assert found.backend == wanted
        assert (told[-1] == "back-end: onnxruntime, as measured with this bundle on this device") is (wanted == "onnxruntime")
        assert any("1.40 of" in text for text in told) is (wanted == "onnxruntime")


@pytest.mark.slow
def test_auto_from_the_shell(tmp_path: File, monkeypatch: pytest.MonkeyPatch) -> None:
    image = pytest.importorskip("PIL.Image")
    monkeypatch.setattr(ranking, "build", planted({("eager", batch): 0.0 for batch in (1, 32)}))
    write_bundle(replace(made_up_bundle(), costs={}), tmp_path / "bundle")
    image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    said = shell("run", tmp_path / "bundle", tmp_path / "one.png", "--backend", "auto", "--json")
    assert said.exit_code == 0 and len(json.loads(said.stdout)["answers"]) == 1
    assert "· back-end: eager" in said.stderr and "no package openvino" in said.stderr
    assert shell("run", tmp_path / "bundle", tmp_path / "one.png", "--backend", "fastest").exit_code != 0
