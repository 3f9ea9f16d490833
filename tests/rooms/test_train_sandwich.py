"""Many paths at once: what is drawn, what the loss is made of, and that the paths get better."""

from __future__ import annotations

import copy
import math
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from apportion.errors import PlanError, TrainError
from apportion.methods import find
from apportion.network import Architecture, Network, put
from apportion.train import Images, Recipe, dense, draw, fit, sandwich
from apportion.train.sandwich import branch, excess, features, gathered, run, shared
from apportion.vocab import Choice, Path

torch.set_num_threads(1)


def network(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    made = Network(Architecture(image_size=8, patch=2, dim=16, depth=3, heads=2, hidden=32, classes=4))
    for slot, name in (("reducer", "tome"), ("ffn", "matformer"), ("mixer", "head_prefix"), ("depth", "skip")):
        put(made, Choice(slot, name))
    return made


def paths(of: Network) -> tuple[Path, ...]:
    space = of.space
    return (space.path(blocks=(0, 2), width=8, heads=1), space.path(tokens=space.merging(4)), space.path(width=16), space.full)


def batch(n: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    labels = torch.randint(0, 4, (n,), generator=generator)
    images = torch.randn(n, 3, 8, 8, generator=generator) * 0.3
    for image, label in zip(images, labels.tolist(), strict=True):
        image[:, 4 * (label // 2) : 4 * (label // 2) + 4, 4 * (label % 2) : 4 * (label % 2) + 4] += 1
    return images, labels


def gradients(of: Network, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(of.parameters()), allow_unused=True, materialize_grads=True))


def naive_features(student: Network, path: Path, teacher: Network, inputs: Tensor) -> Tensor:
    """Token by token, in loops."""
    mine, theirs = {}, {}
    student(inputs, path, mine)
    with torch.no_grad():
        teacher(inputs, teacher.space.full, theirs)
    total, k = torch.zeros(()), len(path.blocks)
    for step, block in enumerate(path.blocks):
        x, origin, y = mine["feature"][step], mine["origin"][step], theirs["feature"][block]
        each = []
        for b in range(len(inputs)):
            for place, into in enumerate(origin[b].tolist()):
                wanted = y[b][origin[b] == into].mean(0)
                each.append(0.9 * (1 - torch.dot(F.normalize(x[b, into], dim=0), F.normalize(wanted, dim=0))) + 0.1 * F.smooth_l1_loss(x[b, into], wanted))
                assert origin[b, place] == into
        total = total + 2 * (step + 1) / (k * (k + 1)) * torch.stack(each).mean()
    return total


def test_draw_always_has_the_cheapest_and_never_repeats():
    chosen, seen = paths(network()), set()
    for seed in range(40):
        drawn = draw(chosen, [3, 2, 4, 5], random.Random(seed), 2)
        assert drawn[0] == chosen[1] and len(set(drawn)) == 3
        seen.update(drawn)
    assert seen == set(chosen)
    assert set(draw(chosen, [1, 2, 3, 4], random.Random(0), 9)) == set(chosen)
    with pytest.raises(PlanError):
        draw([], [], random.Random(0))


@pytest.mark.parametrize("labelled, with_teacher", [(True, False), (True, True), (False, True)])
def test_loss_and_gradient_are_the_sums_over_single_paths(labelled: bool, with_teacher: bool):
    taught, teacher = network(0), network(1)
    inputs, labels = batch()
    target = labels if labelled else None
    objective = sandwich(paths(taught), extra=5, teacher=teacher if with_teacher else None, temperature=2.0, feature_weight=0.7, label_smoothing=0.2)
    loss = objective(taught, inputs, target, random.Random(0))

    source = teacher if with_teacher else taught
    with torch.no_grad():
        answer = source(inputs, source.space.full)
    singles = []
    for path in paths(taught):
        logits = taught(inputs, path)
        hard = F.cross_entropy(logits, labels, label_smoothing=0.2) if labelled else torch.zeros(())
        if path == taught.space.full and not with_teacher:
            singles.append(hard)
            continue
        soft = 4 * F.kl_div((logits / 2).log_softmax(-1), (answer / 2).softmax(-1), reduction="batchmean")
        reference = copy.deepcopy(source)  # held constant
        singles.append(hard + soft + 0.7 * naive_features(taught, path, reference, inputs))
    torch.testing.assert_close(loss, torch.stack(singles).sum())
    one_by_one = [sum(parts) for parts in zip(*(gradients(taught, single) for single in singles), strict=True)]
    for got, wanted in zip(gradients(taught, loss), one_by_one, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_merged_tokens_are_compared_with_the_mean_of_what_they_stand_for():
    x = torch.randn(1, 4, 2)
    origin, size = torch.tensor([[0, 1, 1, 1]]), torch.tensor([[1.0, 3.0]])
    torch.testing.assert_close(gathered(x, size, origin), torch.stack((x[0, 0], x[0, 1:].mean(0)))[None])
    assert gathered(x, torch.ones(1, 4), torch.arange(4)[None]) is x


def test_nothing_is_lost_where_student_and_teacher_are_one():
    same, inputs = network(), batch()[0]
    full = run(same, inputs, same.space.full)
    assert features(full, full).item() == pytest.approx(0, abs=1e-6)
    distil = find("objective", "distil")(temperature=3.0)
    assert distil(full.logits, teacher=full.logits).item() == 0
    smaller = same.space.path(width=8)
    mine = features(run(same, inputs, smaller), full) + find("objective", "distil")()(same(inputs, smaller), teacher=full.logits)
    loss = sandwich([smaller], teacher=copy.deepcopy(same))(same, inputs, None, random.Random(0))
    torch.testing.assert_close(loss, mine)  # the full path, anchored to its own copy, adds nothing


def test_paths_that_part_late_and_exits_are_read_from_the_full_pass():
    """Going on from the full pass gives what a pass of one's own gives; all exits are taught in each step, by their mean."""
    taught, teacher, (inputs, labels) = network(), network(1), batch()
    space = taught.space
    late = space.path(width=(32, 32, 8))
    exits = [space.path(blocks=(0,)), space.path(blocks=(0, 1))]
    trunk = run(taught, inputs, space.full)
    for path, common in ((late, 2), (exits[0], 1), (exits[1], 2), (paths(taught)[0], 0)):
        assert shared(path, space.full) == common
        apart, joined = run(taught, inputs, path), branch(taught, inputs, trunk, path)
        torch.testing.assert_close(joined.logits, apart.logits)
        assert [len(values) for values in joined.notes.values()] == [len(path.blocks)] * 3
    with torch.no_grad():
        answer = teacher(inputs, space.full)

    def single(path: Path) -> Tensor:
        logits = taught(inputs, path)
        soft = F.kl_div(logits.log_softmax(-1), answer.softmax(-1), reduction="batchmean")
        return soft + naive_features(taught, path, teacher, inputs) + F.cross_entropy(logits, labels, label_smoothing=0.1)

    wanted = single(space.full) + single(late) + torch.stack([single(path) for path in exits]).mean()
    got = sandwich([late, *exits], teacher=teacher)(taught, inputs, labels, random.Random(0))
    torch.testing.assert_close(got, wanted)
    for mine, theirs in zip(gradients(taught, got), gradients(taught, wanted), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def test_the_bound_is_its_definition_and_never_below_what_a_path_errs_oftener():
    generator = torch.Generator().manual_seed(0)
    for scale in (0.1, 1.0, 30.0):
        student, teacher = (scale * torch.randn(200, 3, generator=generator) for _ in range(2))
        labels = torch.randint(0, 3, (200,), generator=generator)
        labels[:100] = teacher[:100].argmax(1)
        for given, right in ((labels, labels), (F.one_hot(labels, 3).float(), labels), (None, teacher.argmax(1))):
            share = student.double().softmax(1)
            bits = [-math.log2(share[row, y].item()) for row, y in enumerate(right.tolist()) if teacher[row].argmax() == y]
            found = excess(student, teacher, given).item()
            assert found == pytest.approx(sum(bits) / 200, rel=1e-4)
            lost = ((teacher.argmax(1) == right) & (student.argmax(1) != right)).float().mean().item()
            oftener = (student.argmax(1) != right).float().mean() - (teacher.argmax(1) != right).float().mean()
            assert found >= lost >= oftener.item() - 1e-6
    assert excess(100 * teacher, teacher, labels).item() == pytest.approx(0, abs=1e-6)  # sure and as right as the teacher
    torch.testing.assert_close(excess(torch.zeros(4, 2), torch.eye(2).repeat(2, 1), None), torch.tensor(1.0))  # as if by a coin: tight where all are just wrong


def test_each_term_has_a_weight_and_the_bound_asks_nothing_below_its_slack():
    taught, teacher, (inputs, labels) = network(), network(1), batch()
    path = taught.space.path(width=16)

    def loss(
        labels: Tensor | None = labels,
        *,
        logit_weight: float = 0.0,
        feature_weight: float = 0.0,
        label_weight: float = 0.0,
        excess_weight: float = 0.0,
        slack: float = 0.0,
    ) -> Tensor:
        objective = sandwich(
            [path],
            teacher=teacher,
            logit_weight=logit_weight,
            feature_weight=feature_weight,
            label_weight=label_weight,
            excess_weight=excess_weight,
            slack=slack,
        )
        return objective(taught, inputs, labels, random.Random(0))

    with torch.no_grad():
        by = run(teacher, inputs, teacher.space.full)
        seen = [run(taught, inputs, each) for each in (taught.space.full, path)]
        soft, hard = find("objective", "distil")(), find("objective", "cross_entropy")(smoothing=0.1)
        assert loss().item() == 0
        torch.testing.assert_close(loss(logit_weight=2.0), 2 * sum(soft(one.logits, teacher=by.logits) for one in seen))
        torch.testing.assert_close(loss(label_weight=2.0), 2 * sum(hard(one.logits, target=labels) for one in seen))
        torch.testing.assert_close(loss(feature_weight=2.0), 2 * sum(features(one, by) for one in seen))
        for given in (labels, None):
            bounds = torch.stack([excess(one.logits, by.logits, given) for one in seen])
            between = bounds.mean().item()
            assert bounds.min() < between < bounds.max()
            wanted = 3 * (bounds.max() - between) ** 2
            torch.testing.assert_close(loss(given, excess_weight=3.0, slack=between), wanted)
    assert all(not gradient.any() for gradient in gradients(taught, loss(excess_weight=1.0, slack=9.0)))
    assert any(gradient.any() for gradient in gradients(taught, loss(excess_weight=1.0)))
    with pytest.raises(PlanError, match="excess_weight"):
        sandwich([path], excess_weight=1.0, task="regression", span=1.0)


def test_objectives_say_what_they_miss():
    taught, (inputs, _) = network(), batch()
    for objective in (sandwich(paths(taught)), dense()):
        with pytest.raises(TrainError, match="no labels"):
            objective(taught, inputs, None, random.Random(0))
    with pytest.raises(PlanError, match="being taught"):
        sandwich(paths(taught), teacher=taught)(taught, inputs, None, random.Random(0))
    with pytest.raises(PlanError):
        sandwich([taught.space.full], teacher=network(1))(taught, inputs, None, random.Random(0))
    with pytest.raises(TrainError, match="no teacher"):
        find("objective", "distil")()(torch.zeros(2, 3))


def test_cross_entropy_against_its_definition():
    logits, labels = torch.randn(5, 4), torch.tensor([0, 3, 1, 1, 2])
    shares = 0.9 * F.one_hot(labels, 4) + 0.1 / 4
    wanted = -(shares * logits.log_softmax(-1)).sum(-1).mean()
    cross_entropy = find("objective", "cross_entropy")
    torch.testing.assert_close(cross_entropy(smoothing=0.1)(logits, target=labels), wanted)
    torch.testing.assert_close(cross_entropy()(logits, target=shares), wanted)


def accuracy(of: Network, path: Path) -> float:
    inputs, labels = batch(128)
    with torch.no_grad():
        return (of(inputs, path).argmax(-1) == labels).float().mean().item()


def test_dense_training_then_healing_without_labels():
    """From scratch on labels; then every path is drawn to the dense network, which is not needed to be right, only to be followed."""
    inputs, labels = batch(128)
    taught, recipe = network(), Recipe(epochs=30, batch=32, crop_padding=0, ema=0.9, learning_rate=3e-3)
    fit(taught, Images(inputs, labels), dense(label_smoothing=0.0), recipe=recipe, progress=False)
    assert accuracy(taught, taught.space.full) > 0.95
    source, smallest = copy.deepcopy(taught), paths(taught)[0]
    objective = sandwich(paths(taught), teacher=source)

    def apart() -> float:
        with torch.no_grad():
            return float(objective(taught, inputs, None, random.Random(0)))

    before = apart()
    kept = copy.deepcopy(source.state_dict())
    fit(taught, Images(inputs), objective, recipe=replace(recipe, epochs=12), progress=False)
    assert apart() < 0.5 * before and accuracy(taught, smallest) > 0.9 and accuracy(taught, taught.space.full) > 0.95
    assert all(torch.equal(a, b) for a, b in zip(source.state_dict().values(), kept.values(), strict=True))


def test_maps_before_the_head_teach_exits_while_the_full_path_stays_bit_for_bit():
    inputs, labels = batch(128)
    data, recipe = Images(inputs, labels), Recipe(epochs=20, batch=32, crop_padding=0, ema=0.9, learning_rate=3e-3)
    taught = network()
    put(taught, Choice("bridge", "surrogate", options={"runs": "1-3 2-3"}))
    fit(taught, data, dense(label_smoothing=0.0), recipe=recipe, progress=False)
    space, kept = taught.space, copy.deepcopy(taught.state_dict())
    exits = [space.path(blocks=range(depth)) for depth in (1, 2)]

    def answers() -> tuple[Tensor, list[float]]:
        with torch.no_grad():
            return taught(inputs, space.full), [F.cross_entropy(taught(inputs, path), labels).item() for path in exits]

    full, before = answers()
    taught.requires_grad_(False)
    taught.bridge.requires_grad_(True)
    fit(taught, data, sandwich(exits, feature_weight=0.0), recipe=recipe, progress=False)
    same, after = answers()
    changed = {name for name, value in taught.state_dict().items() if not torch.equal(value, kept[name])}
    assert torch.equal(same, full) and changed and all(name.startswith("bridge.") for name in changed)
    assert all(now < 0.8 * then for now, then in zip(after, before, strict=True)), (before, after)
