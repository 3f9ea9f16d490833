"""Cheap statistics against loops over pixels and words, and at the extremes."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch
from scipy.fft import dctn
from torch import Tensor

from apportion.errors import DataError
from apportion.intake.statistics import IMAGE_STATISTICS, TEXT_STATISTICS, Vocabulary, image_statistics, text_statistics


def pictures(n: int, rows: int, columns: int, *, seed: int = 0) -> np.ndarray:
    """Smooth ramps with noise and a bright corner: no two statistics agree by accident."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 150, columns) + np.linspace(0, 40, rows)[:, None]
    noise = rng.normal(0, 25, (n, rows, columns, 3)) * rng.random((n, 1, 1, 3))
    images = ramp[:, :, None] * rng.random((n, 1, 1, 3)) + noise
    images[:, : rows // 3, : columns // 3] += 120
    return images.clip(0, 255).astype(np.uint8)


def entropy(levels: list[int]) -> float:
    return -sum((c := levels.count(v) / len(levels)) * math.log2(c) for v in set(levels))


def by_hand(image: np.ndarray) -> dict[str, float]:
    """Every statistic by its definition, one pixel at a time."""
    rows, columns, _ = image.shape
    rgb = [[[int(v) / 255 for v in image[i, j]] for j in range(columns)] for i in range(rows)]
    # In single precision, so that a grey on the very edge of a bin falls on the same side.
    grey = [[float(sum(np.float32(w) * np.float32(v) for w, v in zip((0.299, 0.587, 0.114), pixel, strict=True))) for pixel in line] for line in rgb]
    flat = [v for line in grey for v in line]
    mean, var = statistics.fmean, statistics.pvariance
    tiles: dict[tuple[int, int], list[float]] = {}
    slopes: dict[tuple[int, int], list[float]] = {}
    size, right, down, curved = [], [], [], []
    for i in range(rows):
        for j in range(columns):
            tiles.setdefault((4 * i // rows, 4 * j // columns), []).append(grey[i][j])
            if i < rows - 1 and j < columns - 1:
                right.append(grey[i][j + 1] - grey[i][j])
                down.append(grey[i + 1][j] - grey[i][j])
                size.append(math.hypot(right[-1], down[-1]))
                slopes.setdefault((4 * i // (rows - 1), 4 * j // (columns - 1)), []).append(size[-1])
            if 0 < i < rows - 1 and 0 < j < columns - 1:
                curved.append(4 * grey[i][j] - grey[i - 1][j] - grey[i + 1][j] - grey[i][j - 1] - grey[i][j + 1])
    xx, yy, xy = mean(a * a for a in right), mean(b * b for b in down), mean(a * b for a, b in zip(right, down, strict=True))
    levels = {tile: [min(int(v * 32), 31) for v in values] for tile, values in tiles.items()}
    pixels = [p for line in rgb for p in line]
    first, second = [r - g for r, g, _ in pixels], [(r + g) / 2 - b for r, g, b in pixels]
    saturation = [(max(p) - min(p)) / max(p) if max(p) else 0.0 for p in pixels]
    blocks = [np.asarray(dctn(np.array(grey)[i : i + 8, j : j + 8], norm="ortho")) ** 2 for i in range(0, rows - 7, 8) for j in range(0, columns - 7, 8)]

    def band(low: int, high: int) -> float:
        return math.log(mean(float(e[u, v]) for e in blocks for u in range(8) for v in range(8) if low <= u + v < high) + 1e-8)

    slope = {tile: mean(values) for tile, values in slopes.items()}
    return {
        "grey_mean": mean(flat),
        "grey_std": statistics.pstdev(flat),
        "grey_skewness": mean((v - mean(flat)) ** 3 for v in flat) / var(flat) ** 1.5,
        "dark_share": mean(v < 0.05 for v in flat),
        "bright_share": mean(v > 0.95 for v in flat),
        "asymmetry": mean(abs(line[j] - line[columns - 1 - j]) for line in grey for j in range(columns)),
        "entropy_bits": entropy([v for tile in levels.values() for v in tile]),
        "tile_entropy_mean": mean(map(entropy, levels.values())),
        "tile_entropy_var": var(list(map(entropy, levels.values()))),
        "tile_grey_var": var([mean(tile) for tile in tiles.values()]),
        "tile_gradient_var": var(list(slope.values())),
        "centre_gradient_share": sum(v for (i, j), v in slope.items() if i in (1, 2) and j in (1, 2)) / sum(slope.values()),
        "gradient_mean": mean(size),
        "gradient_var": var(size),
        "gradient_p95": min(v for v in size if sum(other <= v for other in size) >= 0.95 * len(size)),
        "edge_density": mean(v > 0.1 for v in size),
        "coherence": math.sqrt((xx - yy) ** 2 + 4 * xy**2) / (xx + yy),
        "log_laplacian_var": math.log(var(curved) + 1e-8),
        "red_mean": mean(r for r, _, _ in pixels),
        "green_mean": mean(g for _, g, _ in pixels),
        "blue_mean": mean(b for _, _, b in pixels),
        "colour_var": var(first) + var(second),
        "colourfulness": math.sqrt(var(first) + var(second)) + 0.3 * math.hypot(mean(first), mean(second)),
        "saturation_mean": mean(saturation),
        "saturation_std": statistics.pstdev(saturation),
        "log_dct_low": band(1, 3),
        "log_dct_middle": band(3, 6),
        "log_dct_high": band(6, 10),
        "log_dct_highest": band(10, 15),
    }


@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (19, 27)])
def test_image_statistics_are_their_definitions(rows: int, columns: int) -> None:
    images = pictures(2, rows, columns)
    found = image_statistics(images)
    assert found.dtype == torch.float32 and found.shape == (2, len(IMAGE_STATISTICS))
    for row, image in zip(found, images, strict=True):
        wanted = by_hand(image)
        assert set(wanted) == set(IMAGE_STATISTICS)
        for name, value in zip(IMAGE_STATISTICS, row.tolist(), strict=True):
            assert value == pytest.approx(wanted[name], rel=2e-3, abs=2e-5), name


def test_floating_pixels_say_the_same() -> None:
    images = pictures(3, 20, 24)
    floating = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    assert torch.allclose(image_statistics(floating), image_statistics(images), atol=1e-5)
    rounded = floating.clone()
    rounded[0, 0, 0, 0] = 1 + 1e-6
    assert bool((image_statistics(rounded) <= image_statistics(rounded.clamp(0, 1))).all())


@pytest.mark.parametrize("side", [17, 64, 260])
def test_a_picture_does_not_depend_on_its_batch(side: int) -> None:
    images = pictures(80 if side < 100 else 3, side, side)
    together = image_statistics(images)
    assert torch.equal(together, torch.cat([image_statistics(images[i : i + 1]) for i in range(len(images))]))
    assert torch.equal(together.flip(0), image_statistics(images[::-1]))


def test_constants_and_extremes_are_finite() -> None:
    checkers = (np.indices((24, 24)).sum(0) % 2 * 255).astype(np.uint8)
    images = np.stack([np.full((24, 24, 3), v, np.uint8) for v in (0, 1, 77, 255)] + [np.repeat(checkers[:, :, None], 3, 2)])
    found = image_statistics(images)
    assert bool(found.isfinite().all()) and found.abs().max() < 100
    flat = dict(zip(IMAGE_STATISTICS, found[2].tolist(), strict=True))
    assert flat["entropy_bits"] == flat["gradient_mean"] == flat["edge_density"] == 0
    board = dict(zip(IMAGE_STATISTICS, found[4].tolist(), strict=True))
    assert board["entropy_bits"] == pytest.approx(1) and board["edge_density"] == 1
    assert board["log_dct_highest"] == max(board[f"log_dct_{band}"] for band in ("low", "middle", "high", "highest"))
    assert image_statistics(images[:0]).shape == (0, len(IMAGE_STATISTICS))


def test_images_that_cannot_be_measured_are_refused() -> None:
    good = pictures(1, 16, 16)
    for bad in (good[:, :15], good[..., :2], good[0], good.astype(np.float32), torch.rand(1, 16, 16, 3), torch.zeros(1, 3, 16, 16, dtype=torch.uint8)):
        with pytest.raises(DataError, match="shape"):
            image_statistics(bad)
    for value in (1.5, -0.5, math.nan):
        with pytest.raises(DataError, match="normalisation"):
            image_statistics(torch.full((1, 3, 16, 16), value))


TEXTS = ("The cat sat. The cat, 2 times!", "", "?!", "ZEBRA zebra_7 xylophone", "  \n ", "naïve Café")


def read(text: str, vocabulary: Vocabulary) -> dict[str, float]:
    return dict(zip(TEXT_STATISTICS, text_statistics([text], vocabulary)[0].tolist(), strict=True))


def test_text_statistics_are_their_definitions() -> None:
    vocabulary = Vocabulary.of(["the cat the", "The dog 2"])
    assert dict(vocabulary.counts) == {"the": 3, "cat": 1, "dog": 1, "2": 1} and vocabulary.total == 6
    seen = read(TEXTS[0], vocabulary)  # the cat sat the cat 2 times: 3 + 1 of 11, 1 + 1 of 11, unseen 1 of 11
    logs = [math.log(v / 11) for v in (4, 2, 1, 4, 2, 2, 1)]
    assert seen == pytest.approx(
        {
            "log_characters": math.log(31),
            "log_words": math.log(8),
            "type_token_ratio": 5 / 7,
            "mean_log_frequency": sum(logs) / 7,
            "min_log_frequency": math.log(1 / 11),
            "unseen_share": 2 / 7,
            "mean_word_length": 21 / 7,
            "longest_word": 5,
            "punctuation_share": 3 / 24,
            "digit_share": 1 / 24,
            "capital_share": 2 / 24,
        },
        rel=1e-5,
    )
    assert read(TEXTS[3], vocabulary)["capital_share"] == pytest.approx(5 / 21)
    assert read(TEXTS[5], vocabulary)["punctuation_share"] == 0


def test_shares_of_the_vocabulary_add_up_to_one() -> None:
    vocabulary = Vocabulary.of(TEXTS)
    assert sum(math.exp(vocabulary.log_frequency(word)) for word in [*vocabulary.counts, "never seen"]) == pytest.approx(1)


def test_texts_without_words_are_finite_and_rows_stand_alone() -> None:
    vocabulary = Vocabulary.of([])
    together: Tensor = text_statistics(TEXTS, vocabulary)
    assert together.shape == (len(TEXTS), len(TEXT_STATISTICS)) and bool(together.isfinite().all())
    assert torch.equal(together, torch.cat([text_statistics([text], vocabulary) for text in TEXTS]))
    assert read("", vocabulary) == dict.fromkeys(TEXT_STATISTICS, 0.0)
    assert read("?!", vocabulary)["punctuation_share"] == 1
    assert text_statistics([], vocabulary).shape == (0, len(TEXT_STATISTICS))
    with pytest.raises(DataError, match="int at row 1"):
        text_statistics(["a", 3], vocabulary)  # pyright: ignore[reportArgumentType]
