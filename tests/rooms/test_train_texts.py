"""Texts as training sees them: cut to the longest of a batch, alike in a batch, and compared token by token whatever the padding."""

from __future__ import annotations

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from apportion.errors import DataError, PlanError
from apportion.network import Architecture, Network, put
from apportion.train import Recipe, Texts, fit, sandwich
from apportion.train.augment import augment
from apportion.train.data import Order
from apportion.train.sandwich import features, run
from apportion.vocab import Choice, Path
from tests.conftest import shake

RECIPE = Recipe(epochs=1, batch=4, crop_padding=0)


def network(*, class_token: bool = True) -> Network:
    torch.manual_seed(0)
    pool = "class_token" if class_token else "mean"
    a = Architecture(0, 0, 16, 3, 2, 32, 2, class_token=class_token, pool=pool, words=30, length=12, positions=12, token_types=2, stem_norm=True)
    made = Network(a)
    shake(made)
    for slot, name in (("reducer", "tome"), ("depth", "skip"), ("ffn", "matformer")):
        put(made, Choice(slot, name))
    return made


def ids(count: int, n: int = 12, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(1, 30, (count, n), generator=generator)
    found[torch.arange(n) >= torch.randint(2, n + 1, (count, 1), generator=generator)] = 0
    return found


def merged(of: Network) -> Path:
    return of.space.path(tokens=(12, 8, 5))


def naive(student: Network, path: Path, teacher: Network, inputs: Tensor) -> Tensor:
    """Text by text without its padding, token by token, in loops: the mean over all real tokens of all texts, weighted by step."""
    total, count, k = torch.zeros(k := len(path.blocks)), 0, len(path.blocks)
    for row in inputs:
        one = row[row != 0][None]
        mine, theirs = {}, {}
        student(one, path, mine)
        teacher(one, teacher.space.full, theirs)
        count += one.shape[1]
        for step, block in enumerate(path.blocks):
            x, origin, y = mine["feature"][step][0], mine["origin"][step][0][:-1], theirs["feature"][block][0]
            for into in origin.tolist():
                wanted = y[origin == into].mean(0)
                total[step] += 0.9 * (1 - torch.dot(F.normalize(x[into], dim=0), F.normalize(wanted, dim=0))) + 0.1 * F.smooth_l1_loss(x[into], wanted)
    return (total * torch.arange(1, k + 1)).sum() / count / (k * (k + 1) / 2)


@pytest.mark.parametrize("class_token", [True, False])
def test_features_are_those_of_texts_without_padding(class_token: bool) -> None:
    student = network(class_token=class_token)
    teacher = shake(copy.deepcopy(student), seed=1)
    inputs = ids(5)
    for path in (merged(student), student.space.path(width=16), student.space.path(blocks=(0, 2))):
        with torch.no_grad():
            found = features(run(student, inputs, path), run(teacher, inputs, teacher.space.full))
            torch.testing.assert_close(found, naive(student, path, teacher, inputs), rtol=1e-4, atol=1e-5)


def test_a_padded_sandwich_is_finite_and_teaches() -> None:
    student = network()
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    paths = [merged(student), student.space.path(blocks=(0,)), student.space.path(blocks=(0, 1))]
    objective = sandwich(paths, teacher=teacher)
    data = Texts(ids(40), torch.randint(0, 2, (40,), generator=torch.Generator().manual_seed(1)), padding=0)
    loss = objective(student, *data.batch(torch.arange(8)), random.Random(0))
    gradients = torch.autograd.grad(loss, list(student.parameters()), allow_unused=True, materialize_grads=True)
    assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients)
    fitted = fit(student, data, objective, recipe=Recipe(epochs=8, batch=8, crop_padding=0, learning_rate=3e-3, ema=0.0), progress=False)
    assert fitted.history[-1].loss < 0.9 * fitted.history[0].loss


def test_a_batch_is_cut_to_its_longest_text() -> None:
    tokens = torch.tensor([[1, 2, 0, 0, 0], [1, 0, 2, 0, 0], [1, 2, 3, 4, 5], [0, 0, 0, 0, 0]])
    data = Texts(tokens, torch.arange(4), padding=0)
    assert data.sizes.tolist() == [2, 3, 5, 1] and len(data) == 4
    inputs, labels = data.batch(torch.tensor([1, 0]))
    assert inputs.tolist() == [[1, 0, 2], [1, 2, 0]] and labels is not None and labels.tolist() == [1, 0]
    assert Texts(tokens[:, None].expand(-1, 2, -1), padding=0).batch(torch.tensor([0, 3]))[0].shape == (2, 2, 2)
    for bad in (tokens.float(), tokens[None], tokens[:, None]):
        with pytest.raises(DataError, match="tokens of shape"):
            Texts(bad, padding=0)
    with pytest.raises(DataError, match="3 labels"):
        Texts(tokens, torch.arange(3), padding=0)


def test_batches_are_alike_and_every_text_is_seen_once_in_each_epoch() -> None:
    sizes = torch.randint(1, 50, (64,), generator=torch.Generator().manual_seed(0))
    alike, plain = Order(RECIPE, 64, sizes), Order(RECIPE, 64)
    epochs = [torch.cat([alike(16 * epoch + step) for step in range(16)]) for epoch in range(2)]
    assert all(sorted(epoch.tolist()) == list(range(64)) for epoch in epochs) and not torch.equal(*epochs)

    def padded(order: Order) -> float:
        return sum(4 * int(sizes[order(step)].max()) for step in range(16)) / int(sizes.sum())

    assert padded(alike) < 1.15 < 1.4 < padded(plain)
    longest = [int(sizes[alike(step)].max()) for step in range(16)]
    assert longest != sorted(longest)  # short texts do not all come first
    assert torch.equal(alike(5), Order(RECIPE, 64, sizes)(5))


@pytest.mark.parametrize("recipe", [Recipe(epochs=1), Recipe(epochs=1, crop_padding=0, flip=True), Recipe(epochs=1, crop_padding=0, mixup=0.2, classes=2)])
def test_texts_are_not_augmented(recipe: Recipe) -> None:
    with pytest.raises(PlanError, match="crop_padding=0"):
        augment(ids(4), torch.zeros(4, dtype=torch.int64), recipe, 0)
    assert augment(ids(4), None, RECIPE, 0)[0].equal(ids(4))
