"""Recipe, order and augmentation: functions of the recipe and the step alone, each against its definition."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from apportion.errors import DataError, PlanError
from apportion.train import Images, Recipe, fast_dtype
from apportion.train.augment import augment, crop, flip, mix
from apportion.train.data import Order


def test_schedule_rises_to_the_peak_and_falls_as_half_a_cosine():
    recipe, steps = Recipe(epochs=1, learning_rate=2.0, warmup=0.1), 100
    rates = [recipe.rate(step, steps) for step in range(steps)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10:] == pytest.approx([1 + math.cos(math.pi * t / 90) for t in range(90)])
    assert max(rates) == 2.0 and rates[-1] < 0.001
    assert Recipe(epochs=1, warmup=0).rate(0, 1) == 1e-3  # one step and no rise


def test_average_keeps_more_with_every_step_up_to_its_ceiling():
    recipe = Recipe(epochs=1, ema=0.9)
    assert [recipe.decay(step) for step in (0, 8, 10_000)] == [0.1, 0.5, 0.9]
    assert Recipe(epochs=1, ema=0.0).decay(1000) == 0.0


def test_digest_changes_with_every_field_that_changes_the_outcome():
    recipe = Recipe(epochs=1)
    changed = [replace(recipe, **{field: value}) for field, value in {"epochs": 2, "batch": 64, "seed": 1, "flip": True, "dtype": "bf16", "clip": 2.0}.items()]
    assert len({recipe.digest, *(other.digest for other in changed)}) == len(changed) + 1
    assert replace(recipe, checkpoint_every_s=1.0).digest == recipe.digest


@pytest.mark.parametrize("field, value", [("epochs", 0), ("batch", 0), ("learning_rate", math.nan), ("warmup", 1.0), ("ema", -0.1), ("dtype", "fp16")])
def test_a_number_that_makes_no_sense_is_named(field: str, value: float):
    with pytest.raises(PlanError, match=field):
        Recipe(**{"epochs": 1, field: value})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("samples, batch", [(10, 4), (12, 4), (3, 8), (7, 1)])
def test_order_sees_every_sample_once_in_each_epoch(samples: int, batch: int):
    recipe = Recipe(epochs=4, batch=batch)
    order = Order(recipe, samples)
    batches = [order(step) for step in range(recipe.steps(samples))]
    assert all(len(each) == batch for each in batches)
    seen = torch.cat(batches)[: 4 * samples].view(4, samples)
    assert torch.equal(seen.sort(1).values, torch.arange(samples).expand(4, -1))
    assert len({tuple(row.tolist()) for row in seen}) > 1  # the epochs differ
    assert torch.equal(Order(recipe, samples)(len(batches) - 1), batches[-1])  # no step depends on the ones before it


def test_crop_and_flip_against_slices():
    images = torch.randn(64, 3, 5, 6)
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    cropped = crop(images, 2, torch.Generator().manual_seed(0))
    down, right = torch.randint(0, 5, (2, 64), generator=torch.Generator().manual_seed(0)).tolist()
    assert torch.equal(cropped, torch.stack([padded[i, :, y : y + 5, x : x + 6] for i, (y, x) in enumerate(zip(down, right, strict=True))]))
    assert set(down) == set(right) == set(range(5))
    flipped = flip(images, torch.Generator().manual_seed(0))
    turned = [bool(torch.equal(new, old.flip(-1))) for new, old in zip(flipped, images, strict=True)]
    assert all(turn or torch.equal(new, old) for turn, new, old in zip(turned, flipped, images, strict=True)) and 16 < sum(turned) < 48


def test_mixup_is_the_share_of_both():
    x, labels, partner = torch.randn(3, 1, 2, 2), torch.tensor([0, 2, 1]), torch.tensor([1, 2, 0])
    mixed, shares = mix(x, labels, 0.75, partner, classes=3)
    torch.testing.assert_close(mixed, 0.75 * x + 0.25 * x[partner])
    assert shares is not None and torch.equal(shares, torch.tensor([[0.75, 0, 0.25], [0, 0.25, 0.75], [0.25, 0.75, 0]]))
    with pytest.raises(PlanError, match="classes"):
        augment(x, labels, Recipe(epochs=1, mixup=0.2), 0)


def test_augmentation_is_a_function_of_the_step():
    x, labels = torch.randn(8, 3, 6, 6), torch.arange(8)
    recipe = Recipe(epochs=1, flip=True, mixup=0.4, classes=8)
    first, again, other = (augment(x, labels, recipe, step)[0] for step in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert augment(x, labels, Recipe(epochs=1, crop_padding=0), 0)[0] is x
    with pytest.raises(PlanError, match="crop_padding=0"):
        augment(torch.randn(8, 4), None, Recipe(epochs=1), 0)


def test_images_come_out_normalised():
    raw = torch.randint(0, 256, (4, 5, 6, 3), dtype=torch.uint8)
    inputs, labels = Images(raw, torch.arange(4), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)).batch(torch.tensor([2, 0]))
    assert inputs.shape == (2, 3, 5, 6) and labels is not None and labels.tolist() == [2, 0]
    torch.testing.assert_close(inputs[1, 2], (raw[0, :, :, 2] / 255 - 0.3) / 0.7)
    floats = torch.randn(4, 3, 5, 6)
    assert torch.equal(Images(floats).batch(torch.tensor([1]))[0], floats[1:2])
    with pytest.raises(DataError, match="3 labels"):
        Images(raw, torch.arange(3))
    with pytest.raises(DataError, match="int64"):
        Images(raw.long())


def test_the_faster_dtype_is_one_of_two():
    assert fast_dtype() in ("fp32", "bf16")
