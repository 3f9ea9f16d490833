"""Adaptive patch sizes: every patch is in one token, none is lost, and the plain ViT is found at both ends: all fine, and all coarse."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from apportion.errors import PathError, PlanError
from apportion.measure.macs import executed_macs
from apportion.methods.tokeniser.apt import APT
from apportion.network import Architecture, Network
from apportion.vocab import Choice, Ladder, Path
from tests.conftest import DEPTH, DIM, FLAVOURS, PLAN, assert_same_state, images, random_paths, shake, state_of, tiny

GRID, PATCH, LEVEL = 4, 4, 0.2
flavours = pytest.mark.parametrize("flavour", ["class_token", "registers", "mean", "clip"])


def adaptive(flavour: str = "class_token", *, taught: bool = True) -> APT:
    apt = APT.from_dense(tiny(flavour).tokeniser, level=LEVEL)
    if taught:
        shake(apt.add)
        shake(apt.join)
    return apt.requires_grad_(False)


def counts(apt: APT) -> list[int]:
    full = apt.part.grid**2 + apt.part.prefix
    return [full - 3 * coarse for coarse in range(apt.cells**2 + 1)]


def entropy(cell: Tensor) -> float:
    """Of one cell, by counting."""
    share = [count / cell.numel() for count in Counter(cell.flatten().tolist()).values()]
    return -sum(q * math.log2(q) for q in share)


def squares(image: Tensor, side: int) -> list[Tensor]:
    return [image[..., i : i + side, j : j + side] for i in range(0, image.shape[-1], side) for j in range(0, image.shape[-1], side)]


@flavours
def test_it_is_the_definition(flavour):
    apt, inputs = adaptive(flavour), images(3)
    part, prefix = apt.part, apt.part.prefix
    position = part.position[-(GRID**2) :]
    coarse_position = F.interpolate(position.T.view(1, DIM, GRID, GRID), size=(2, 2), mode="bicubic").flatten(2)[0].T
    for tokens in counts(apt)[1:]:
        coarse, out = (counts(apt)[0] - tokens) // 3, apt(inputs, PATCH, tokens)
        assert out.x.shape == (3, tokens, DIM) and out.prefix == prefix
        assert torch.equal(out.x[:, :prefix], part(inputs, PATCH).x[:, :prefix])
        for sample in range(3):
            grey = torch.stack([w * channel for w, channel in zip((0.2989, 0.587, 0.114), inputs[sample], strict=True)]).sum(0)
            bits = [entropy(cell) for cell in squares((grey / LEVEL).round(), 2 * PATCH)]
            plain = sorted(sorted(range(4), key=lambda cell: bits[cell])[:coarse])
            members = [[(cell // 2 * 2 + i) * GRID + cell % 2 * 2 + j for i in (0, 1) for j in (0, 1)] for cell in plain]
            fine = [patch for patch in range(GRID**2) if all(patch not in each for each in members)]
            embedded = [F.conv2d(square[None], part.project.weight, part.project.bias).flatten() for square in squares(inputs[sample], PATCH)]
            wanted = [embedded[patch] + position[patch] for patch in fine]
            for cell, each in zip(plain, members, strict=True):
                half = F.interpolate(squares(inputs[sample], 2 * PATCH)[cell][None], scale_factor=0.5, mode="bilinear")
                large = F.conv2d(half, part.project.weight, part.project.bias).flatten()
                joined = apt.join(torch.stack([embedded[patch] for patch in each]).T.reshape(1, DIM, 2, 2)).flatten()
                wanted.append(large + apt.add(joined) + coarse_position[cell])
            assert_close(out.x[sample, prefix:], part.norm(torch.stack(wanted)), rtol=1e-4, atol=1e-5)
            places = {patch: place for place, patch in enumerate(fine)} | {p: len(fine) + i for i, each in enumerate(members) for p in each}
            assert out.origin[sample].tolist() == [*range(prefix), *(prefix + places[patch] for patch in range(GRID**2))]


@flavours
def test_every_patch_is_in_one_token_and_sizes_say_how_many(flavour):
    apt = adaptive(flavour)
    for seed in range(5):
        for tokens in counts(apt):
            out = apt(images(5, seed=seed), PATCH, tokens)
            for sample in range(5):
                assert torch.equal(out.origin[sample].bincount(minlength=tokens), out.size[sample].long())
            assert set(out.size[:, out.prefix :].unique().tolist()) <= {1.0, 4.0} and (out.size[:, : out.prefix] == 1).all()


@flavours
def test_without_coarse_tokens_it_is_the_plain_tokeniser(flavour):
    apt, inputs = adaptive(flavour), images(3)
    for out in (apt(inputs, PATCH), apt(inputs, PATCH, counts(apt)[0])):
        for ours, plain in zip(out, apt.part(inputs, PATCH), strict=True):
            assert torch.equal(torch.as_tensor(ours), torch.as_tensor(plain))


def half_of(network: Network, flavour: str) -> Network:
    """The same network for images of half the side, its positions resampled."""
    half = Network(Architecture(image_size=8, patch=PATCH, dim=DIM, depth=4, heads=4, hidden=64, classes=5, **FLAVOURS[flavour])).eval()
    state, grid = network.state_dict(), network.tokeniser.position[-(GRID**2) :]
    resampled = F.interpolate(grid.T.view(1, DIM, GRID, GRID), size=(2, 2), mode="bicubic").flatten(2)[0].T
    state["tokeniser.position"] = torch.cat((network.tokeniser.position[: -(GRID**2)], resampled))
    half.load_state_dict(state)
    return half.requires_grad_(False)


@flavours
def test_before_it_is_taught_all_coarse_is_the_plain_tokeniser_on_half_the_picture(flavour):
    inputs, apt = images(3), adaptive(flavour, taught=False)
    wanted = half_of(tiny(flavour), flavour).tokeniser(F.interpolate(inputs, scale_factor=0.5, mode="bilinear"), PATCH)
    assert_close(apt(inputs, PATCH, counts(apt)[-1]).x, wanted.x, rtol=1e-4, atol=1e-5)


def test_and_so_is_the_whole_network():
    network, inputs = tiny("mean").requires_grad_(False), images(3)
    half = half_of(network, "mean")
    wanted = half(F.interpolate(inputs, scale_factor=0.5, mode="bilinear"), half.space.full)
    steps = network.space.full.steps
    coarse = network.run(APT.from_dense(network.tokeniser)(inputs, PATCH, 4), tuple(step._replace(tokens=4) for step in steps))
    assert_close(network.finish(coarse), wanted, rtol=1e-4, atol=1e-4)


def test_one_colour_needs_a_quarter_of_the_patches_and_a_threshold_of_zero_needs_all():
    part = Network(Architecture(image_size=56, patch=4, dim=8, depth=1, heads=1, hidden=8, classes=2)).tokeniser
    apt = APT.from_dense(part)
    assert apt.needed(torch.full((2, 3, 56, 56), 0.7), 5.5).tolist() == [50, 50]
    assert apt.needed(torch.full((2, 3, 56, 56), 0.7), 0).tolist() == [197, 197]


@pytest.mark.parametrize(("sigma", "bits"), [(2, 3.0), (5, 4.36), (12, 5.57)])
def test_entropy_is_that_of_noise_of_known_width(sigma, bits):
    part = Network(Architecture(image_size=128, patch=16, dim=8, depth=1, heads=1, hidden=8, classes=2)).tokeniser
    grey = 128 + sigma * torch.randn(4, 1, 128, 128, generator=torch.Generator().manual_seed(0)).expand(-1, 3, -1, -1)
    inputs = grey.round() / 255 / 0.225
    apt = APT.from_dense(part)
    assert abs(float(apt.entropy(inputs).mean()) - bits) <= 0.1
    assert_close(apt.entropy(inputs - 7 * apt.level), apt.entropy(inputs), rtol=0, atol=0.05)


def test_a_range_beyond_8_bits_does_not_make_what_is_bright_look_plain():
    part = Network(Architecture(image_size=32, patch=16, dim=8, depth=1, heads=1, hidden=8, classes=2)).tokeniser
    apt, noise = APT.from_dense(part, level=0.01), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert_close(apt.entropy(noise * 0.1 + 10), apt.entropy(noise * 0.1), rtol=0, atol=0.05)


def test_what_is_needed_falls_with_the_threshold_and_rises_with_clutter():
    part = Network(Architecture(image_size=64, patch=4, dim=8, depth=1, heads=1, hidden=8, classes=2)).tokeniser
    apt, generator = APT.from_dense(part), torch.Generator().manual_seed(0)
    inputs = torch.zeros(40, 3, 64, 64)
    for clutter in range(40):
        for _ in range(clutter):
            i, j = torch.randint(0, 60, (2,), generator=generator).tolist()
            inputs[clutter, :, i : i + 4, j : j + 4] = torch.randn(3, 4, 4, generator=generator)
    needed = torch.stack([apt.needed(inputs, threshold) for threshold in (0, 1, 2, 4, 6, 9)])
    assert (needed[1:] <= needed[:-1]).all() and (needed[0] == 257).all() and (needed[-1] == 65).all()
    rank = needed[1].double().argsort(stable=True).argsort().double()
    assert float(torch.corrcoef(torch.stack((rank, torch.arange(40.0).double())))[0, 1]) >= 0.9


@flavours
def test_a_sample_does_not_depend_on_its_batch_and_nothing_is_written(flavour):
    apt, inputs = adaptive(flavour), images(4)
    before = state_of(apt)
    for tokens in counts(apt):
        together = apt(inputs, PATCH, tokens)
        for sample in range(4):
            alone = apt(inputs[sample : sample + 1], PATCH, tokens)
            assert torch.equal(alone.origin[0], together.origin[sample])
            assert_close(alone.x[0], together.x[sample], rtol=1e-4, atol=1e-5)
    assert_same_state(before, state_of(apt))


def test_the_gradient_reaches_every_pixel_and_what_is_added():
    apt, inputs = adaptive(taught=False).requires_grad_(True), images(2).requires_grad_()
    apt(inputs, PATCH, 11).x.square().sum().backward()
    assert inputs.grad is not None and (inputs.grad.abs().sum(1) > 0).all()
    assert apt.add.weight.grad is not None and apt.add.weight.grad.any()


@flavours
def test_multiply_adds_are_those_that_run(flavour):
    apt = adaptive(flavour)
    for tokens in (None, *counts(apt)):
        assert executed_macs(lambda tokens=tokens: apt(images(1), PATCH, tokens)) == apt.macs(PATCH, tokens)


@pytest.mark.slow
def test_it_compiles_whole():
    apt, inputs = adaptive(), images(2)
    compiled = torch.compile(lambda x: apt(x, PATCH, 11).x, fullgraph=True, backend="eager")
    assert_close(compiled(inputs), apt(inputs, PATCH, 11).x)


def test_what_does_not_fit_is_refused():
    apt = adaptive()
    for tokens in (16, 18, 20, 2):
        with pytest.raises(PathError, match="5 to 17 in steps of 3"):
            apt(images(1), PATCH, tokens)
    for inputs, patch in ((torch.zeros(1, 3, 20, 16), PATCH), (images(1), PATCH + 1)):
        with pytest.raises(PathError):
            apt(inputs, patch, 11)
    with pytest.raises(PlanError, match="Sequential"):
        APT.from_dense(tiny("conv_stem").tokeniser)


def test_an_odd_last_row_stays_fine():
    part = Network(Architecture(image_size=20, patch=4, dim=DIM, depth=1, heads=1, hidden=8, classes=2)).tokeniser
    out = APT.from_dense(part)(torch.zeros(1, 3, 20, 20), PATCH, 26 - 12)
    assert out.size[0].tolist() == [1.0] * 10 + [4.0] * 4
    assert all(out.size[0, out.origin[0, 1 + row * 5 + 4]] == 1 and out.size[0, out.origin[0, 1 + 20 + row]] == 1 for row in range(5))


def network_of(flavour: str = "class_token", *choices: Choice) -> Network:
    network = tiny(flavour, *choices)
    network.tokeniser = APT.from_dense(network.tokeniser, level=LEVEL).requires_grad_(False)
    shake(network.tokeniser.add)
    return network


@flavours
def test_a_path_says_how_many_tokens_enter(flavour):
    network, inputs = network_of(flavour, *PLAN), images(1)
    for entering in network.space.entering:
        left = entering - (entering - network.space.prefix) // 2
        path = network.space.path(entering=entering, tokens=(entering, left, left, left))
        start = network.tokeniser(inputs, PATCH, entering)
        wanted = network.finish(network.run(start, path.steps, before=entering))
        assert torch.equal(network(inputs, path), wanted) and torch.equal(network.at(path)(inputs), wanted)
        assert torch.equal(network.segment(1, DEPTH, path)(network.segment(0, 1, path)(start)), wanted)
        assert executed_macs(lambda path=path: network(inputs, path)) == network.macs(path)
        assert not torch.equal(wanted, network(inputs, network.space.full)) and network.macs(path) < network.macs(network.space.full)


@flavours
def test_the_full_path_stays_what_it_was_bit_for_bit(flavour):
    plain, ours = tiny(flavour, *PLAN), network_of(flavour, *PLAN)
    assert plain.space.full == ours.space.full == ours.space.path(entering=ours.space.tokens)
    for path in random_paths(plain, 4):
        assert torch.equal(ours(images(3), path), plain(images(3), path)) and ours.macs(path) == plain.macs(path)


def test_paths_keep_their_names_and_entries_where_all_enter():
    space = network_of().space
    fewer = [space.path(entering=entering) for entering in space.entering]
    assert space.full.name == "d4_t17_h4_w64_5162" and "entering" not in space.full.to_dict()
    assert len({path.name for path in (*fewer, space.full)}) == 5 and fewer[0].name.startswith("d4_t5_h4")
    for path in (*fewer, space.full):
        assert Path.from_dict(path.to_dict()) == path and path.same_start(path, 2)
    # The same blocks behind other tokenisers are other work, even before the first of them.
    assert not replace(space.full, entering=14).same_start(space.full, 0)
    with pytest.raises(PathError, match="before the decision"):
        Ladder((fewer[0], space.full), 0)


def test_a_space_refuses_what_its_tokeniser_cannot_leave():
    for network, entering, wanted in ((tiny(), 14, "all 17"), (network_of(), 13, "5, 8, 11, 14"), (network_of(), 2, "5, 8, 11, 14")):
        with pytest.raises(PathError, match=wanted):
            network.space.path(entering=entering)
        with pytest.raises(PathError, match=wanted):
            network(images(1), replace(network.space.full, entering=entering, tokens=(entering,) * DEPTH))
    with pytest.raises(PathError, match="at most 14"):  # more than enter cannot stay
        network_of("class_token", *PLAN).space.path(entering=14, tokens=17)


def test_an_architecture_builds_it_around_the_same_weights():
    shape = replace(tiny().architecture, grey_level=LEVEL)
    network = Network(shape).eval().requires_grad_(False)
    state = {name.replace("tokeniser.", "tokeniser.part."): value for name, value in tiny().state_dict().items()}
    found = network.load_state_dict(state, strict=False)
    assert {name.split(".")[1] for name in found.missing_keys} == {"join", "add"} and not found.unexpected_keys
    assert torch.equal(network(images(2), network.space.full), tiny()(images(2), tiny().space.full)) and len(network.space.entering) == 4
    with pytest.raises(PlanError, match="Sequential"):
        Network(replace(tiny("conv_stem").architecture, grey_level=LEVEL))
