"""All settings of a perceiver at once: the loss setting by setting, who learns, and that every setting does, on digits and on made-up patches."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from apportion.errors import TrainError
from apportion.network.perceiver import Perceiver, PerceiverArchitecture
from apportion.train import Images, Objective, Recipe, dense, fit
from apportion.train.perceiver import alike, classes, nested, passed
from tests.conftest import shake

torch.set_num_threads(1)
SMALL = {"image_size": 8, "patch": 4, "dim": 16, "depth": 3, "heads": 2, "hidden": 32, "classes": 4, "latents": (2, 3)}


def network(seed: int = 0, **changes) -> Perceiver:
    torch.manual_seed(seed)
    made = Perceiver(PerceiverArchitecture(**{**SMALL, **changes}))
    shake(made, seed=seed)
    return made


def batch(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(n, 3, 8, 8, generator=generator), torch.randint(0, 4, (n,), generator=generator)


@pytest.mark.parametrize("rows", [8, 10, 3])
def test_loss_is_the_sum_over_settings(rows):
    """Sample by sample, each with the width that its place gives it, every setting run by itself."""
    student, teacher = network(), network(3)
    inputs, labels = batch(rows)

    def answering(x: Tensor) -> Tensor:
        return teacher(x, teacher.space.full)

    found = nested(classes(temperature=2.0, label_smoothing=0.1), teacher=answering)(student, inputs, labels, random.Random(7))
    rng = random.Random(7)
    widths = rng.sample((4, 8, 16, 32), 4)
    drawn = [rng.choice((2, 3)) for _ in range(3)]
    each = -(-rows // 4)
    total = torch.zeros(())
    for row in range(rows):
        width, by = widths[row // each], answering(inputs[row : row + 1])[0]

        def loss(latents: int, depth: int, row: int = row, width: int = width, by: Tensor = by) -> Tensor:
            answer = student(inputs[row : row + 1], student.space.path(tokens=latents, width=width, blocks=range(depth)))[0]
            p, q = (by / 2).softmax(0), (answer / 2).softmax(0)
            return 4 * (p * (p / q).log()).sum() + F.cross_entropy(answer, labels[row], label_smoothing=0.1)

        counts = (loss(2, 3) + loss(3, 3)) / 2
        depths = sum(number * loss(latents, number) for number, latents in enumerate(drawn, 1)) / 6
        total = total + (counts + depths) / rows
    assert found.item() == pytest.approx(total.item(), rel=1e-4)


def test_every_part_learns_and_the_teacher_does_not():
    student, teacher = network(), network(3)
    inputs, labels = batch(8)
    nested(classes(), teacher=lambda x: teacher(x, teacher.space.full))(student, inputs, labels, random.Random(0)).backward()
    quiet = [name for name, parameter in student.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert not quiet and all(parameter.grad is None for parameter in teacher.parameters())


def test_each_share_of_a_batch_runs_at_its_own_width():
    student, (inputs, _) = network(), batch(8)
    whole = passed(student, inputs, (32, 4))
    for rows, width in ((slice(0, 4), 32), (slice(4, 8), 4)):
        notes: dict = {}
        student(inputs[rows], student.space.path(width=width), notes)
        for state, feature in zip(whole, notes["feature"], strict=True):
            torch.testing.assert_close(state.x[rows], feature, rtol=0, atol=1e-6)


def test_features_are_drawn_to_a_teacher_of_patches():
    student, (inputs, _) = network(per_patch=True, classes=6), batch(8)
    target = torch.randn(8, 4, 6, generator=torch.Generator().manual_seed(1))
    answer = student(inputs, student.space.full)
    cosine = (answer * target).sum(-1) / answer.norm(dim=-1) / target.norm(dim=-1)
    apart = (answer - target).abs()
    wanted = 0.9 * (1 - cosine).mean() + 0.1 * torch.where(apart < 1, apart.square() / 2, apart - 0.5).mean()
    assert alike()(answer, target, None).item() == pytest.approx(wanted.item(), rel=1e-5)
    assert alike()(target, target, None).item() == pytest.approx(0, abs=1e-6)
    nested(alike(), teacher=lambda x: target)(student, inputs, None, random.Random(0)).backward()


def test_labels_of_patches_and_shares_of_classes():
    loss, answer = classes(label_smoothing=0.0), torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([[0, 1, 2], [3, 3, 0]])
    picked = -answer.log_softmax(-1).gather(-1, labels[..., None]).mean()
    assert loss(answer, None, labels).item() == pytest.approx(picked.item())
    assert loss(answer[:, 0], None, F.one_hot(labels[:, 0], 4).float()).item() == pytest.approx(loss(answer[:, 0], None, labels[:, 0]).item())


def test_nothing_to_learn_from_is_an_error():
    student, (inputs, labels) = network(), batch(8)
    with pytest.raises(TrainError, match="labels"):
        nested(classes())(student, inputs, None, random.Random(0))
    with pytest.raises(TrainError, match="teacher"):
        nested(alike())(student, inputs, labels, random.Random(0))


def digits() -> tuple[Tensor, Tensor]:
    """1797 handwritten digits, shuffled, one channel, about -1 to 1."""
    given = load_digits()
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    return (torch.tensor(given.images, dtype=torch.float32)[:, None] / 8 - 1)[order], torch.tensor(given.target)[order]


@pytest.mark.slow
def test_every_setting_of_one_network_learns_digits():
    """Every one of the 48 is 20 points above chance at least, and the full one within 2 points of a network that has learned nothing else."""
    x, y = digits()
    recipe = Recipe(epochs=12, batch=100, learning_rate=4e-3, warmup=0.1, crop_padding=0, ema=0.95)
    shape = {**SMALL, "patch": 2, "dim": 64, "depth": 4, "heads": 4, "hidden": 128, "classes": 10, "channels": 1}

    def taught(latents: tuple[int, ...], objective: Objective[Perceiver]) -> Perceiver:
        torch.manual_seed(0)
        made = Perceiver(PerceiverArchitecture(**{**shape, "latents": latents}))
        fit(made, Images(x[:1300], y[:1300]), objective, recipe=recipe, progress=False)
        return made.requires_grad_(False)

    def right(of: Perceiver, answers: Tensor, rows: slice) -> float:
        return (answers.argmax(-1) == y[rows]).double().mean().item()

    joint, fixed, test = taught((4, 8, 16), nested(classes())), taught((16,), dense()), slice(1300, 1797)
    accuracy = {path: right(joint, joint(x[test], path), test) for path in joint.settings()}
    full = joint.space.full
    assert len(accuracy) == 48 and min(accuracy.values()) >= 0.3
    assert accuracy[full] >= right(fixed, fixed(x[test], fixed.space.full), test) - 0.02

    # Leaving when sure: the threshold that loses at most half a point on images held out, judged on others.
    tune, judge = slice(1300, 1500), slice(1500, 1797)
    exact = right(joint, joint(x[tune], full), tune)
    kept = [tau for tau in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95) if right(joint, joint.until_sure(x[tune], full, tau)[0], tune) >= exact - 0.005]
    logits, depth = joint.until_sure(x[judge], full, kept[0])
    spent = torch.tensor(joint.macs_until(full), dtype=torch.float64)[depth - 1].mean().item()
    assert spent <= 0.8 * joint.macs(full)
    assert right(joint, logits, judge) >= right(joint, joint(x[judge], full), judge) - 0.005


@pytest.mark.slow
@pytest.mark.parametrize("task", ["segmentation", "depth"])
def test_an_answer_for_every_patch_is_learned(task):
    """A bright square somewhere: which patches it covers (classes), and how bright each patch is (a number); at full and at the cheapest setting."""
    generator = torch.Generator().manual_seed(0)
    corner = torch.randint(0, 4, (512,), generator=generator)
    covered = F.one_hot(corner, 4).view(512, 2, 2).bool()
    x = 0.3 * torch.randn(512, 3, 8, 8, generator=generator) + covered.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    bright = x.mean(1).unfold(1, 4, 4).unfold(2, 4, 4).mean((-1, -2)).flatten(1)
    torch.manual_seed(0)
    made = Perceiver(PerceiverArchitecture(**{**SMALL, "per_patch": True, "classes": 2 if task == "segmentation" else 1}))
    labels = covered.flatten(1).long() if task == "segmentation" else bright
    loss = classes() if task == "segmentation" else lambda answer, teacher, target: F.mse_loss(answer[..., 0], target)
    recipe = Recipe(epochs=10, batch=64, learning_rate=5e-3, warmup=0.1, crop_padding=0, ema=0.9)
    fit(made, Images(x[:384], labels[:384]), nested(loss), recipe=recipe, progress=False)
    made.requires_grad_(False)
    for path in (made.settings()[0], made.space.full):
        answer = made(x[384:], path)
        if task == "segmentation":
            assert (answer.argmax(-1) == labels[384:]).double().mean() > 0.95
        else:
            assert F.mse_loss(answer[..., 0], bright[384:]) < 0.1 * bright.var()
