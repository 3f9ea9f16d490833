"""Corruptions: nearer to nothing they are nothing, stronger they are farther, and neighbours make no difference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from apportion.errors import DataError
from apportion.measure import corruptions
from apportion.measure.corruptions import corrupt, typos

KINDS = ("noise", "blur", "contrast", "fog")
TEXTS = ["The quick brown fox jumps over the lazy dog, 42 times!", "a", "", "Straße café naïve", "lorem ipsum dolor sit amet consectetur " * 5]


def pictures(count: int = 4, side: int = 24) -> Tensor:
    """Smooth shapes with an edge, away from black and white."""
    row = torch.linspace(0, 1, side)
    waves = torch.stack([0.5 + 0.3 * torch.sin(6 * (i + 1) * row[:, None] + 4 * row) for i in range(3 * count)]).view(count, 3, side, side)
    waves[:, :, : side // 2, : side // 3] = 0.15
    return waves


def distance(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().mean((1, 2, 3)).sqrt()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", [8, 24, 64])
def test_stronger_is_farther_for_every_picture(kind, side):
    clean = pictures(side=side)
    away = torch.stack([distance(corrupt(clean, kind, strength), clean) for strength in range(1, 6)])
    assert bool((away[0] > 1e-3).all()) and bool((away.diff(dim=0) > 0).all())
    assert all(bool(((x := corrupt(clean, kind, strength)) >= 0).all() and (x <= 1).all()) for strength in (1, 5))


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_is_corrupted_alone_and_by_seed(kind):
    clean = pictures()
    together = corrupt(clean, kind, 3, seed=1)
    assert torch.equal(together, torch.cat([corrupt(part, kind, 3, seed=1) for part in clean.split(1)]))
    assert torch.equal(together.flip(0), corrupt(clean.flip(0), kind, 3, seed=1))
    assert torch.equal(together, corrupt(clean, kind, 3, seed=2)) == (kind in ("blur", "contrast"))
    assert not torch.equal(together, clean) and torch.equal(clean, pictures())


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_of_bytes_come_back_as_such(kind):
    clean = (pictures() * 255).round().byte().permute(0, 2, 3, 1).numpy()
    worse = corrupt(clean, kind, 4)
    assert worse.dtype == np.uint8 and worse.shape == clean.shape and worse.flags["C_CONTIGUOUS"]
    planes = corrupt(torch.from_numpy(clean).permute(0, 3, 1, 2).float() / 255, kind, 4)
    assert np.abs(worse.astype(float) - 255 * planes.permute(0, 2, 3, 1).numpy()).max() <= 0.501


def test_noise_has_the_stated_spread_and_contrast_the_stated_share():
    clean = torch.full((2, 3, 64, 64), 0.5)
    for level in (0, 1):
        assert float((corrupt(clean, "noise", level + 1) - clean).std()) == pytest.approx(corruptions.NOISE_STD[level], rel=0.02)
    clean, worse = pictures(), corrupt(pictures(), "contrast", 2)
    assert torch.allclose(worse.mean((2, 3)), clean.mean((2, 3)), atol=1e-6)
    assert torch.allclose(worse.std((2, 3)), 0.3 * clean.std((2, 3)), rtol=1e-4)


def test_blur_is_a_gaussian_of_the_stated_width():
    """A point spreads to the variance of the kernel plus that of a pixel; a flat picture stays."""
    side = 56
    point = torch.zeros(1, 3, side, side)
    point[:, :, 28, 28] = 1
    for level in (1, 3):
        spread = corrupt(point, "blur", level + 1)[0, 0].double()
        std = corruptions.BLUR_PIXELS[level] * (side / 224) ** 0.5
        assert float(spread.sum()) == pytest.approx(1, abs=1e-5)
        for axis in (0, 1):
            assert float(spread.sum(axis) @ (torch.arange(side).double() - 28).square()) == pytest.approx(std**2 + 1 / 12, rel=0.05)
    flat = torch.full((1, 3, 9, 9), 0.3)
    assert torch.allclose(corrupt(flat, "blur", 5), flat, atol=1e-6)


def test_fog_is_white_and_never_darkens():
    clean, worse = pictures(), corrupt(pictures(), "fog", 3)
    through = (1 - worse) / (1 - clean)
    assert bool((worse > clean).all()) and torch.allclose(through[:, 0], through[:, 2], atol=1e-4)
    thick = -through[:, 0].log() / corruptions.FOG_DENSITY[2]
    assert float(thick.min()) >= 0.5 and float(thick.max()) <= 1.5 and float(thick.std()) > 0.05
    assert torch.equal(corrupt(torch.ones(1, 3, 8, 8), "fog", 5), torch.ones(1, 3, 8, 8))


def test_what_is_no_picture_is_refused():
    for images, wanted in ((pictures() * 3 - 1, "all within 0..1"), (pictures()[:, :1], "floats"), (np.zeros((2, 3, 8, 8)), "uint8")):
        with pytest.raises(DataError, match=wanted):
            corrupt(images, "noise", 1)
    for strength in (0, 6):
        with pytest.raises(DataError, match="1 to 5"):
            corrupt(pictures(), "fog", strength)
        with pytest.raises(DataError, match="1 to 5"):
            typos(TEXTS, strength)
    with pytest.raises(DataError, match="noise, blur, contrast, fog"):
        corrupt(pictures(), "snow", 1)  # pyright: ignore


def edits(a: str, b: str) -> int:
    """Levenshtein distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row, before = [i], row
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
    return row[-1]


def test_typos_grow_stay_within_words_and_come_from_the_text_alone():
    told = [[edits(text, worse) for text, worse in zip(TEXTS, typos(TEXTS, strength), strict=True)] for strength in range(1, 6)]
    totals = [sum(row) for row in told]
    assert totals == sorted(set(totals)) and told[0][4] > 0
    letters = sum(map(str.isalpha, TEXTS[4]))
    assert 0.15 * letters < told[4][4] < 0.30 * letters
    worse = typos(TEXTS, 5)
    keep = [[c for c in text if not c.isalpha()] for text in TEXTS]
    assert keep == [[c for c in text if not c.isalpha()] for text in worse]
    assert worse[::-1] == typos(TEXTS[::-1], 5) and worse != typos(TEXTS, 5, seed=1)
    assert {c for text in worse for c in text} <= {c for text in TEXTS for c in text}


@pytest.mark.parametrize(("how", "wanted"), [("swap", "ba d"), ("drop", " "), ("double", "aabb dd")])
def test_each_typo_is_what_it_says(how, wanted, monkeypatch):
    monkeypatch.setattr(corruptions, "TYPO_SHARE", (1.0,) * 5)
    monkeypatch.setattr(corruptions.random.Random, "choice", lambda self, options: options[("swap", "drop", "double").index(how)])
    assert typos(["ab d"], 1) == [wanted]
