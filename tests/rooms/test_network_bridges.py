"""Maps in place of blocks: recovered where blocks are affine, ridge by its definition, kept only where answers gain, and the whole way to a bundle."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path as File
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from apportion import verbs
from apportion.deliver.adapted import load
from apportion.deliver.bundle import save as write_bundle
from apportion.deliver.costs import rung_macs
from apportion.deliver.deciding import stated
from apportion.engine import build, plain, serving
from apportion.errors import DataError, NoEffect, PathError, PlanError
from apportion.intake import Preprocess
from apportion.measure.macs import executed_macs
from apportion.network import Network, fit_bridges, keep_bridges, left_out, put
from apportion.network.bridges import Moments
from apportion.network.model import gaps
from apportion.network.packed import Packed
from apportion.train import sandwich
from apportion.vocab import Choice, Ladder, Plan
from tests.conftest import DEPTH, DIM, images, tiny
from tests.rooms.test_deliver_bundle import CHOICES, made_up_bundle
from tests.rooms.test_network_fold import reader, texts
from tests.test_cli import painted, shell, small

BRIDGE = Choice("bridge", "surrogate")


def network(*, skips: bool = True) -> Network:
    made = tiny("class_token", *([Choice("depth", "skip")] if skips else []), BRIDGE)
    return made.double()


def batches(count: int = 3, size: int = 16) -> list[Tensor]:
    return [images(size, seed=seed, dtype=torch.float64) for seed in range(count)]


HELD = [images(8, seed=9, dtype=torch.float64)]


@torch.no_grad()
def affine_run(blocks: nn.ModuleList) -> None:
    """Blocks that add to each token a linear map of itself and of the mean of all: attention that looks at all tokens alike, no norm, no activation."""
    for block in blocks:
        part = block.mixer
        weight, bias = part.qkv.weight.view(4, 3, 8, DIM), part.qkv.bias.view(4, 3, 8)
        weight[:, :2].zero_()
        bias[:, :2].zero_()
        block.norm1, block.norm2, block.ffn.act = nn.Identity(), nn.Identity(), nn.Identity()


def test_what_is_left_out() -> None:
    assert gaps((0, 3), 6) == ((1, 3), (4, 6)) and gaps((0, 1, 2), 3) == () and gaps((2,), 3) == ((0, 2),) and gaps((3,), 4, after=2) == ()
    made = network()
    assert left_out(made, [made.space.path(blocks=blocks) for blocks in ((0, 3), (0, 1, 3), (0, 1, 2, 3), (0, 3))]) == ((1, 3), (2, 3))


def test_a_run_that_is_affine_in_tokens_and_their_mean_is_recovered() -> None:
    made = network()
    affine_run(made.blocks[1:3])
    # The mean of attention is over all tokens, that of the map over those beyond the prefix: with the prefix out of attention's reach they are one.
    for block in made.blocks[1:3]:
        block.mixer.forward = Uniform(block.mixer).forward
    (found,) = fit_bridges(made, [(1, 3)], batches(6), held_out=HELD, ridges=(1e-12,))
    path, full = made.space.path(blocks=(0, 3)), made.space.full
    assert found.error < 1e-4 and found.mapped < 1e-6 < 0.01 < found.skipped and found.pays
    assert_close(made(HELD[0], path), made(HELD[0], full), rtol=0, atol=1e-3)
    keep_bridges(made, ())
    assert made.bridge.runs == () and (made(HELD[0], path) - made(HELD[0], full)).abs().max() > 0.05


class Uniform:
    """Attention that takes the mean of the tokens beyond the prefix, whatever they are."""

    def __init__(self, part: nn.Module) -> None:
        self.part, self.plain = part, part.forward

    def forward(self, tokens, heads, notes=None):
        mixed = self.plain(tokens, heads, notes)
        value = self.part.qkv(tokens.x).view(*tokens.x.shape[:2], 4, 3, 8)[..., 2, :].flatten(2)  # pyright: ignore
        return mixed._replace(out=self.part.proj(value[:, 1:].mean(1, keepdim=True).expand_as(value)))  # pyright: ignore


def test_ridge_is_the_definition_and_shrinks_to_leaving_the_run_out() -> None:
    made, batch = network(), batches(1)[0]
    x = made.tokeniser(batch, 4).x
    y = made.run(made.tokeniser(batch, 4), made.space.full.steps[:2]).x
    seen = torch.cat((x, x[:, 1:].mean(1, keepdim=True).expand_as(x)), -1).flatten(0, 1)
    weight = 0.1 * (seen - seen.mean(0)).square().sum() / (2 * DIM)
    # Ridge is least squares with one more row for each input, and an intercept that those rows leave alone.
    rows = torch.cat((F.pad(seen, (0, 1), value=1), F.pad(weight.sqrt() * torch.eye(2 * DIM, dtype=torch.float64), (0, 1))))
    wanted = torch.linalg.lstsq(rows, F.pad((y - x).flatten(0, 1), (0, 0, 0, 2 * DIM))).solution
    moments = Moments.of(made, [(0, 2)], [batch[:5], batch[5:]], "some")
    found = moments.solved((0, 2), 0.1)
    assert_close(found, wanted)
    missed = F.pad(seen, (0, 1), value=1) @ found - (y - x).flatten(0, 1)
    assert moments.error((0, 2), found) == pytest.approx((missed.norm() / (y - x).norm()).item())
    none = moments.solved((0, 2), 1e12)
    assert none[:-1].abs().max() < 1e-9
    assert_close(none[-1], (y - x).flatten(0, 1).mean(0))


def test_a_map_stays_only_where_answers_gain_on_inputs_it_has_not_seen() -> None:
    made, runs = network(), [(1, 2), (1, 3), (2, 4), (1, 4)]
    full, held = made.space.full, torch.cat(HELD)
    before = made(held, full)
    found = fit_bridges(made, [*runs, (1, 2)], batches(), held_out=HELD)
    assert [each.run for each in found] == sorted(runs) and made.bridge.runs == tuple(each.run for each in found if each.pays)
    assert torch.equal(made(held, full), before)
    for each in found:
        path = made.space.path(blocks=[block for block in range(DEPTH) if not each.run[0] <= block < each.run[1]])
        now = (made(held, path) - before).square().mean().item()
        assert now == pytest.approx(each.mapped if each.pays else each.skipped, rel=1e-9) and 0 < each.error < 2
    worse = fit_bridges(made, runs, batches(), held_out=HELD, apart=lambda answers, wanted: -(answers - wanted).square().mean())
    assert {each.run for each in worse if each.pays} == {each.run for each in found if not each.pays}
    few = fit_bridges(made, [(1, 3)], [images(2, seed=3, dtype=torch.float64)], held_out=HELD)
    assert few[0].error > next(each for each in found if each.run == (1, 3)).error


def test_padding_is_no_token_to_fit_to() -> None:
    made, inputs = reader(norm_first=True), texts(8)
    alone = [row[row > 0][None] for row in inputs]
    together, apart = (Moments.of(made, [(0, 2)], some, "some") for some in ([inputs], alone))
    assert_close(together.solved((0, 2), 0.1), apart.solved((0, 2), 0.1), rtol=0, atol=1e-8)


def test_what_makes_no_sense_is_refused() -> None:
    made = network()
    for run in ((-1, 2), (2, 2), (3, 1), (0, DEPTH + 1)):
        with pytest.raises(PathError, match="blocks"):
            fit_bridges(made, [run], batches(), held_out=HELD)
    with pytest.raises(DataError, match="calibration"):
        fit_bridges(made, [(1, 2)], [], held_out=HELD)
    with pytest.raises(DataError, match="held-out"):
        fit_bridges(made, [(1, 2)], batches(), held_out=[])
    for ridges in ((), (0.0,), (1.0, -1.0)):
        with pytest.raises(PlanError, match="ridges"):
            fit_bridges(made, [(1, 2)], batches(), held_out=HELD, ridges=ridges)
    with pytest.raises(PlanError, match="NoBridge"):
        fit_bridges(tiny(), [(1, 2)], batches(), held_out=HELD)


def test_it_is_taught_like_any_other_part_and_branches_go_by_it() -> None:
    made = network()
    fit_bridges(made, [(1, 3), (2, 4)], batches(), held_out=HELD, apart=lambda answers, wanted: (answers - wanted).square().mean())
    keep_bridges(made, made.bridge.runs)
    made.requires_grad_(True)
    space = made.space
    paths = [space.path(blocks=blocks) for blocks in ((0, 1), (0, 3))]
    objective = sandwich(paths, extra=0, feature_weight=0)
    loss = objective(made, HELD[0], torch.zeros(8, dtype=torch.int64), random.Random(0))
    loss.backward()
    assert made.bridge.runs and all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in made.bridge.parameters())


def planted_bundle():
    """Maps that do something, whatever answers gain by them."""
    made = made_up_bundle()
    put(made.network, replace(BRIDGE, options={"runs": "1-2 1-3"}))
    for parameter in made.network.bridge.parameters():
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    made.network.requires_grad_(False)
    plan = stated(replace(made.plan, choices=(*CHOICES, BRIDGE)), made.network)
    return replace(made, plan=plan, costs={})


def test_a_bundle_keeps_the_maps_and_every_rung_goes_by_them(tmp_path: File) -> None:
    made = planted_bundle()
    assert made.plan.choices[-1].options == {"runs": "1-2 1-3"}
    write_bundle(made, tmp_path)
    back = load(tmp_path, backend="eager", buckets=(1, 4))
    back.engine = back.built("eager", make=plain)
    network, path = back.bundle.network, back.bundle.ladder.paths[0]
    assert network.bridge.runs == ((1, 2), (1, 3)) and network.bridged(path) == ((1, 2),)
    inputs = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    wanted = made.network(inputs, path)
    assert torch.equal(network(inputs, path), wanted) and not torch.allclose(made_up_bundle().network(inputs, path), wanted, atol=1e-3)
    back.warm()
    assert_close(back.engine.forced(inputs, 0).logits, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["inductor", "openvino", "onnxruntime"])
def test_every_back_end_runs_them(backend: Any) -> None:
    if backend != "inductor":
        pytest.importorskip(backend)
    made, inputs = planted_bundle(), torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    path = made.ladder.paths[0]
    with serving():
        graph = build(made.network.at(path), (inputs,), backend=backend, name="a path with a map")
        assert_close(graph(inputs), made.network(inputs, path), atol=1e-4, rtol=1e-4)


def test_checkpoints_are_charged_for_the_maps_on_the_way() -> None:
    made = planted_bundle().network
    paths = tuple(made.space.path(blocks=range(depth)) for depth in (1, 2, 3))
    charged = rung_macs(made, Ladder(paths, 1), made.architecture.tokens, decision=0, checkpoints=True)
    given, spent = torch.randn(1, 3, 8, 8), 0
    for rung in range(3):
        station = made.station(rung, rung + 1)
        spent += executed_macs(lambda station=station, given=given: station(given))
        given = station(given)[0]
        assert charged[rung] == spent


def test_packed_texts_refuse_them() -> None:
    packed = pytest.importorskip("tests.rooms.test_engine_packed")
    made = packed.made("bert", Choice("depth", "skip"), Choice("bridge", "surrogate", options={"runs": "1-2"}))
    depth = made.architecture.depth
    with pytest.raises(PathError, match="a map stands for blocks"):
        Packed(made, made.space.path(blocks=[0, *range(2, depth)]), slots=2)
    Packed(made, made.space.full, slots=2)


@pytest.mark.slow
def test_the_whole_way_from_the_shell(tmp_path: File) -> None:
    data = painted(tmp_path / "data", 60, labels=True)
    told: list[str] = []
    plan = verbs.with_method(Plan(rungs=3, tolerance=60.0, glance=1, never_slower=False), "surrogate")
    feed = Preprocess(32, (0.5,) * 3, (0.25,) * 3)
    weighed = verbs.adapt(small(), str(data), preprocess=feed, plan=plan, out=tmp_path / "out", backend="eager", buckets=(4,), repeats=2, tell=told.append)
    network = weighed.adapted.bundle.network
    assert any(text.startswith("fitting maps for") for text in told) and any("maps answer more like the full path" in text for text in told)
    used = {run for path in weighed.adapted.bundle.ladder.paths for run in network.bridged(path)}
    assert used <= set(network.bridge.runs) <= used | {(1, network.architecture.depth)}
    assert shell("run", tmp_path / "out", data, "--json").exit_code == 0
    with pytest.raises(NoEffect, match="whose blocks all run"):
        verbs.adapt(small(), str(data), preprocess=feed, plan=replace(plan, choices=(BRIDGE,)), backend="eager")


@pytest.mark.slow
def test_exits_learn_maps_of_their_own_and_the_model_stays_as_it_was_read(tmp_path: File) -> None:
    data, feed = painted(tmp_path / "data", 70, labels=True), Preprocess(32, (0.5,) * 3, (0.25,) * 3)
    plan = verbs.with_method(Plan(rungs=3, tolerance=60.0, glance=1, never_slower=False, epochs=2.0), "exits")
    weighed = verbs.adapt(small(), str(data), preprocess=feed, plan=plan, backend="eager", buckets=(4,), repeats=2)
    network, read = weighed.adapted.bundle.network, small()
    inputs = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    assert_close(network(inputs, network.space.full), read(inputs, read.space.full), atol=1e-5, rtol=1e-5)
    assert weighed.figures["accuracy_full"] == weighed.figures["accuracy_dense"]
    assert (1, 3) in network.bridge.runs and all(parameter.abs().max() > 0 for parameter in network.bridge.parameters())
    for wrong in (replace(plan, epochs=0.0), replace(plan, choices=(Choice("depth", "skip"),))):
        with pytest.raises(PlanError, match="maps that alone are taught"):
            verbs.adapt(small(), str(data), preprocess=feed, plan=wrong, backend="eager")
