"""The perceiver against its definition with an explicit mask; each setting against the network that has nothing else; leaving when sure; control's tables."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from apportion.control import fit_controller
from apportion.control.rules import confidence_cascade
from apportion.deliver import deciding
from apportion.errors import PathError, PlanError
from apportion.intake import ImageSet, Preprocess
from apportion.measure.macs import executed_macs
from apportion.network import put, sort_by_importance
from apportion.network.perceiver import Grouped, Perceiver, PerceiverArchitecture
from apportion.vocab import Choice, Ladder, Path
from tests.conftest import assert_same_state, shake, state_of

torch.set_num_threads(1)
DIM, HEADS, DEPTH, HIDDEN, LATENTS, PATCHES, CLASSES = 32, 4, 3, 64, (2, 4, 7), 9, 5
SHAPE = {"image_size": 12, "patch": 4, "dim": DIM, "depth": DEPTH, "heads": HEADS, "hidden": HIDDEN, "classes": CLASSES, "latents": LATENTS}
FLAVOURS = {"plain": {}, "per_patch": {"per_patch": True}, "scaled": {"layer_scale": True, "qk_norm": True, "stem": "conv"}}
flavours = pytest.mark.parametrize("flavour", list(FLAVOURS))


def tiny(flavour: str = "plain", **changes) -> Perceiver:
    torch.manual_seed(0)
    network = Perceiver(PerceiverArchitecture(**{**SHAPE, **FLAVOURS[flavour], **changes})).eval().requires_grad_(False)
    shake(network)
    return network


def images(batch: int, *, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def some(network: Perceiver) -> list[Path]:
    """Full, cheapest, and others that mix the axes; the last with a width for each block."""
    space = network.space
    mixed = space.path(tokens=4, width=(16, 64, 8))
    return [space.full, network.settings()[0], space.path(tokens=2, blocks=(0, 1)), space.path(tokens=4, width=16), mixed]


def naive(network: Perceiver, inputs: Tensor, path: Path, *, states: list[Tensor] | None = None) -> Tensor:
    """What the weights say, by the definitions: all latents run, with one mask for attention and one for hidden units; nothing of the network's own is used."""
    a, w, c, n = network.shape, network.state_dict(), DIM // HEADS, LATENTS[-1]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def turned(x: Tensor) -> Tensor:
        """Pairs (i, i + c / 2) of latent number p as complex numbers, times e^(i p / 10000^(2 i / c))."""
        angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] / 1e4 ** (torch.arange(0, c, 2, dtype=x.dtype) / c)
        turned = torch.complex(x[..., : c // 2], x[..., c // 2 :]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((turned.real, turned.imag), -1)

    def look(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        scores = q @ k.transpose(-1, -2) / math.sqrt(c)
        return (scores if mask is None else scores.masked_fill(~mask, -math.inf)).softmax(-1) @ v

    def crossed(query: Tensor, found: Tensor, name: str, *, reads: bool) -> Tensor:
        q, (keys, values) = linear(norm(query, f"{name}.query_norm"), f"{name}.query"), found.chunk(2, -1)
        parts = [slice(head * c, head * c + c) for head in range(HEADS)]
        out = [look(turned(q[..., p]) if reads else q[..., p], keys[..., p] if reads else turned(keys[..., p]), values[..., p]) for p in parts]
        return query + linear(torch.cat(out, -1), f"{name}.proj")

    group = torch.tensor([sum(latent >= end for end in LATENTS) for latent in range(n)])
    mask = group[:, None] >= group[None, :]
    patches = linear(norm(network.tokeniser.part(inputs, a.patch).x, "tokeniser.sources.0"), "tokeniser.sources.1")
    x = crossed(w["latent"].expand(len(inputs), n, DIM), patches, "reader", reads=True)
    for step in path.steps:
        at = f"blocks.{step.block}"
        qkv, heads = linear(norm(x, f"{at}.norm1"), f"{at}.mixer.part.qkv"), []
        for head in range(HEADS):
            q, k, v = qkv[..., 3 * c * head : 3 * c * (head + 1)].split(c, -1)
            q, k = (norm(y, f"{at}.mixer.part.{side}_norm") if a.qk_norm else y for y, side in ((q, "query"), (k, "key")))
            heads.append(look(turned(q), turned(k), v, mask))
        x = x + w.get(f"{at}.residual1.scale", 1) * linear(torch.cat(heads, -1), f"{at}.mixer.part.proj")
        units = F.gelu(linear(norm(x, f"{at}.norm2"), f"{at}.ffn.part.up")) * (torch.arange(HIDDEN) < step.width)
        x = x + w.get(f"{at}.residual2.scale", 1) * linear(units, f"{at}.ffn.part.down")
        if states is not None:
            states.append(x)
    query = linear(patches, "patch_query") if a.per_patch else w["head.query"].expand(len(x), 1, DIM)
    found = linear(norm(x[:, : path.tokens[0]], "head.sources.0"), "head.sources.1")
    out = linear(norm(crossed(query, found, "head.cross", reads=False), "head.norm"), "head.project")
    return out if a.per_patch else out[:, 0]


@flavours
def test_every_setting_is_the_definition(flavour):
    network = tiny(flavour).double()
    for path in some(network):
        assert_close(network(images(2).double(), path), naive(network, images(2).double(), path), rtol=0, atol=1e-6)


@pytest.mark.parametrize("fault", ["all see all", "no turn", "width"])
def test_the_definition_catches(fault, monkeypatch):
    network = tiny().double()
    if fault == "all see all":
        monkeypatch.setattr("apportion.network.perceiver.groups", lambda ends, latents: [(0, latents)])
    elif fault == "no turn":
        monkeypatch.setattr("apportion.network.perceiver.rotated", lambda x, angle: x)
    else:
        monkeypatch.setattr(type(network.blocks[0].ffn), "forward", lambda self, x, width, notes=None, size=None: self.part(x, HIDDEN, notes))
    with pytest.raises((AssertionError, ValueError)):  # latents that are not turned are one
        test_every_setting_is_the_definition("plain")


@flavours
def test_the_first_latents_never_see_the_rest(flavour):
    """Every number of latents after every block: alone, and as the first of a full run."""
    network = tiny(flavour)
    for width in network.space.width:
        whole: dict = {}
        network(images(3), network.space.path(width=width), whole)
        for latents in LATENTS:
            alone: dict = {}
            answer = network(images(3), network.space.path(tokens=latents, width=width), alone)
            prefix = PATCHES if flavour == "per_patch" else 0
            for mine, theirs in zip(alone["feature"], whole["feature"], strict=True):
                assert mine.shape[1] == prefix + latents
                assert_close(mine, theirs[:, : prefix + latents], rtol=0, atol=1e-5)
            state = network.run(network.tokeniser(images(3), 4), network.space.path(width=width).steps)
            assert_close(network.finish(network.first(state, latents)), answer, rtol=0, atol=1e-5)


def test_latents_differ_though_they_begin_as_one_vector():
    network = tiny()
    read = network.reader(network.latent, network.tokeniser(images(1), 4).x, 7)[0]
    apart = torch.cdist(read, read)[torch.triu_indices(7, 7, 1).unbind()]
    assert apart.min() > 1e-3


@flavours
def test_a_setting_is_the_network_that_has_nothing_else(flavour):
    """Depth, width and latents cut out of the weights: built for that setting alone, it answers the same."""
    network = tiny(flavour)
    for path in (network.space.path(blocks=(0, 1), width=16, tokens=4), network.space.path(blocks=(0,), width=32), network.space.path(width=8, tokens=2)):
        alone = tiny(flavour, depth=len(path.blocks), hidden=path.width[0], latents=tuple(t for t in LATENTS if t <= path.tokens[0]))
        state = network.state_dict()
        alone.load_state_dict({name: state[name][tuple(slice(size) for size in value.shape)] for name, value in alone.state_dict().items()})
        assert_close(network(images(3), path), alone(images(3), alone.space.full), rtol=0, atol=1e-6)
        assert network.macs(path) == alone.macs(alone.space.full)


@flavours
def test_multiply_adds_are_those_that_run_and_rise_with_every_axis(flavour):
    network = tiny(flavour)
    for path in some(network):
        assert executed_macs(lambda path=path: network(images(1), path)) == network.macs(path)
    for steps in (0, 1):
        begun = network.tokeniser.macs(4) + network.segment_macs(0, steps, network.space.full)
        assert executed_macs(lambda steps=steps: network.glance(steps)(images(1))) == begun + network.glance(steps).macs()
    space = network.space
    cost = {(t, w, len(n)): network.macs(space.path(tokens=t, width=w, blocks=n)) for t in space.counts for w in space.width for n in space.orders}
    for axis, values in enumerate((space.counts, space.width, tuple(range(1, DEPTH + 1)))):
        for setting in cost:
            larger = [value for value in values if value > setting[axis]]
            assert not larger or cost[setting] < cost[(*setting[:axis], larger[0], *setting[axis + 1 :])]
    paths = network.settings()
    assert len(paths) == len(cost) == len(set(paths)) and paths[-1] == space.full and [network.macs(path) for path in paths] == sorted(cost.values())


@flavours
def test_pieces_make_the_whole(flavour):
    network = tiny(flavour)
    before = state_of(network)
    for path in some(network):
        whole, last, start = network(images(2), path), len(path.steps), network.tokeniser(images(2), path.patch)
        assert whole.shape == ((2, PATCHES, CLASSES) if flavour == "per_patch" else (2, CLASSES))
        for cut in range(1, last):
            assert torch.equal(network.segment(cut, last, path)(network.segment(0, cut, path)(start)), whole)
        assert torch.equal(network.at(path)(images(2)), whole) and torch.equal(network.segment(0, last, path)(start), whole)
        alone = torch.cat([network(image[None], path) for image in images(2)])
        assert_close(alone, whole, rtol=1e-4, atol=1e-5)
    assert_same_state(before, state_of(network))


@flavours
@pytest.mark.parametrize("steps", [0, 1])
def test_the_glance_is_where_every_rung_goes_on_from(flavour, steps):
    network = tiny(flavour)
    full, cheapest = network.space.full, network.settings()[0]
    state, signal = network.glance(steps)(images(3))
    assert torch.equal(network.segment(steps, DEPTH, full)(state), network(images(3), full)) and signal.shape == (3, 2 * DIM + 7)
    if not steps:
        shares = network(images(3), cheapest).softmax(-1).sort(-1, descending=True).values
        top = shares if flavour != "per_patch" else shares.mean(1)
        assert_close(signal[:, -7:-2], top)
        assert torch.equal(network.segment(0, 1, cheapest)(state), network(images(3), cheapest))


@pytest.mark.slow
@pytest.mark.parametrize("flavour", ["plain", "per_patch"])
def test_one_path_compiles_whole(flavour):
    network = tiny(flavour)
    path = some(network)[3]
    assert_close(torch.compile(network.at(path), fullgraph=True, backend="eager")(images(2)), network(images(2), path), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_served_is_refused():
    network = tiny()
    space = network.space
    refused = {
        "tokens": lambda: space.path(tokens=3),
        "every step": lambda: space.path(tokens=(7, 7, 4)),
        "width": lambda: space.path(width=12),
        "blocks": lambda: space.path(blocks=(0, 2)),
        "first 1": lambda: space.path(blocks=()),
        "heads": lambda: network(images(1), Path(4, (0,), (7,), (2,), (64,))),
        "from the tokeniser": lambda: network(images(1), Path(4, (0,), (7,), (4,), (64,), entering=5)),
        "patch": lambda: network(images(1), Path(8, (0,), (7,), (4,), (64,))),
    }
    for match, call in refused.items():
        with pytest.raises(PathError, match=match):
            call()
    for changes in ({"latents": (4, 2)}, {"latents": ()}, {"latents": (0, 4)}, {"rotary": 0.0}, {"heads": 32}):
        with pytest.raises(PlanError):
            tiny(**changes)
    with pytest.raises(PlanError, match="patch"):
        tiny("per_patch").until_sure(images(1), space.full, 0.5)


def test_other_methods_and_sorting_keep_the_answer():
    network = tiny()
    before = network(images(3), network.space.full)
    put(network, Choice("mixer", "head_prefix"))
    sort_by_importance(network, [images(4)])
    assert_close(network(images(3), network.space.full), before, rtol=1e-4, atol=1e-5)
    assert network.space.heads == (1, 2, 3, 4)
    fewer = network.space.path(heads=2)
    assert executed_macs(lambda: network(images(1), fewer)) == network.macs(fewer) and isinstance(network.blocks[0].mixer.part, Grouped)


def test_leaving_when_sure_is_the_cascade_over_exits():
    """Per sample, whatever the batch; charged for every answer on the way; and what control's own rule makes of the table."""
    network, inputs = tiny(), images(24)
    path = network.space.path(tokens=4, width=32)
    exits = [network.space.path(tokens=4, width=32, blocks=range(n)) for n in (1, 2, 3)]
    answers = torch.stack([network(inputs, exit) for exit in exits], 1)
    threshold = float(answers.softmax(-1).amax(-1)[:, :2].median())
    logits, depth = network.until_sure(inputs, path, threshold)
    sure = answers.softmax(-1).amax(-1) >= threshold
    wanted = [next((n for n in (1, 2) if sure[row, n - 1]), 3) for row in range(24)]
    assert depth.tolist() == wanted and {1, 2, 3} == set(wanted)
    assert_close(logits, answers[torch.arange(24), depth - 1], rtol=1e-4, atol=1e-5)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    again = [network.until_sure(inputs[part], path, threshold) for part in order.split(5)]
    assert torch.equal(torch.cat([part[1] for part in again]), depth[order])
    assert_close(torch.cat([part[0] for part in again]), logits[order], rtol=1e-4, atol=1e-5)
    for number in (1, 2, 3):
        row = wanted.index(number)
        assert executed_macs(lambda row=row: network.until_sure(inputs[row : row + 1], path, threshold)) == network.macs_until(path)[number - 1]
    assert network.until_sure(inputs, path, 0.0)[1].eq(1).all() and network.until_sure(inputs, path, 1.1)[1].eq(3).all()


def samples_of(rows: int) -> tuple[ImageSet, Preprocess]:
    pixels = np.random.default_rng(0).integers(0, 256, (rows, 12, 12, 3), dtype=np.uint8)
    return ImageSet(pixels, torch.arange(rows) % CLASSES, tuple("abcde")), Preprocess(12, (0.5,) * 3, (0.5,) * 3)


@pytest.mark.slow
def test_control_learns_from_its_table():
    """A ladder over all three axes is measured and decided about as any network's is; the scout is charged to every rung."""
    network, (samples, feed) = tiny(), samples_of(120)
    ladder = Ladder((*network.settings()[::12], network.space.full), 0)
    decision = deciding.decision_macs(2 * DIM + 7, len(ladder.paths))
    table = deciding.outcomes(network, ladder, samples, feed, decision=decision)
    ahead = network.settings()[0]
    spent = [network.macs(path) + network.segment_macs(0, 1, ahead) + decision for path in ladder.paths]
    assert_close(table.cost, torch.tensor(spent) / spent[-1])
    inputs, _ = next(samples.batches(120, feed))
    assert torch.equal(table.agree[:, 0], network(inputs, ladder.paths[0]).argmax(-1) == network(inputs, network.space.full).argmax(-1))
    controller = fit_controller(table, fit_rows=torch.arange(80), calibrate_rows=torch.arange(80, 120), seed=0)
    choice = controller(table.signal, *controller.setting(budget=0.8))
    assert choice.shape == (120,) and set(choice.tolist()) <= set(range(len(ladder.paths)))


def test_the_cascade_over_exits_costs_what_leaving_when_sure_does():
    network, (samples, feed) = tiny(), samples_of(8)
    exits = Ladder(tuple(network.space.path(blocks=range(n)) for n in (1, 2, 3)), 1)
    table = deciding.outcomes(network, exits, samples, feed)
    macs = torch.tensor([network.macs(path) for path in exits.paths], dtype=torch.float64)
    reuse = torch.cat([torch.zeros(1), macs[:-1] - network.head.macs(7, 0)]) / macs[-1]
    for thresholds, number in ((torch.tensor([0.0, 0.0]), 0), (torch.tensor([2.0, 0.0]), 1), (torch.tensor([2.0, 2.0]), 2)):
        spent = confidence_cascade(replace(table, cost=macs / macs[-1]), thresholds, reuse).cost
        assert spent * macs[-1] == pytest.approx(network.macs_until(network.space.full)[number])


def test_every_pair_of_settings_differs():
    """No axis is without effect: otherwise the tests above would say little."""
    network = tiny()
    answers = torch.stack([network(images(1), path)[0] for path in network.settings()])
    assert min((one - two).abs().max() for one, two in itertools.combinations(answers, 2)) > 1e-4
