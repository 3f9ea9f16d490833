"""Gates on attention: open at first, feeling the task even when closed, by groups the same as by a product, and worth more than dealt at random."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from apportion.measure.macs import executed_macs
from apportion.methods.mixer import mind_skip
from apportion.methods.mixer.mind_skip import MindSkip, grouped, over_capacity
from apportion.methods.slots import Mixed
from apportion.network import Architecture, Network
from apportion.network.fold import fold
from apportion.vocab import Choice, Tokens
from tests.conftest import DEPTH, DIM, FLAVOURS, HEADS, fitted, images, rows, tiny, tokens_of

SKIP = Choice("mixer", "mind_skip")
caught = pytest.raises(AssertionError)


def opinionated(*, seed: int = 0) -> MindSkip:
    mixer, _ = fitted("mixer", "mind_skip")
    assert isinstance(mixer, MindSkip)
    mixer.requires_grad_(False).router.weight.copy_(torch.randn(1, DIM, generator=torch.Generator().manual_seed(seed)))
    return mixer


def routed(*choices: Choice) -> Network:
    network = tiny("class_token", *choices, SKIP).requires_grad_(False)
    for place, block in enumerate(network.blocks):
        block.mixer.router.weight.copy_(torch.randn(1, DIM, generator=torch.Generator().manual_seed(place)))
    return network


def gates(network: Network, inputs: Tensor) -> Tensor:
    notes: dict[str, list[Tensor]] = {}
    network(inputs, network.space.full, notes)
    return torch.stack(notes["open"], 1)


@pytest.mark.parametrize("flavour", list(FLAVOURS))
def test_at_first_every_gate_is_open_and_not_a_bit_differs(flavour):
    network, dense, inputs = tiny(flavour, SKIP), tiny(flavour), images(3)
    wanted = dense(inputs, dense.space.full)
    assert_close(network(inputs, network.space.full), wanted, rtol=1e-4, atol=1e-5)  # attention is written out for a gradient
    network.requires_grad_(False)
    assert torch.equal(network(inputs, network.space.full), wanted) and (gates(network, inputs) == 1).all()


@pytest.mark.parametrize("flavour", ["class_token", "layer_scale", "post_norm"])
def test_a_closed_gate_is_a_block_without_attention(flavour):
    network, bare, inputs = tiny(flavour, SKIP), tiny(flavour), images(3)
    for block in network.blocks:
        block.mixer.gate = lambda tokens: tokens.x.new_zeros(len(tokens.x))
    for block in bare.blocks:
        block.mixer.proj.weight.zero_()
        if block.mixer.proj.bias is not None:
            block.mixer.proj.bias.zero_()
    assert_close(network(inputs, network.space.full), bare(inputs, bare.space.full), rtol=1e-6, atol=1e-6)


def test_one_number_for_each_channel_is_learnt_and_the_rest_is_as_it_was():
    network = tiny("class_token", SKIP)
    learnt = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert list(learnt) == [f"blocks.{block}.mixer.router.weight" for block in range(DEPTH)] and sum(value.numel() for value in learnt.values()) == DEPTH * DIM
    frozen = {name: value.clone() for name, value in network.state_dict().items() if name not in learnt}
    optimiser = torch.optim.Adam(learnt.values(), 1e-2)
    for _ in range(3):
        optimiser.zero_grad()
        network(images(4), network.space.full).square().sum().backward()
        optimiser.step()
    assert all(torch.equal(network.state_dict()[name], value) for name, value in frozen.items()) and all(value.abs().sum() > 0 for value in learnt.values())


def check_groups(run: Callable[[MindSkip, Tokens, int], Tensor]) -> None:
    seen = set()
    for seed in range(6):
        mixer, tokens = opinionated(seed=seed), tokens_of(5, 9, seed=seed)
        opened = mixer.gate(tokens)
        seen.update(opened.tolist())
        assert_close(run(mixer, tokens, HEADS), mixer(tokens, HEADS).out, rtol=1e-5, atol=1e-5)
        for sample in range(5):
            assert_close(run(mixer, rows(tokens, [sample]), HEADS), mixer(tokens, HEADS).out[sample, None], rtol=1e-5, atol=1e-5)
        assert executed_macs(lambda m=mixer, t=tokens: run(m, t, HEADS)) == round(5 * mixer.grouped_macs(9, HEADS, opened.mean().item()))
    assert seen == {0.0, 1.0}


def test_by_groups_it_is_the_same_and_costs_what_is_open():
    check_groups(grouped)


def test_groups_catch_rows_put_back_in_another_order():
    with caught:
        check_groups(lambda mixer, tokens, heads: grouped(mixer, tokens, heads).flip(0))


def test_a_network_by_groups_is_the_network_and_saves_the_share_that_is_closed(monkeypatch):
    network, inputs = routed(), images(6)
    wanted, share = network(inputs, network.space.full), gates(network, inputs).mean(0)
    whole = executed_macs(lambda: network(inputs, network.space.full))
    assert whole == 6 * network.macs(network.space.full) and 0.2 < share.mean() < 0.8
    nothing = torch.zeros(0)

    def forward(self: MindSkip, tokens: Tokens, heads: int, notes: object = None) -> Mixed:
        return Mixed(grouped(self, tokens, heads), nothing, nothing)

    monkeypatch.setattr(MindSkip, "forward", forward)
    assert_close(network(inputs, network.space.full), wanted, rtol=1e-4, atol=1e-5)
    attention = network.blocks[0].mixer.part.macs(17, HEADS)
    assert whole - executed_macs(lambda: network(inputs, network.space.full)) == round(6 * attention * (1 - share).sum().item())


def test_a_network_with_gates_is_alone_as_in_company():
    network, inputs = routed(Choice("reducer", "tome")), images(4)
    path = network.space.path(tokens=network.space.merging(4))
    assert_close(torch.cat([network(one[None], path) for one in inputs]), network(inputs, path), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_with_gates_a_path_is_one_graph():
    network, inputs = routed(), images(4)
    torch.compiler.reset()
    compiled = torch.compile(network.at(network.space.full), fullgraph=True, backend="eager", dynamic=False)
    assert_close(compiled(inputs), network(inputs, network.space.full), rtol=1e-4, atol=1e-5)


def test_folding_the_norm_takes_the_router_with_it():
    """A gate moves in steps, so that a few probes would not show that its router had been forgotten."""
    network, inputs = routed().double(), images(40, dtype=torch.float64)
    wanted, opened = network(inputs, network.space.full), gates(network, inputs)
    assert any(change.after == "blocks.0.mixer.part.qkv, blocks.0.mixer.router" for change in fold(network))
    assert torch.equal(gates(network, inputs), opened)
    assert_close(network(inputs, network.space.full), wanted, rtol=1e-9, atol=1e-9)


def test_padding_has_no_say_and_a_merged_token_has_as_many_as_it_stands_for():
    mixer, tokens = opinionated(), tokens_of(4, 9)
    junk = 30 * torch.randn(4, 5, DIM, generator=torch.Generator().manual_seed(9))
    size = torch.cat((tokens.size, torch.zeros(4, 5)), 1)
    padded = Tokens(torch.cat((tokens.x, junk), 1), size, torch.arange(15).clamp_max(13).expand(4, 15), 1)
    assert_close(mixer(padded, HEADS).out[:, :9], mixer(tokens, HEADS).out, rtol=1e-5, atol=1e-6)
    mixer.router.requires_grad_(True)  # what the gate says shows in its gradient
    twice = torch.tensor([0, 1, 1, 1, 2, 3, 4, 5, 6, 7, 8])
    merged = tokens._replace(size=torch.tensor([1.0, 3, 1, 1, 1, 1, 1, 1, 1]).expand(4, 9))
    for one, other in ((padded, tokens), (merged, tokens_of(4, 9)._replace(x=tokens.x[:, twice], size=torch.ones(4, 11)))):
        found, wanted = (torch.autograd.grad(mixer.gate(each).sum(), mixer.router.weight)[0] for each in (one, other))
        assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def check_gradient() -> None:
    """At zero: <dL / d branch, attention> times a quarter times the mean token; and a closed gate feels the task as well."""
    for seed, closed in ((0, False), (1, True)):
        mixer, tokens = opinionated(), tokens_of(3, 9, seed=seed)
        along = torch.randn(3, 9, DIM, generator=torch.Generator().manual_seed(seed))
        mean = tokens.x.mean(1)
        mixer.router.weight.zero_()
        if closed:
            mixer.router.weight.sub_(torch.linalg.lstsq(mean, torch.ones(3, 1)).solution.T)
        mixer.router.requires_grad_(True)
        assert (mixer.gate(tokens) == float(not closed)).all()
        (found,) = torch.autograd.grad((mixer(tokens, HEADS).out * along).sum(), mixer.router.weight)
        slope = (lambda r: r * (1 - r))(torch.tensor(-1.0 if closed else 0.0).sigmoid())
        felt = (mixer.part(tokens, HEADS).out * along).sum((1, 2))
        assert_close(found, (felt[:, None] * slope * mean).sum(0, keepdim=True), rtol=1e-4, atol=1e-5)


def test_the_router_feels_the_task_through_open_and_closed_gates():
    check_gradient()


def test_the_gradient_catches_attention_that_is_run_for_open_gates_only(monkeypatch):
    def first(self: MindSkip, tokens: Tokens, heads: int, notes: object = None) -> Mixed:
        mixed, gate = self.part(tokens, heads), self.gate(tokens)
        return mixed._replace(out=mixed.out * (gate * gate.detach())[:, None, None])

    monkeypatch.setattr(mind_skip.MindSkip, "forward", first)
    with caught:
        check_gradient()


def test_capacity_asks_for_nothing_where_it_is_kept():
    gate = torch.tensor([[1.0, 0], [1, 0], [0, 1], [1, 0]], requires_grad=True)
    for capacity, loss, gradient in ((0.75, 0.0, [0.0, 0.0]), (0.5, 0.25, [0.25, 0.0]), (0.1, 0.65 + 0.15, [0.25, 0.25])):
        found = over_capacity(gate, capacity)
        assert_close(found.item(), loss, rtol=0, atol=1e-6)
        assert_close(torch.autograd.grad(found, gate)[0], torch.tensor([gradient] * 4))


def puzzles(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two of 16 patches hold a bit each. Easy: what is the first? Hard: do they differ? Only that needs tokens that see each other; all patches say which."""
    generator = torch.Generator().manual_seed(seed)
    places, bits = torch.rand(count, 16, generator=generator).argsort(1), torch.randint(2, (count, 2), generator=generator)
    hard, patch = torch.rand(count, generator=generator) < 0.5, 0.2 * torch.randn(count, 16, 4, generator=generator)
    for which in (0, 1):
        patch[torch.arange(count), places[:, which], which] += 2
        patch[torch.arange(count), places[:, which], 2] += 4.0 * bits[:, which] - 2
    patch[..., 3] += 2.0 * hard[:, None] - 1
    inputs = patch.view(count, 4, 4, 2, 2).transpose(2, 3).reshape(count, 1, 8, 8)
    return inputs, torch.where(hard, bits[:, 0] ^ bits[:, 1], bits[:, 0]), hard


def solver() -> Network:
    """A network trained on puzzles, easy ones with half of their attention left out at random: so what it needs is known."""
    torch.manual_seed(0)
    shape = Architecture(image_size=8, patch=2, dim=32, depth=2, heads=2, hidden=64, classes=2, channels=1, class_token=False, pool="mean")
    network = Network(shape)
    optimiser = torch.optim.Adam(network.parameters(), 2e-3)
    for step in range(400):
        inputs, label, hard = puzzles(128, step)
        drops = [(lambda module, args, out, keep=hard | (torch.rand(128) < 0.5): out._replace(out=out.out * keep[:, None, None])) for _ in network.blocks]
        handles = [block.mixer.register_forward_hook(drop) for block, drop in zip(network.blocks, drops, strict=True)]
        optimiser.zero_grad()
        F.cross_entropy(network(inputs, network.space.full), label).backward()
        optimiser.step()
        for handle in handles:
            handle.remove()
    return network.eval().requires_grad_(False)


@pytest.mark.slow
def test_learnt_gates_beat_the_same_gates_shuffled_and_the_best_fixed_blocks(monkeypatch):
    """The gain is to be in which inputs skip, not in which blocks: random gates with the same shares, and blocks chosen for all inputs, are both worse."""
    network, (inputs, label, _) = solver(), puzzles(1000, 10**6)
    mixers = [MindSkip.from_dense(block.mixer, dim=32) for block in network.blocks]
    for block, mixer in zip(network.blocks, mixers, strict=True):
        block.mixer = mixer

    @torch.no_grad()
    def accuracy(forced: Tensor | None = None) -> float:
        with monkeypatch.context() as patch:
            if forced is not None:
                patch.setattr(MindSkip, "gate", lambda self, tokens: forced[:, mixers.index(self)])
            return (network(inputs, network.space.full).argmax(-1) == label).float().mean().item()

    full = accuracy()
    fixed = {kept: accuracy(torch.tensor(kept).expand(1000, 2)) for kept in ((1.0, 0.0), (0.0, 1.0), (0.0, 0.0))}
    shares, figures = [], []
    for capacity in (1.0, 0.5, 0.3):
        for mixer in mixers:
            mixer.router.weight.data.zero_()
        optimiser = torch.optim.Adam([mixer.router.weight for mixer in mixers], 1e-2)
        for step in range(100):
            seen, wanted, _ = puzzles(128, 2000 + step)
            notes: dict[str, list[Tensor]] = {}
            loss = F.cross_entropy(network(seen, network.space.full, notes), wanted) + over_capacity(torch.stack(notes["open"], 1), capacity)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        opened = gates(network, inputs).detach()
        shuffled = torch.stack([each[torch.randperm(1000, generator=torch.Generator().manual_seed(i))] for i, each in enumerate(opened.T)], 1)
        shares.append(opened.mean().item())
        figures.append((opened.mean(0).tolist(), accuracy(), accuracy(shuffled)))
    assert full > 0.98 and shares == sorted(shares, reverse=True) and shares[-1] < 0.5
    assert figures[0][1] > full - 0.005
    for kept, learnt, luck in figures[1:]:
        best = max(fixed.values())
        assert learnt > luck + 0.05 and learnt > best + (full - best) * max(0.0, sum(kept) - 1) + 0.05  # the best block for all, or both for some at random
