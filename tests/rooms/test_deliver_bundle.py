"""A bundle comes back as it was, or an error names the file: never filled in, never a mixture, nothing that runs on loading."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path as File
from typing import Any

import pytest
import tomli_w
import torch
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as pack_tensors

from apportion.control import fit_controller, frontier
from apportion.deliver import Bundle
from apportion.deliver.adapted import Decide, load
from apportion.deliver.bundle import CORE, Rung, read_plan
from apportion.deliver.bundle import load as read_bundle
from apportion.deliver.bundle import save as write_bundle
from apportion.errors import ApportionError, BundleError, PlanError
from apportion.intake import Preprocess
from apportion.network import Architecture, Network, put
from apportion.vocab import Choice, Ladder, Outcomes, Path, Plan
from tests.conftest import shake

CHOICES = (Choice("reducer", "tome"), Choice("ffn", "matformer"), Choice("mixer", "head_prefix"), Choice("depth", "skip"))
COSTS = {"aaaabbbbcccc": {"rungs_ms": {"1": [1.0, 2.0, 3.5]}, "backend": "eager"}}


def made_up_bundle(*, seed: int = 0, classes: tuple[str, ...] = ("ape", "bee", "cow"), side: int = 8) -> Bundle:
    """Three paths through three small blocks and a controller that learned from a made-up table, in which dark pictures are easy."""
    torch.manual_seed(seed)
    network = Network(Architecture(image_size=side, patch=4, dim=16, depth=3, heads=2, hidden=32, classes=len(classes))).eval().requires_grad_(False)
    shake(network, seed=seed)
    for choice in CHOICES:
        put(network, choice)
    space = network.space
    paths = (space.path(blocks=(0, 2)), space.path(width=(32, 16, 16)), space.full)
    ladder, glance = Ladder(paths, 1), network.glance(1)
    inputs = torch.randn(160, 3, side, side, generator=torch.Generator().manual_seed(seed))
    inputs *= torch.linspace(0.2, 3, 160)[torch.randperm(160, generator=torch.Generator().manual_seed(seed))].view(-1, 1, 1, 1)
    logits = torch.stack([network(inputs, path) for path in paths], 1)
    correct = torch.stack([inputs.std((1, 2, 3)) < 1, inputs.std((1, 2, 3)) < 2, torch.ones(160, dtype=torch.bool)], 1)
    cost = torch.tensor([float(network.macs(path) + glance.macs()) for path in paths])
    table = Outcomes(glance(inputs)[1], correct, correct, 1 - correct.float(), logits.softmax(-1).amax(-1), cost / cost[-1])
    rows = torch.arange(160)
    controller = fit_controller(table, fit_rows=rows[:100], calibrate_rows=rows[100:], seed=seed)
    gmacs = [(network.macs(path) + glance.macs() + controller.macs) / 1e9 for path in paths]
    return Bundle(
        network=network,
        ladder=ladder,
        controller=controller,
        preprocess=Preprocess(side, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
        plan=Plan(choices=CHOICES, tolerance=0.7),
        budget=0.8,
        rungs=tuple(Rung(g, float(a)) for g, a in zip(gmacs, correct.double().mean(0), strict=True)),
        frontier=tuple(frontier(controller, table, [0.75, 0.9, 1.0])),
        dense_gmacs=network.macs(space.full) / 1e9,
        classes=classes,
        costs=COSTS,
        provenance={"source": {"source": "made up"}},
    )


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return made_up_bundle()


@pytest.fixture(scope="module")
def written(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> File:
    folder = tmp_path_factory.mktemp("deliver") / "bundle"
    write_bundle(bundle, folder, extra={"README.md": "what it is\n"})
    return folder


@pytest.fixture
def folder(written: File, tmp_path: File) -> File:
    return shutil.copytree(written, tmp_path / "bundle")


@pytest.fixture(scope="module")
def other() -> Bundle:
    return replace(made_up_bundle(seed=1), costs={"ddddeeeeffff": COSTS["aaaabbbbcccc"]})


def same(first: Bundle, second: Bundle) -> None:
    """Everything that is plain data is equal, and so is what the two answer."""
    for name in ("ladder", "preprocess", "plan", "budget", "rungs", "dense_gmacs", "classes", "costs", "provenance"):
        assert getattr(first, name) == getattr(second, name), name
    assert [dict(point) for point in first.frontier] == [dict(point) for point in second.frontier]
    inputs = torch.randn(9, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.2, 3, 9).view(-1, 1, 1, 1)
    answers = []
    for found in (first, second):
        state, choice = Decide(found.network.glance(found.ladder.glance), found.controller)(inputs, torch.tensor(0.9), torch.tensor(torch.inf))
        answers.append((choice, *state[:3], *(found.network(inputs, path) for path in found.ladder.paths)))
    assert all(map(torch.equal, *answers)) and len(answers[0][0].unique()) > 1


def rewrite(folder: File, name: str, change: Callable[[bytes], bytes]) -> None:
    """Change a file and make provenance.json vouch for it, so that only what it says can be found wrong."""
    data = change((folder / name).read_bytes())
    (folder / name).write_bytes(data)
    provenance = json.loads((folder / "provenance.json").read_text())
    provenance["sha256"][name] = hashlib.sha256(data).hexdigest()
    (folder / "provenance.json").write_text(json.dumps(provenance))


def toml(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    def changed(data: bytes) -> bytes:
        found = tomllib.loads(data.decode())
        change(found)
        return tomli_w.dumps(found).encode()

    return changed


def entries(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    def changed(data: bytes) -> bytes:
        found = json.loads(data)
        change(found)
        return json.dumps(found).encode()

    return changed


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[bytes], bytes]:
    def changed(data: bytes) -> bytes:
        found = parse_tensors(data)
        change(found)
        return pack_tensors(found)

    return changed


def test_comes_back_the_same(bundle: Bundle, folder: File) -> None:
    again = read_bundle(folder)
    same(bundle, again)
    assert not any(parameter.requires_grad for parameter in again.network.parameters()) and not again.network.training
    assert (folder / "README.md").read_text() == "what it is\n"


def test_saves_the_same_bytes_twice(folder: File, tmp_path: File) -> None:
    load(folder, backend="eager").save(tmp_path / "copy")
    for name in (*CORE, "provenance.json", "costs/aaaabbbbcccc.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (folder / name).read_bytes(), name


def test_nothing_on_disk_is_a_pickle(folder: File) -> None:
    found = [file for file in folder.rglob("*") if file.is_file()]
    assert {file.suffix for file in found} == {".toml", ".safetensors", ".json", ".md"}
    for file in found:
        data = file.read_bytes()
        assert not data.startswith((b"\x80", b"PK")), file  # a pickle, a zip of pickles
        if file.suffix != ".safetensors":
            data.decode()


def test_files_are_readable_as_the_mask_says(bundle: Bundle, tmp_path: File) -> None:
    before = os.umask(0o027)
    try:
        write_bundle(bundle, tmp_path / "bundle")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "bundle").rglob("*") if file.is_file()}
    assert modes == {0o640}


@pytest.mark.parametrize("name", [*CORE, "provenance.json"])
def test_a_missing_file_is_named(folder: File, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(BundleError, match=name):
        read_bundle(folder)


def test_a_missing_folder_is_named(tmp_path: File) -> None:
    with pytest.raises(BundleError, match="nowhere"):
        read_bundle(tmp_path / "nowhere")


@pytest.mark.parametrize("name", [*CORE, "costs/aaaabbbbcccc.json"])
@pytest.mark.parametrize("part", [0.0, 0.5, 0.98])
def test_an_altered_byte_is_found(folder: File, name: str, part: float) -> None:
    data = bytearray((folder / name).read_bytes())
    data[int(part * len(data))] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(BundleError, match=name):
        read_bundle(folder)


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe\x00", b"{}", b'{"sha256": "all"}'])
def test_a_provenance_that_vouches_for_nothing_is_refused(folder: File, content: bytes) -> None:
    (folder / "provenance.json").write_bytes(content)
    with pytest.raises(BundleError, match=r"provenance\.json"):
        read_bundle(folder)


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("plan.toml", toml(lambda d: d.update(extra=1)), "extra"),
        ("plan.toml", toml(lambda d: d["plan"].update(rung=4)), "rung"),
        ("plan.toml", toml(lambda d: d["plan"]["choices"][0].update(colour="red")), "colour"),
        ("plan.toml", toml(lambda d: d["architecture"].update(depht=4)), "depht"),
        ("plan.toml", toml(lambda d: d["preprocess"].pop("mean")), "mean"),
        ("plan.toml", toml(lambda d: d["architecture"].pop("dim")), "dim"),
        ("plan.toml", toml(lambda d: d["architecture"].update(heads=0)), "plan"),
        ("plan.toml", toml(lambda d: d["controller"].pop("knots")), "knots"),
        ("plan.toml", toml(lambda d: d["controller"].update(hidden=-1)), "hidden"),
        ("plan.toml", toml(lambda d: d["plan"]["choices"][0].update(name="nobody")), "nobody"),
        ("plan.toml", toml(lambda d: d.update(version=2)), "version 2"),
        ("plan.toml", toml(lambda d: d.pop("version")), "version"),
        ("plan.toml", lambda data: b"= no toml", "toml"),
        ("plan.toml", lambda data: b"\xff", "toml"),
        ("ladder.json", entries(lambda d: d.update(extra=1)), "extra"),
        ("ladder.json", entries(lambda d: d.pop("budget")), "budget"),
        ("ladder.json", entries(lambda d: d.update(budget="0.5")), "budget"),
        ("ladder.json", entries(lambda d: d["rungs"].pop()), "entries"),
        ("ladder.json", entries(lambda d: d["frontier"][0]["share"].pop()), "entries"),
        ("ladder.json", entries(lambda d: d["classes"].pop()), "class names"),
        ("ladder.json", entries(lambda d: d["paths"][0].update(width=[31, 31])), "31"),
        ("ladder.json", entries(lambda d: d["paths"][0].update(blocks=[0, 7])), "7"),
        ("ladder.json", entries(lambda d: d["paths"][0].update(tokens=[5])), "tokens"),
        ("ladder.json", entries(lambda d: d.update(glance=3)), "glance|first 3"),
        ("ladder.json", entries(lambda d: d.update(glance=-1)), "glance"),
        ("ladder.json", lambda data: b"[]", "list"),
        ("model.safetensors", tensors(lambda t: t.update({"head.project.weight": torch.zeros(3, 17)})), "head.project.weight"),
        ("model.safetensors", tensors(lambda t: t.pop("head.project.bias")), "head.project.bias"),
        ("model.safetensors", tensors(lambda t: t.update(stray=torch.zeros(1))), "stray"),
        ("model.safetensors", tensors(lambda t: t.update({"head.project.bias": torch.zeros(3, dtype=torch.float64)})), "head.project.bias"),
        ("model.safetensors", lambda data: data[: len(data) // 2], "safetensors"),
        ("controller.safetensors", tensors(lambda t: t.update(cost=torch.zeros(4))), "cost"),
        ("controller.safetensors", tensors(lambda t: t.pop("prices")), "prices"),
    ],
)
def test_what_does_not_fit_is_named_with_its_file(folder: File, name: str, change: Callable[[bytes], bytes], named: str) -> None:
    rewrite(folder, name, change)
    with pytest.raises((BundleError, PlanError), match=named) as caught:
        read_bundle(folder)
    assert str(folder / name) in str(caught.value)


def test_rewriting_alone_is_not_refused(bundle: Bundle, folder: File) -> None:
    """The control for the test above: the digests it writes are accepted."""
    for name in CORE:
        rewrite(folder, name, lambda data: data)
    rewrite(folder, "plan.toml", toml(lambda found: found))
    same(bundle, read_bundle(folder))


@pytest.mark.parametrize("survivors", range(7))
def test_a_write_cut_short_is_the_old_bundle_or_an_error(bundle: Bundle, other: Bundle, folder: File, monkeypatch: pytest.MonkeyPatch, survivors: int) -> None:
    calls, rename = [], os.replace

    def cut(source: str, target: str) -> None:
        calls.append(target)
        if len(calls) > survivors:
            raise OSError("no space left")
        rename(source, target)

    monkeypatch.setattr(os, "replace", cut)
    if survivors < 6:
        with pytest.raises(OSError, match="no space"):
            write_bundle(other, folder)
    else:
        write_bundle(other, folder)
    assert not list(folder.rglob(".*"))  # nothing half-written lies about
    if survivors <= 1:  # plan.toml comes first, and these two bundles were made by the same plan
        same(bundle, read_bundle(folder))
    elif survivors == 6:
        same(other, read_bundle(folder))  # and the times of the model before are gone
    else:
        with pytest.raises(BundleError, match="altered"):
            read_bundle(folder)


def test_new_times_cut_short_leave_the_bundle_usable(bundle: Bundle, folder: File, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `bench` does: the model stays, one table is added. Wherever it stops, the bundle loads, with the table or without."""
    more = replace(bundle, costs={**COSTS, "ddddeeeeffff": COSTS["aaaabbbbcccc"]})
    rename = os.replace
    for survivors in range(8):
        calls: list[str] = []

        def cut(source: str, target: str, calls: list[str] = calls, survivors: int = survivors) -> None:
            calls.append(target)
            if len(calls) > survivors:
                raise OSError("no space left")
            rename(source, target)

        monkeypatch.setattr(os, "replace", cut)
        try:
            write_bundle(more, folder)
        except OSError:
            assert survivors < 7
        assert set(read_bundle(folder).costs) in ({"aaaabbbbcccc"}, {"aaaabbbbcccc", "ddddeeeeffff"})
    assert set(read_bundle(folder).costs) == {"aaaabbbbcccc", "ddddeeeeffff"}


def test_times_of_another_model_are_refused(other: Bundle, folder: File, tmp_path: File) -> None:
    write_bundle(other, tmp_path / "other")
    name = "costs/ddddeeeeffff.json"
    (folder / name).write_bytes((tmp_path / "other" / name).read_bytes())
    with pytest.raises(BundleError, match="another model"):
        read_bundle(folder)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("rungz = 4", "rungz"),
        ("[[choices]]\nslot = 'reducer'\nname = 'tome'\nblock = [1]", "block"),
        ("[[choices]]\nslot = 'reducer'", "name"),
        ("rungs = '4'", "rungs"),
        ("rungs = 4.0", "rungs"),
        ("tolerance = true", "tolerance"),
        ("tolerance = nan", "tolerance"),
        ("epochs = 2020-01-01", "epochs"),
        ("rungs = ", "TOML"),
    ],
)
def test_a_plan_that_makes_no_sense_is_named(tmp_path: File, text: str, named: str) -> None:
    file = tmp_path / "plan.toml"
    file.write_text(text)
    with pytest.raises(PlanError, match=named) as caught:
        read_plan(file)
    assert str(file) in str(caught.value)


def test_an_unknown_key_is_answered_with_the_known_ones(tmp_path: File) -> None:
    (tmp_path / "plan.toml").write_text("toleranse = 1")
    with pytest.raises(PlanError, match=r"toleranse.*tolerance"):
        read_plan(tmp_path / "plan.toml")


def test_a_plan_is_read(tmp_path: File) -> None:
    (tmp_path / "plan.toml").write_text("tolerance = 1\nrungs = 3\n[[choices]]\nslot = 'reducer'\nname = 'tome'\nblocks = [1, 2]\n[choices.options]\nx = 1\n")
    assert read_plan(tmp_path / "plan.toml") == Plan(choices=(Choice("reducer", "tome", (1, 2), {"x": 1}),), tolerance=1.0, rungs=3)


def test_a_file_of_bytes_and_no_file_are_plan_errors(tmp_path: File) -> None:
    (tmp_path / "plan.toml").write_bytes(b"\xff\xfe\x00")
    for name in ("plan.toml", "nowhere.toml"):
        with pytest.raises(PlanError, match=name):
            read_plan(tmp_path / name)


def test_paths_are_checked_by_the_network_that_is_read(bundle: Bundle, folder: File) -> None:
    """A path that only another plan could serve: without its reducer the network cannot drop tokens."""
    shutil.rmtree(folder / "costs")
    full = bundle.ladder.paths[-1]
    merged = replace(full, tokens=(5, 3, 3)).to_dict()
    rewrite(folder, "ladder.json", entries(lambda d: d["paths"].__setitem__(1, merged)))
    assert read_bundle(folder).ladder.paths[1] == Path.from_dict(merged)
    rewrite(folder, "plan.toml", toml(lambda d: d["plan"]["choices"].pop(0)))
    with pytest.raises(ApportionError, match=r"ladder\.json.*no reducer"):
        read_bundle(folder)
