"""Folding against the network before it, on every kind of path."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from apportion.errors import NoEffect, PlanError, Refused
from apportion.measure.macs import executed_macs
from apportion.methods import find, names
from apportion.methods.residual.plain import Plain
from apportion.methods.weight.dense import DenseWeight
from apportion.network import Architecture, Network, put
from apportion.network.fold import fold
from apportion.vocab import Choice
from tests.conftest import DEPTH, DIM, FLAVOURS, HEADS, HIDDEN, PLAN, assert_same_state, images, random_paths, reducers, shake, state_of, tiny

flavours = pytest.mark.parametrize("flavour", list(FLAVOURS))
PER_BLOCK = {"norm1": "mixer.qkv", "norm2": "ffn.up"}
PER_BLOCK_SCALED = {**PER_BLOCK, "residual1": "mixer.proj", "residual2": "ffn.down"}
BESIDE_BLOCKS = {"mean": {("head.norm", "head.project")}, "attention_pool": {("head.pool_norm", "head.up")}}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def folded(network: Network) -> Network:
    twin = copy.deepcopy(network)
    fold(twin)
    return twin


def assert_equal_on_paths(network: Network, other: Network, *, atol: float, count: int = 4) -> None:
    inputs = images(3).to(network.tokeniser.position)
    for path in random_paths(network, count):
        assert_close(other(inputs, path), network(inputs, path), rtol=0, atol=atol)


class Counted(TorchDispatchMode):
    """How often each operator runs, and how many layer norms still multiply and add."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.count[name] += 1
        if name == "native_layer_norm" and args[2] is not None:
            self.count["affine"] += 1
        return func(*args, **(kwargs or {}))


def counted(network: Network) -> Counter[str]:
    with Counted() as counter, torch.no_grad():
        network(images(1), network.space.full)
    return counter.count


@flavours
def test_every_path_answers_as_before(flavour):
    single = tiny(flavour, *PLAN)
    double = copy.deepcopy(single).double()
    assert_equal_on_paths(double, folded(double), atol=1e-9)
    assert_equal_on_paths(single, folded(single), atol=1e-4, count=2)


@pytest.mark.parametrize("slot", ["mixer", "ffn", "adapter", "reducer", "residual"])
def test_every_method_on_the_shelf_answers_as_before(slot):
    for name in reducers() if slot == "reducer" else names(slot):
        network = tiny("layer_scale", *(choice for choice in PLAN if choice.slot not in (slot, "reducer")))
        part = getattr(network.blocks[0], "residual1" if slot == "residual" else slot)
        if type(part) is not find(slot, name) and getattr(find(slot, name), "from_dense", None):
            put(network, Choice(slot, name))
        shake(network, seed=1).double()
        assert_equal_on_paths(network, folded(network), atol=1e-9)


@flavours
def test_it_says_what_went_where(flavour):
    network = tiny(flavour)
    a, places = network.architecture, {(change.where, change.after) for change in fold(network)}
    per_block = {} if not a.norm_first else PER_BLOCK_SCALED if a.layer_scale else PER_BLOCK
    wanted = {(f"blocks.{i}.{part}", f"blocks.{i}.{into}") for i in range(DEPTH) for part, into in per_block.items()}
    assert places == wanted | BESIDE_BLOCKS.get(flavour, set()) | ({("tokeniser.position", "tokeniser.first")} if a.position_prefix and a.prefix else set())


def test_fewer_operations_run():
    network = tiny("layer_scale")
    twin = folded(network)
    before, after = counted(network), counted(twin)
    assert all(isinstance(part, Plain) for block in twin.blocks for part in (block.residual1, block.residual2))
    assert before["mul"] - after["mul"] == 2 * DEPTH
    assert before["native_layer_norm"] == after["native_layer_norm"]
    assert (before["affine"], after["affine"]) == (2 * DEPTH + 1, 1)
    assert sum(before.values()) - before["affine"] > sum(after.values()) - after["affine"]


@pytest.mark.parametrize("flavour", ["class_token", "mean", "attention_pool"])
def test_the_signal_that_a_controller_was_taught_stays(flavour):
    network = tiny(flavour, *PLAN).double()
    twin, inputs = folded(network), images(4, dtype=torch.float64)
    for steps in (0, 1, 2):
        # The signal is float32 whatever the network is: one rounding of it.
        assert_close(twin.glance(steps)(inputs)[1], network.glance(steps)(inputs)[1], rtol=1e-6, atol=1e-6)


def test_no_product_came_or_went():
    network = tiny("attention_pool", *PLAN)
    twin, path = folded(network), random_paths(network, 2)[1]
    assert executed_macs(lambda: network(images(1), path)) == executed_macs(lambda: twin(images(1), path)) == network.macs(path)


def test_a_norm_that_others_read_as_well_stays():
    class Reads(nn.Module):
        def forward(self, x: Tensor, branch: Tensor) -> Tensor:
            return branch + x.tanh()

    network = tiny("layer_scale", *PLAN).double()
    network.blocks[1].adapter = Reads()
    twin = copy.deepcopy(network)
    left = {f"blocks.1.{part}" for part in ("norm1", "norm2", "residual1", "residual2")} - {change.where for change in fold(twin)}
    assert left == {"blocks.1.norm2", "blocks.1.residual2"}
    x, path = images(2, dtype=torch.float64), network.space.path(width=HIDDEN // 4)
    assert_close(twin(x, path), network(x, path), rtol=0, atol=1e-9)


def test_a_product_that_runs_only_at_times_keeps_its_norm():
    class Sometimes(nn.Module):
        """Reads the normed tokens, of which a probe sees nothing."""

        def __init__(self) -> None:
            super().__init__()
            self.extra = DenseWeight(DIM, DIM)

        def forward(self, x: Tensor, branch: Tensor) -> Tensor:
            return branch + self.extra(x) if x.abs().max() > 1e6 else branch

    network = tiny()
    network.blocks[2].adapter = Sometimes()
    assert not [change for change in fold(network) if change.where.startswith("blocks.2.")]


def texts(batch: int, *, seed: int = 0) -> Tensor:
    """Ids below 20 in rows of 9 to 12, with padding (0) behind."""
    ids = torch.randint(1, 20, (batch, 12), generator=torch.Generator().manual_seed(seed))
    return ids * (torch.arange(12) < torch.arange(9, 9 + batch)[:, None].clamp_max(12))


def reader(*, norm_first: bool) -> Network:
    """A network for texts: gated, without shifts, as in ModernBERT; or with its norms behind, as in BERT."""
    bert = {"norm_first": False, "positions": 12}
    modern = {"gated": True, "norm_bias": False, "ffn_bias": False, "first_norm": False, "rotary": 1e4}
    torch.manual_seed(0)
    head = {"head_hidden": "gelu", "head_hidden_norm": True}
    shape = Architecture(0, 0, DIM, DEPTH, HEADS, HIDDEN, 5, words=20, length=12, final_norm=norm_first, **(modern if norm_first else bert), **head)
    network = Network(shape).eval().requires_grad_(False)
    shake(network)
    for choice in PLAN:
        put(network, choice)
    return network.double()


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_network_for_texts_answers_as_before(norm_first):
    network = reader(norm_first=norm_first)
    twin = copy.deepcopy(network)
    places = {change.where: change.after for change in fold(twin)}
    assert places.pop("head.project.2") == "head.project.3"
    assert ("blocks.0.norm1" in places) is False and places.get("blocks.1.norm2") == ("blocks.1.ffn.part.up, blocks.1.ffn.part.gate" if norm_first else None)
    for path in random_paths(network, 4):
        assert_close(twin(texts(3), path), network(texts(3), path), rtol=0, atol=1e-9)
    with pytest.raises(PlanError, match="no images"):
        fold(network, mean=MEAN, std=STD)


def test_nothing_left_to_fold_is_an_error():
    network = folded(tiny("layer_scale", *PLAN))
    before = state_of(network)
    with pytest.raises(NoEffect, match="nothing can be folded"):
        fold(network)
    assert_same_state(before, state_of(network))


def test_parameters_stay_frozen_or_free_as_they_were():
    for wanted in (False, True):
        network = tiny("qk_norm", *PLAN).requires_grad_(wanted)
        fold(network)
        assert all(parameter.requires_grad is wanted for parameter in network.parameters())


@pytest.mark.parametrize("flavour", ["class_token", "registers", "clip"])
def test_a_network_that_normalises_by_itself(flavour):
    network = tiny(flavour, *PLAN).double()
    twin = copy.deepcopy(network)
    assert ("inputs", "mean and std", "tokeniser.project") in fold(twin, mean=MEAN, std=STD)
    raw = images(2, dtype=torch.float64).sigmoid()
    mean, std = (torch.tensor(value, dtype=torch.float64)[:, None, None] for value in (MEAN, STD))
    for path in random_paths(network, 3):
        assert_close(twin(raw, path), network((raw - mean) / std, path), rtol=0, atol=1e-9)


def test_a_padded_stem_is_refused_and_nothing_is_touched():
    network = tiny("conv_stem", *PLAN)
    before = state_of(network)
    with pytest.raises(Refused, match=r"tokeniser\.project.*pads"):
        fold(network, mean=MEAN, std=STD)
    assert_same_state(before, state_of(network))


@pytest.mark.parametrize(("mean", "std"), [(MEAN, None), (None, STD), (MEAN[:2], STD), (MEAN, (0.2, 0.0, 0.2))])
def test_half_a_normalisation_is_refused(mean, std):
    with pytest.raises(PlanError, match="mean"):
        fold(tiny(), mean=mean, std=std)


@torch.no_grad()
def scaled(dtype: torch.dtype, scale: float) -> Network:
    """A network whose LayerScale starts out as in the paper: small, and the same for every channel."""
    network = tiny("layer_scale")
    for block in network.blocks:
        block.residual1.scale.fill_(scale)
        block.residual2.scale.fill_(scale)
    return network.to(dtype)


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float16, 1e-5), (torch.bfloat16, 1e-38), (torch.float32, 1e-40)])
def test_factors_that_the_dtype_cannot_hold_in_a_product_are_refused(dtype, scale):
    network = scaled(dtype, scale)
    before = state_of(network)
    with pytest.raises(Refused, match=r"blocks\.0\.residual1 in blocks\.0\.mixer\.proj"):
        fold(network)
    assert_same_state(before, state_of(network))


@pytest.mark.parametrize("spread", [1.0, 1e2, 1e4])
def test_in_bfloat16_a_wide_spread_of_gains_loses_no_more_than_before(spread):
    network = tiny()
    for block in network.blocks:
        for norm in (block.norm1, block.norm2):
            norm.weight.copy_(spread ** -torch.rand(DIM, generator=torch.Generator().manual_seed(0)))
    half = network.bfloat16()
    exact, full = copy.deepcopy(half).double(), network.space.full
    inputs = images(32).bfloat16()
    right = exact(inputs.double(), full)
    before, after = ((each(inputs, full).double() - right).norm() for each in (half, folded(half)))
    assert after < 1.5 * before


def test_a_head_without_classes_keeps_its_norm():
    torch.manual_seed(0)
    shape = Architecture(16, 4, DIM, DEPTH, HEADS, HIDDEN, 0, class_token=False, pool="mean", head_norm=True)
    network = Network(shape).eval().requires_grad_(False)
    twin = copy.deepcopy(shake(network))
    assert all(change.where != "head.norm" for change in fold(twin))
    assert_close(twin(images(2), twin.space.full), network(images(2), network.space.full), rtol=0, atol=1e-4)
