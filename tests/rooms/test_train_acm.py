"""Teaching learners and gates: the labels are those of their definitions, each stage lowers its loss, and a budget is kept and well spent."""

from __future__ import annotations

import copy
import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from apportion.errors import PlanError
from apportion.methods.ffn.acm import AdaptiveComputation
from apportion.network import Architecture, Network, put
from apportion.train import Images, Recipe
from apportion.train import acm as teaching
from apportion.vocab import Choice
from tests.conftest import DEPTH, HIDDEN, images, tiny, tokens_of

N = 4


def adaptive(gate: int = 8) -> Network:
    return tiny("class_token", Choice("ffn", "acm", options={"gate": gate})).requires_grad_(True)


def check_relative_gain(labels) -> None:
    falls = torch.tensor([[8.0, 4, 2, 1, 0.5], [8, 7.9, 1, 0.5, 0.2], [8, 4, 3.9, 1, 0.2], [8, 4, 2, 1, 0.9], [0, 0, 0, 0, 0], [1, 2, 1, 0.5, 0.1]])
    assert labels(falls, 1.2).tolist() == [N, 1, 2, N, 1, 1]


def test_relative_gain_keeps_none_and_the_first_apart():
    check_relative_gain(teaching.relative_gain)

    def conflated(error: Tensor, tau: float) -> Tensor:
        first = (error[:, :-1] / error[:, 1:].clamp_min(1e-30) < tau).int().argmax(-1)
        return torch.where(first == 0, N, first + 1)

    with pytest.raises(AssertionError):
        check_relative_gain(conflated)


def test_least_error_is_the_best_of_all_allocations():
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        steps = torch.rand(4, N, generator=generator, dtype=torch.float64).sort(dim=-1, descending=True).values  # convex, so one price reaches every optimum
        error = steps.sum(-1, keepdim=True) - F.pad(steps.cumsum(-1), (1, 0))
        for mean in (0.5, 1.0, 2.25, 3.0):
            best = min(
                error[torch.arange(4), list(counts)].sum().item() for counts in itertools.product(range(N + 1), repeat=4) if sum(counts) <= round(4 * mean)
            )
            labels = teaching.least_error(error, mean)
            assert labels.sum().item() == round(4 * mean) and abs(error[torch.arange(4), labels].sum().item() - best) < 1e-9


def test_spending_is_its_definition_and_feels_the_gate():
    choices = torch.tensor([[[0, 0, 4, 4], [1, 1, 1, 1]], [[2, 2, 2, 2], [0, 1, 2, 3]]])  # modules, samples, tokens
    logits = [(30.0 * F.one_hot(each, N + 1)).requires_grad_() for each in choices]
    budget, entropy, diversity = teaching.spending(logits, 0.5)
    log = torch.tensor([2.0, 1, 1, 4]).log() / torch.tensor(5.0).log()
    assert_close(budget.item(), abs((16 + 10) / 64 - 0.5), rtol=0, atol=1e-6)
    assert_close(entropy.item(), -(log[0] + 0 + 0 + log[3]).item() / 4, rtol=0, atol=1e-4)
    assert_close(diversity.item(), -2 * 0.5 * abs(16 / 32 - 10 / 32), rtol=0, atol=1e-6)
    flat = [torch.zeros(2, 4, N + 1, requires_grad=True)]
    for term in teaching.spending([flat[0] + torch.randn(2, 4, N + 1, generator=torch.Generator().manual_seed(0))], 0.9):
        (gradient,) = torch.autograd.grad(term, flat[0], retain_graph=True)
        assert gradient.abs().sum() > 0


def test_a_module_is_taught_on_what_the_teacher_saw():
    network, teacher, inputs = adaptive(), tiny(), images(2)
    seen = teaching.watched(network, teacher, inputs)
    assert len(seen) == DEPTH and all(entry.ffn is block.ffn for entry, block in zip(seen, network.blocks, strict=True))
    for entry, block in zip(seen, teacher.blocks, strict=True):
        assert torch.equal(entry.y, block.ffn(entry.x, HIDDEN))
        error = teaching.errors(entry)
        assert error.shape == (2, 17, N + 1) and error[..., -1].max() < 1e-9
        assert_close(error[..., 0], (block.ffn.down.bias - entry.y).square().sum(-1), rtol=1e-4, atol=1e-5)
    assert not teacher.blocks[0].ffn._forward_hooks


def test_the_same_network_decides_token_by_token():
    network = adaptive().eval()
    free = teaching.per_token(network)
    assert all(one is other for one, other in zip(network.parameters(), free.parameters(), strict=True))
    assert all(isinstance(block.ffn, AdaptiveComputation) for block in network.blocks)
    notes: dict[str, list[Tensor]] = {}
    path = network.space.path(width=HIDDEN // 2)
    free(images(2), path, notes)
    assert len(notes["gate"]) == DEPTH
    fixed = copy.deepcopy(network)
    for block in fixed.blocks:
        block.ffn.gate = None
    assert_close(free(images(2), path), fixed(images(2), path), rtol=1e-4, atol=1e-5)  # an untaught gate asks for the budget


def test_gates_learn_which_tokens_profit():
    """Planted: the first channel of a token says whether its output comes from the learners or from none."""
    torch.manual_seed(0)
    network = adaptive().requires_grad_(False)
    ffn = network.blocks[0].ffn
    x = tokens_of(8, 16).x
    rich = x[..., 0] > 0.5
    y = torch.where(rich[..., None], ffn(x, HIDDEN), ffn.part.down.bias)
    seen, optimiser = teaching.Seen(ffn, x, y), torch.optim.Adam(ffn.gate.requires_grad_(True).parameters(), lr=0.03)
    wanted = teaching.least_error(teaching.errors(seen).flatten(0, 1), 1).view(8, 16)
    assert wanted[rich].float().mean() > 2 * wanted[~rich].float().mean()
    for _ in range(150):
        loss = F.cross_entropy(ffn.gate(x, 1).flatten(0, 1), wanted.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    counts = ffn.gate(x, 1).argmax(-1).float()
    assert counts[rich].mean() > counts[~rich].mean() + 1


@pytest.mark.parametrize("objective", ["learners", "gates", "end_to_end"])
def test_objectives_reach_what_they_are_to_teach(objective):
    network, teacher = adaptive(), tiny()
    torch.manual_seed(0)
    for block in network.blocks:
        nn.init.normal_(block.ffn.gate.last.weight)
    loss = {"learners": teaching.learners(teacher), "gates": teaching.gates(teacher), "end_to_end": teaching.end_to_end(teacher)}[objective]
    network.train()
    for seed in range(3):  # random widths and rules; one draws the full width, where no gate is asked
        loss(network, images(4), None, random.Random(seed)).backward()
    touched = {name for name, parameter in network.named_parameters() if parameter.grad is not None and parameter.grad.abs().sum() > 0}
    parts = {name for name in touched if ".ffn.part." in name}
    gates = {name for name in touched if ".ffn.gate." in name}
    assert bool(parts) == (objective != "gates") and bool(gates) == (objective != "learners")
    assert (touched == parts | gates) == (objective != "end_to_end") and all(parameter.grad is None for parameter in teacher.parameters())


def test_what_cannot_be_taught_is_refused():
    with pytest.raises(PlanError, match="without learners"):
        teaching.learners(tiny())(tiny(), images(1), None, random.Random(0))
    with pytest.raises(PlanError, match="without a gate"):
        teaching.gates(tiny())(adaptive(gate=0), images(1), None, random.Random(0))


def test_texts_are_taught_on_words_alone():
    torch.manual_seed(0)
    dense = Network(Architecture(image_size=0, patch=0, dim=16, depth=2, heads=2, hidden=32, classes=2, words=9, length=6, positions=6)).eval()
    network = copy.deepcopy(dense)
    put(network, Choice("ffn", "acm", options={"gate": 4}))
    ids = torch.tensor([[1, 2, 3, 4, 0, 0], [5, 6, 0, 0, 0, 0]])  # 0 is padding
    seen, alone = teaching.watched(network, dense, ids), [teaching.watched(network, dense, row[row > 0][None]) for row in ids]
    for place, entry in enumerate(seen):
        assert_close(entry.x, torch.cat([found[place].x for found in alone], 1), rtol=1e-4, atol=1e-5)
        assert_close(entry.y, torch.cat([found[place].y for found in alone], 1), rtol=1e-4, atol=1e-5)
    nn.init.normal_(network.blocks[0].ffn.gate.last.weight)
    path = network.eval().space.path(width=16)
    for row in ids:
        assert_close(network(row[None], path), network(row[row > 0][None], path), rtol=1e-4, atol=1e-5)
    with pytest.raises(PlanError, match="free"):
        teaching.end_to_end(dense, free=1.0)(network, ids, None, random.Random(0))


@pytest.mark.slow
def test_learners_share_out_a_teacher():
    """A teacher of 32, 128 and 32 units, learners from random weights: the error falls with every learner, and the first takes most of it."""
    torch.manual_seed(0)
    blocks = Network(Architecture(image_size=8, patch=2, dim=32, depth=2, heads=2, hidden=128, classes=10)).blocks
    teacher, ffn = blocks[0].ffn.requires_grad_(False), AdaptiveComputation.from_dense(blocks[1].ffn, dim=32)
    optimiser = torch.optim.Adam(ffn.parameters(), lr=3e-3)
    for _ in range(1500):
        x = torch.randn(1, 128, 32)
        loss = teaching.errors(teaching.Seen(ffn, x, teacher(x, 128))).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    x = torch.randn(1, 2000, 32)
    with torch.no_grad():
        error = teaching.errors(teaching.Seen(ffn, x, teacher(x, 128))).sqrt().mean((0, 1))
    assert (error.diff() < 0).all() and error[1] <= 0.45 * error[0] and error[4] <= 0.25 * error[0]


def planted() -> tuple[Network, Images]:
    """Half of the patches are blank, and of a blank one the FFN makes nothing: all that it does, it does for the others."""
    torch.manual_seed(0)
    shape = Architecture(image_size=8, patch=2, dim=16, depth=1, heads=2, hidden=64, classes=4, channels=1, class_token=False, pool="mean", final_norm=False)
    network = Network(shape).requires_grad_(False)
    block = network.blocks[0]
    for blank in (network.tokeniser.position, network.tokeniser.project.bias, block.mixer.proj.weight):
        blank.zero_()
    for weight, scale in ((block.ffn.up.weight, 4), (block.ffn.down.weight, 8), (network.head.project.weight, 8)):
        weight.mul_(scale)
    generator = torch.Generator().manual_seed(1)
    shown = torch.rand(1024, 1, 4, 1, 4, 1, generator=generator) < 0.5
    inputs = torch.randn(1024, 1, 4, 2, 4, 2, generator=generator) * shown
    put(network, Choice("ffn", "acm", options={"gate": 16}))
    return network, Images(inputs.reshape(1024, 1, 8, 8))


@pytest.mark.slow
@pytest.mark.parametrize("free", [0.0, 1.0])
def test_a_budget_is_kept_and_well_spent(free):
    """After the three stages tokens that need nothing get less, and the loss is below that of one count for all and of the same counts dealt out at random."""
    network, data = planted()
    teacher = copy.deepcopy(network).eval()
    network.requires_grad_(True)
    recipe = Recipe(epochs=24, batch=32, learning_rate=2e-3, crop_padding=0, ema=0.97, weight_decay=0.0)
    last = teaching.end_to_end(teacher, free=free, weights=(1.0, 0.05, 0.05))
    fitted = teaching.teach(network, data, teacher=teacher, last=last, recipe=recipe, progress=False)
    assert len(fitted) == 3 and all(parameter.requires_grad for parameter in network.parameters())
    network.requires_grad_(False)
    inputs = data.images[:512]
    rich = teacher.tokeniser(inputs, 2).x.abs().sum(-1) > 0
    fixed, dealt = copy.deepcopy(network), copy.deepcopy(network)
    fixed.blocks[0].ffn.gate = None
    shuffle = torch.Generator().manual_seed(0)

    def deal(module: nn.Module, args: object, logits: Tensor) -> Tensor:
        return logits.flatten(0, 1)[torch.randperm(len(logits) * 16, generator=shuffle)].view_as(logits)

    dealt.blocks[0].ffn.gate.register_forward_hook(deal)
    if free:
        network, dealt = teaching.per_token(network), teaching.per_token(dealt)
    wanted = teacher(inputs, teacher.space.full).softmax(-1)
    for k in (1, 2, 3):
        path, notes = network.space.path(width=16 * k), {}
        ours, one, luck = (F.kl_div(each(inputs, path).log_softmax(-1), wanted, reduction="batchmean").item() for each in (network, fixed, dealt))
        network(inputs, path, notes)
        counts = notes["gate"][0].argmax(-1).float()
        assert ours < 0.8 * one and ours < 0.8 * luck
        if free:
            assert abs(counts.mean().item() / N - k / N) < 0.03 and counts[rich].mean() > counts[~rich].mean() + 1
