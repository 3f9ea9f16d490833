"""The shell: exit codes, one line for an error, one JSON document where it is asked for; and once the whole way, from a model and a folder of pictures."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path as File
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner, Result

from apportion import cli, verbs
from apportion.deliver import deciding, tables, weighing
from apportion.deliver.adapted import Adapted, load
from apportion.deliver.bundle import save
from apportion.deliver.costs import profile
from apportion.engine import never_slower
from apportion.errors import ControlError, DataError, PlanError
from apportion.intake import Preprocess, _torchvision, read_images
from apportion.network import Architecture, Network, put
from apportion.vocab import Ladder, Path, Plan
from tests.conftest import shake
from tests.rooms.test_deliver_bundle import made_up_bundle


def shell(*words: object) -> Result:
    return CliRunner().invoke(cli.app, [str(word) for word in words])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> File:
    """A bundle on disk. Brackets in its name: they mean colours to the console, and must not."""
    place = tmp_path_factory.mktemp("cli") / "bundle [red][/x]"
    save(replace(made_up_bundle(), costs={}), place)
    return place


@pytest.fixture(scope="module")
def warm(folder: File) -> Adapted:
    adapted = load(folder, backend="eager", buckets=(4,))
    adapted.warm()
    return adapted


@pytest.fixture
def quick(warm: Adapted, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundle with its graphs built already."""
    monkeypatch.setattr(verbs, "load", lambda folder, **options: warm)


@pytest.fixture
def pictures(tmp_path: File) -> File:
    rng = np.random.default_rng(0)
    for name in "abc":
        Image.fromarray(rng.integers(0, 255, (12, 9, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "torn [b].png").write_bytes(whole[: len(whole) // 2])
    return tmp_path


def test_help_waits_for_nothing_heavy() -> None:
    code = "import sys, apportion.cli; print(sorted({'torch', 'numpy', 'PIL', 'timm', 'sklearn', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_remarks_of_other_libraries_are_not_passed_on(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def remark(name: str | None) -> list[dict[str, Any]]:
        logging.getLogger("somebody").warning("an attribute is ambiguous")
        logging.getLogger("somebody").error("the disk is full")
        return []

    monkeypatch.setattr(verbs, "systems", remark)
    monkeypatch.setattr(sys, "argv", ["apportion", "systems"])
    try:
        with pytest.raises(SystemExit):
            cli.main()
    finally:
        logging.disable(logging.NOTSET)
    assert caplog.messages == ["the disk is full"]


def test_help_names_every_command() -> None:
    found = subprocess.run([sys.executable, "-m", "apportion", "--help"], capture_output=True, text=True, check=True).stdout
    assert all(f" {command} " in found for command in ("adapt", "bench", "demo", "doctor", "report", "run", "systems"))


def test_tables_have_words_to_the_left_and_numbers_to_the_right_whole_on_a_narrow_screen() -> None:
    def shown(width: int, *rows: list[str], head: tuple[str, ...] = ("", "path", "ms")) -> list[str]:
        with (console := Console(width=width)).capture() as held:
            console.print(tables.grid("title", head, rows))
        return [line.rstrip() for line in held.get().splitlines() if line.strip(" ─")]

    wide = shown(80, ["a [b]", "d1", "10.5"], ["c", "d12_t4", "-2.25"], ["d", "", ""])
    assert [line.split() for line in wide[2:4]] == [["a", "[b]", "d1", "10.5"], ["c", "d12_t4", "-2.25"]]
    assert wide[2].index("d1") == wide[3].index("d12") and len(wide[2]) == len(wide[3])
    narrow = "".join(shown(24, ["x" * 30, "y", "1.0"]))
    assert narrow.count("x") == 30 and "…" not in narrow
    assert shown(80, ["cpu", "EPYC"], head=("", ""))[1].split() == ["cpu", "EPYC"]  # no head where no column has a name


def test_work_of_small_networks_is_more_than_zeros() -> None:
    assert tables.work([0.000512345, 0.0002]) == ["0.0005123", "0.0002000"] and tables.work([17.4, 0.25]) == ["17.40", "0.25"] and tables.work([]) == []


def test_quiet_means_that_nobody_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def demo(to: File, *, tell: object, **options: object) -> None:
        asked.append(tell)
        raise DataError("nothing", wanted="something", do="Bring it.")

    monkeypatch.setattr(verbs, "demo", demo)
    assert shell("demo", "--quiet").exit_code == shell("demo").exit_code == 5
    assert asked == [verbs.silent, cli.tell]


@pytest.mark.parametrize("tell", [verbs.silent, print])
def test_who_is_told_nothing_sees_no_training_either(tell: verbs.Tell, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr(verbs, "fit", lambda *given, progress, **options: seen.append(progress))
    network, feed, parts = verbs.scratch("digits", recipe=verbs.Recipe(epochs=1), architecture=replace(small().architecture, classes=10), tell=tell)
    verbs.prepare(network, parts, feed, Plan(epochs=1.0), folder=None, tell=tell)
    assert seen == [tell is print] * 2


def test_slower_paths_are_served_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[Plan] = []

    def adapt(*given: object, plan: Plan, **options: object) -> None:
        plans.append(plan)
        raise DataError("nothing", wanted="something", do="Bring it.")

    monkeypatch.setattr(verbs, "adapt", adapt)
    for words in ((), ("--allow-slower",)):
        assert shell("adapt", "timm:any", "photos", *words).exit_code == 5
    assert [plan.never_slower for plan in plans] == [True, False]


def test_run_answers_what_it_can_read_and_names_the_rest(folder: File, pictures: File, quick: None) -> None:
    found = shell("run", folder, pictures)
    assert found.exit_code == 5
    assert all(f"{name}.png" in found.stdout for name in "abc") and "torn" not in found.stdout
    assert "torn [b].png: " in found.stderr and "1 of 4 inputs" in found.stderr and found.stderr.count("torn") == 1


def test_run_in_json(folder: File, pictures: File, quick: None, warm: Adapted) -> None:
    found = shell("run", folder, pictures, "--json", "--budget", "<0.9x")
    data = json.loads(found.stdout)
    assert [File(row["file"]).name for row in data["answers"]] == ["a.png", "b.png", "c.png"]
    assert [File(row["file"]).name for row in data["skipped"]] == ["torn [b].png"]
    for row in data["answers"]:
        assert row["label"] in ("ape", "bee", "cow") and 1 / 3 < row["probability"] <= 1
        assert row["path"] in [path.name for path in warm.bundle.ladder.paths]
        assert row["gmacs"] <= 0.9 * warm.bundle.rungs[-1].gmacs


def test_run_takes_one_file_and_says_that_all_is_well(folder: File, pictures: File, quick: None) -> None:
    found = shell("run", folder, pictures / "a.png", "--json")
    assert found.exit_code == 0 and len(json.loads(found.stdout)["answers"]) == 1 and not found.stderr


def test_run_reads_more_than_a_batch(folder: File, pictures: File, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verbs, "BATCH", 2)
    rows, skipped = verbs.run(folder, [pictures])
    assert ["a.png", "b.png", "c.png"] == [File(row["file"]).name for row in rows] and len(skipped) == 1


def test_one_picture_waits_for_no_graphs_of_batches(folder: File, pictures: File, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(folder, backend="eager", buckets=(1, 4))
    sizes: list[tuple[int, ...]] = []
    monkeypatch.setattr(verbs, "load", lambda folder, **options: loaded)
    monkeypatch.setattr(verbs, "Adapted", lambda bundle, **options: sizes.append(options["buckets"]) or Adapted(bundle, **options))
    rows, _ = verbs.run(folder, [pictures / "a.png"])
    together, _ = verbs.run(folder, [pictures])  # these need the graphs of every size
    assert sizes == [(1,)]
    assert rows[0]["path"] == together[0]["path"] and rows[0]["probability"] == pytest.approx(together[0]["probability"], abs=1e-5)
    assert verbs.at_once("onnxruntime-int8", None) == (1,) and verbs.at_once("openvino", None) is None


def test_json_is_one_document(folder: File) -> None:
    report = shell("report", folder, "--json")
    places = json.loads(report.stdout)["frontier"]
    assert len(places) == 6 and json.loads(report.stdout)["page"] is None
    methods = json.loads(shell("systems", "--json").stdout)
    assert {"tome", "matformer"} <= {row["name"] for row in methods}
    facts = json.loads(shell("doctor", "--json").stdout)
    assert len(facts["fingerprint"]) == 12 and facts["advice"] and facts["packages"].keys() >= {"timm", "openvino"}


def test_tables_show_what_json_says(folder: File) -> None:
    assert "controller at 0.90x" in shell("report", folder).stdout
    found = shell("systems", "tome").stdout
    assert "2210.09461" in found and "matformer" not in found


@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        (["run", "nowhere [red]", "x.png"], 8, "nowhere [red]"),
        (["report", "nowhere"], 8, "nowhere"),
        (["systems", "nobody"], 3, "nobody"),
        (["adapt", "timm:no_such_model", "--data", "digits", "--random"], 4, "no_such_model"),
        (["adapt", "nowhere.safetensors", "--data", "digits"], 5, "nowhere.safetensors"),
        (["adapt", "scratch", "--data", "nowhere"], 5, "nowhere"),
        (["adapt", "scratch", "--data", "digits", "--plan", "nowhere.toml"], 3, "nowhere.toml"),
        (["adapt", "scratch", "--data", "digits", "--backend", "fast"], 7, "fast"),
        (["bench", "nowhere", "--data", "digits"], 8, "nowhere"),
        (["bench", "nowhere"], 2, "--data"),
        (["fly"], 2, "fly"),
        (["adapt", "scratch", "digits", "--tolerance", "-1"], 2, "--tolerance"),
        (["adapt", "scratch", "digits", "--confidence", "2"], 2, "--confidence"),
        (["adapt", "scratch", "digits", "--epochs", "-1"], 2, "--epochs"),
        (["adapt", "scratch", "digits", "--length", "0"], 2, "--length"),
    ],
)
def test_errors_are_one_line_and_a_code(words: list[str], code: int, named: str, tmp_path: File, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(verbs, "fit", None)  # nothing here comes as far as training
    found = shell(*words)
    assert found.exit_code == code, found.output
    assert named in found.stderr and not found.stdout and "Traceback" not in found.output
    if code != 2:  # a wrong call shows the usage
        assert len([line for line in found.stderr.splitlines() if not line.startswith("· ")]) == 1
        assert isinstance(found.exception, SystemExit)


def test_inputs_that_are_not_there_are_named(folder: File, quick: None, tmp_path: File) -> None:
    assert "gone.png" in (found := shell("run", folder, tmp_path / "gone.png")).stderr and found.exit_code == 5
    (tmp_path / "empty").mkdir()
    assert "empty" in (found := shell("run", folder, tmp_path / "empty")).stderr and found.exit_code == 5


def test_a_wrong_budget_is_refused_before_anything_is_built(folder: File, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verbs, "load", None)
    for budget in ("half", "-0.5x", "0x", "50%"):
        found = shell("run", folder, "a.png", "--budget", budget)
        assert found.exit_code == 3 and repr(budget) in found.stderr


def test_a_budget_out_of_reach_is_the_plan_s_error(folder: File, pictures: File, quick: None) -> None:
    assert shell("run", folder, pictures / "a.png", "--budget", "0.01x").exit_code == 3
    assert shell("run", folder, pictures / "a.png", "--budget", "1ms").exit_code == 8


@pytest.mark.parametrize(
    ("verb", "message", "said"),
    [
        ("demo", "stopped; step 7 is written", "step 7 is written"),
        ("demo", "", "stopped; the same command goes on from the last checkpoint"),
        ("systems", "", "stopped"),
    ],
)
def test_control_c_says_what_is_kept(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: str, message: str, said: str) -> None:
    def stop(*given: object, **options: object) -> None:
        raise KeyboardInterrupt(message)

    monkeypatch.setattr(verbs, verb, stop)
    monkeypatch.setattr(sys, "argv", ["apportion", verb])
    monkeypatch.setattr(logging, "disable", lambda level: None)  # for this process
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 130
    seen = capsys.readouterr()
    assert seen.err.endswith(f"{said}\n") and not seen.out and "Traceback" not in seen.err


def test_labels_that_mean_something_else_are_noticed_early() -> None:
    digits, said = read_images("digits", split="test", limit=60), list[str]()
    for right, samples in ((0.05, digits), (0.2, digits), (0.05, replace(digits, labels=None))):
        verbs.foreseen(torch.full((60,), right), samples, "classification", said.append)
    assert [text.startswith("the dense model") for text in said] == [True, False, True, True]
    assert "5.00 % on the 60 samples" in said[0] and "classes.json" in said[1]


def test_every_output_has_a_name_or_none_has() -> None:
    assert deciding.named(("cat", "dog"), 4) == ("cat", "dog", "2", "3")
    assert deciding.named((), 4) == ()


def test_where_nothing_is_taught_control_has_all_training_images() -> None:
    taught, free = verbs.Parts.read("digits", seed=0), verbs.Parts.read("digits", seed=0, teach=False)
    assert taught.teach is not None and free.teach is None and len(taught.report) == len(free.report)
    assert len(free.decide) + len(free.place) == len(taught.teach) + len(taught.decide) + len(taught.place) == 1797 - len(free.report)


def painted(folder: File, count: int, *, labels: bool) -> File:
    """Red, green and blue pictures, some of them drowned in noise: three classes, or one folder without any."""
    rng = np.random.default_rng(0)
    for colour, name in enumerate(("red", "green", "blue")):
        for number in range(count):
            picture = rng.integers(0, 60 + 180 * (number % 2), (32, 32, 3))
            picture[..., colour] += 15
            file = folder / (f"{name}/{number}.png" if labels else f"{name}{number}.png")
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture.astype(np.uint8)).save(file)
    return folder


def small() -> Network:
    torch.manual_seed(0)
    network = Network(Architecture(image_size=32, patch=8, dim=16, depth=3, heads=2, hidden=32, classes=3))
    shake(network)
    return network


def eager(model: object, data: File, out: File | None = None, **options: object) -> verbs.Weighed:
    fixed = {"preprocess": Preprocess(32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)), "plan": Plan(rungs=3, tolerance=60.0, never_slower=False), **options}
    return verbs.adapt(model, str(data), backend="eager", buckets=(1, 4), repeats=3, out=out, **fixed)  # pyright: ignore


@pytest.mark.slow
def test_the_whole_way(tmp_path: File, monkeypatch: pytest.MonkeyPatch) -> None:
    data, out = painted(tmp_path / "data", 40, labels=True), tmp_path / "out"
    _torchvision.ready()
    import timm

    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2, num_classes=3)
    told: list[str] = []
    weighed = eager(vit, data, out, tell=told.append)
    assert any("trying" in text for text in told) and told[-1].endswith(str(out))
    assert {file.name for file in out.iterdir()} >= {"plan.toml", "model.safetensors", "report.html", "report.json", "README.md", "provenance.json", "costs"}
    assert "://" not in (out / "report.html").read_text()  # no address outside itself; `http-equiv` is none
    assert "VisionTransformer" in (out / "README.md").read_text()
    model = load(out, backend="eager", buckets=(1, 4))
    assert model.bundle.classes == ("blue", "green", "red") and model.latency_ms(1) is not None
    pixels = np.stack([np.asarray(Image.open(file)) for file in sorted(data.rglob("*.png"))[:9]])
    first, second = weighed.adapted(pixels), model(pixels)
    assert torch.equal(first.path, second.path)
    torch.testing.assert_close(first.logits, second.logits)
    monkeypatch.setattr(verbs, "load", lambda folder, **options: model)
    assert len(json.loads(shell("run", out, data / "red", "--json").stdout)["answers"]) == 40
    # What the controller charges is what the engine reports.
    gmacs = torch.tensor([rung.gmacs for rung in model.bundle.rungs])
    torch.testing.assert_close(model.bundle.controller.cost, gmacs / gmacs[-1])
    again = verbs.bench(out, str(data), backend="eager", repeats=3)
    assert again.figures["accuracy_adaptive"] == weighed.figures["accuracy_adaptive"]
    assert again.figures["gmacs_adaptive"] == pytest.approx(weighed.figures["gmacs_adaptive"])


@pytest.mark.slow
def test_without_labels_right_is_what_the_dense_model_says(tmp_path: File) -> None:
    data = painted(tmp_path, 40, labels=False)
    weighed = eager(small(), data, plan=Plan(rungs=3, tolerance=60.0, glance=1, never_slower=False))
    assert weighed.figures["accuracy_dense"] == 1.0
    assert weighed.adapted.bundle.rungs[-1].accuracy == 1.0  # untaught, the full path is the dense model
    assert weighed.adapted.bundle.classes == ()
    images = read_images(data)
    other = small()
    shake(other, seed=5)
    full = weighed.adapted.bundle.ladder
    table = deciding.outcomes(weighed.adapted.bundle.network, full, images, weighed.adapted.bundle.preprocess, reference=other)
    inputs = torch.cat([batch for batch, _ in images.batches(100, weighed.adapted.bundle.preprocess)])
    answers = weighed.adapted.bundle.network(inputs, full.paths[-1]).argmax(-1)
    assert torch.equal(table.correct[:, -1], answers == other(inputs, other.space.full).argmax(-1))


@pytest.mark.slow
def test_a_certified_tolerance_is_kept_with_the_model_or_refused_with_what_it_takes(tmp_path: File) -> None:
    data, out = painted(tmp_path / "data", 80, labels=True), tmp_path / "out"
    weighed = eager(small(), data, out, plan=Plan(rungs=3, tolerance=60.0, glance=1, confidence=0.9, never_slower=False))
    certificate = load(out, backend="eager").bundle.certificate
    assert certificate is not None and certificate == weighed.adapted.bundle.certificate
    assert (certificate.tolerance_points, certificate.confidence) == (60.0, 0.9) and certificate.budget == weighed.adapted.bundle.budget
    used = weighed.adapted.bundle.provenance["rows"]
    assert certificate.rows == used["certify"] and sum(used.values()) == 240  # every picture once
    assert "Certified: at most 60 points" in (out / "report.html").read_text()
    with pytest.raises(ControlError, match=r"would do|buy the full path"):
        eager(small(), data, plan=Plan(rungs=3, tolerance=0.5, glance=1, confidence=0.9))


@pytest.mark.slow
def test_a_path_that_is_not_faster_here_is_not_served(tmp_path: File, monkeypatch: pytest.MonkeyPatch) -> None:
    data, told = painted(tmp_path, 40, labels=True), list[str]()
    real, slowed = verbs.weigh, list[str]()

    def weigh(adapted: Adapted, *rest: object, **options: object) -> verbs.Weighed:
        """As measured, but the first run finds one path slow and the others quick."""
        weighed = real(adapted, *rest, **options)  # pyright: ignore
        bundle = weighed.adapted.bundle
        slow = 1 if not slowed else -1
        slowed.append(bundle.ladder.paths[slow].name)
        times = {"dense_ms": {"1": 10.0, "4": 10.0}, "rungs_ms": {key: [20.0 if k == slow else 5.0 for k in range(len(bundle.rungs))] for key in ("1", "4")}}
        costs = {device: {**table, **times} for device, table in bundle.costs.items()}
        return replace(weighed, adapted=Adapted(replace(bundle, costs=costs), backend="eager", buckets=(1, 4), engine=weighed.adapted.engine))

    def exits(network: Network, *rest: object, **options: object) -> Ladder:
        return Ladder(tuple(network.space.path(blocks=range(depth)) for depth in (1, 2, 3)), 1)

    monkeypatch.setattr(verbs, "weigh", weigh)
    monkeypatch.setattr(deciding, "choose_ladder", exits)
    monkeypatch.setattr(verbs, "check_time", lambda weighed: None)  # three blocks of 16 channels do not pay for a decision
    weighed = eager(small(), data, plan=Plan(rungs=4, tolerance=100.0, glance=1), tell=told.append)
    assert len(slowed) == 2 and any(slowed[0] in text and text.startswith("not served") for text in told)
    assert slowed[0] not in [path.name for path in weighed.adapted.bundle.ladder.paths]
    monkeypatch.setattr(weighing, "never_slower", lambda times, dense: never_slower(times, dense, limit=0.01))
    with pytest.raises(ControlError, match="no path that is faster"):
        verbs.fast_enough(weighed, tell=told.append)


@pytest.mark.slow
def test_a_random_timm_model_needs_no_network(tmp_path: File) -> None:
    """As far as reading: the model is made and proven, and the data is what is found wrong."""
    with pytest.raises(DataError, match="nowhere"):
        verbs.adapt("timm:vit_tiny_patch16_224", str(tmp_path / "nowhere"), random=True)


@pytest.mark.slow
def test_adaptive_computation_modules_by_name(tmp_path: File) -> None:
    data = painted(tmp_path / "data", 560, labels=True)
    with pytest.raises(PlanError, match="epochs"):
        eager(small(), data, plan=verbs.with_method(Plan(tolerance=100.0), "acm"))
    with pytest.raises(PlanError, match="acm"):
        verbs.with_method(Plan(), "acme")
    plan = verbs.with_method(Plan(rungs=3, tolerance=100.0, glance=1, never_slower=False, epochs=2.0, batch=16), "acm")
    weighed = eager(small(), data, tmp_path / "out", plan=plan)
    again = load(tmp_path / "out", backend="eager", buckets=(4,))
    gates = [block.ffn.gate for block in again.bundle.network.blocks]  # pyright: ignore
    assert all(gate is not None and bool(gate.last.weight.abs().sum() > 0) for gate in gates)
    inputs = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    weighed.adapted.warm()
    assert torch.allclose(again(inputs).logits, weighed.adapted(inputs).logits, atol=1e-5)


@pytest.mark.slow
def test_a_search_in_milliseconds_serves_what_is_quick_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the hidden units take as long as all: such paths are worth nothing, whatever they save in multiply-adds."""
    network, images = Network(replace(small().architecture, classes=10)).eval(), read_images("digits", split="train", limit=80)
    for choice in Plan().choices:
        put(network, choice)
    feed, told = Preprocess(32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)), list[str]()
    plan = Plan(rungs=4, glance=1, search="ms")

    def chosen(search: str) -> Ladder:
        over = profile(network, images, feed)
        return deciding.choose_ladder(network, network, images, feed, replace(plan, search=search), over, backend="eager", buckets=(1, 4), tell=told.append)

    assert len(chosen("ms").paths) >= 2 and any("foretold from" in text for text in told)

    def slow(path: Path) -> float:
        return 1.0 if path.width == network.space.full.width and path.heads == network.space.full.heads else 2.0

    times = SimpleNamespace(points=1, error=0.0, worst=0.0, ms=lambda of, path, batch: slow(path) * of.macs(path))
    monkeypatch.setattr(deciding, "forecast", lambda *rest, **options: times)
    assert all(slow(path) == 1.0 for path in chosen("ms").paths)


def test_a_whole_that_is_slower_than_the_dense_model_is_not_served() -> None:
    def weighed(**ratios: float) -> Any:
        return SimpleNamespace(figures={"time_ratio": {batch.removeprefix("b"): {"value": value} for batch, value in ratios.items()}})

    verbs.check_time(weighed(b1=0.97, b32=0.6))
    with pytest.raises(ControlError, match=r"takes 1\.039 of the dense model's time at batch 1; wanted less"):
        verbs.check_time(weighed(b1=1.039, b32=0.6))


def test_inspect_says_what_a_model_is_and_what_can_adapt(folder: File) -> None:
    found = shell("inspect", "timm:vit_tiny_patch16_224", "--random", "--image-size", 64, "--json")
    assert found.exit_code == 0, found.output
    said = json.loads(found.stdout)
    assert ["inputs", "images of 64 x 64 in patches of 16"] in said["recognised"]
    assert len(said["parts"]) == 14 and sum(part["share"] for part in said["parts"]) == pytest.approx(1)
    assert {"tokens", "width", "heads", "depth"} <= {offer["axis"] for offer in said["offers"] if not offer["refused"]}
    table = shell("inspect", "timm:vit_tiny_patch16_224", "--random")
    assert table.exit_code == 0 and "5,717,416" in table.stdout and "tome" in table.stdout
    held = shell("inspect", folder)
    assert held.exit_code == 0 and "matformer" in held.stdout
    refused = shell("inspect", "timm:swin_tiny_patch4_window7_224", "--random")
    assert refused.exit_code == 4 and "Swin" in refused.stderr
