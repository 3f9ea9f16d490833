"""What a look at the raw input says about its difficulty, before any network runs: cheap numbers from pixels and from words."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from apportion.errors import DataError

IMAGE_STATISTICS: tuple[str, ...] = (
    *("grey_mean", "grey_std", "grey_skewness", "dark_share", "bright_share", "asymmetry"),
    *("entropy_bits", "tile_entropy_mean", "tile_entropy_var", "tile_grey_var", "tile_gradient_var", "centre_gradient_share"),
    *("gradient_mean", "gradient_var", "gradient_p95", "edge_density", "coherence", "log_laplacian_var"),
    *("red_mean", "green_mean", "blue_mean", "colour_var", "colourfulness", "saturation_mean", "saturation_std"),
    *("log_dct_low", "log_dct_middle", "log_dct_high", "log_dct_highest"),
)
TEXT_STATISTICS: tuple[str, ...] = (
    *("log_characters", "log_words", "type_token_ratio", "mean_log_frequency", "min_log_frequency", "unseen_share"),
    *("mean_word_length", "longest_word", "punctuation_share", "digit_share", "capital_share"),
)

SMALLEST = 16  # pixels on a side: four tiles of four, two blocks of eight
TILES, BINS, BLOCK = 4, 32, 8
BANDS = (1, 3, 6, 10, 2 * BLOCK - 1)  # a DCT coefficient (u, v) belongs to the band that u + v falls into; 0 is the mean
EDGE = 0.1  # change of grey between neighbours, of a range of 1, that counts as an edge
FLOOR = 1e-8  # keeps logarithms and ratios of flat pictures finite
AT_ONCE = 2**16  # pixels worked on at a time: a plane of them stays in cache
WORD = re.compile(r"\w+")


def image_statistics(images: np.ndarray | Tensor) -> Tensor:
    """The numbers that IMAGE_STATISTICS names, one row for each picture: brightness, entropy, gradients, colour and block-DCT energy.

    Design: the image features proposed for a complexity predictor that runs before the network; colourfulness after Hasler and Suesstrunk
    (2003). Histograms have 32 bins; tiles are the 4 x 4 equal parts; a gradient is the forward difference to the right and below.
    Shapes: uint8 (n, h, w, 3), or floating (n, 3, h, w) from 0 to 1 (not normalised) -> float32 (n, 29), both sides 16 or more; the DCT leaves
    out the rest of a side that 8 does not divide. Each row depends on its picture alone. Raises DataError for anything else.
    Cost: about 0.1 and 3 ms of one core for 32 x 32 and 224 x 224 in batches, 1 ms at least for a picture alone; on the CPU, before any copy.
    When not to use: sizes may not be mixed within one table, since gradients and DCT bands are per pixel.
    """
    _check_images(images)
    rows, columns = images.shape[1:3] if isinstance(images, np.ndarray) else images.shape[2:]
    step = max(1, AT_ONCE // (rows * columns))
    parts = [_measured(_pixels(images[i : i + step])) for i in range(0, len(images), step)]
    return torch.from_numpy(np.concatenate([np.empty((0, len(IMAGE_STATISTICS)), np.float32), *parts]))


def _check_images(images: np.ndarray | Tensor) -> None:
    array = isinstance(images, np.ndarray)
    right = images.dtype == np.uint8 if array else images.is_floating_point()
    right = right and images.ndim == 4 and images.shape[-1 if array else 1] == 3
    if not right or min(images.shape[1:3] if array else images.shape[2:]) < SMALLEST:
        raise DataError(
            f"images of shape {tuple(images.shape)} and type {images.dtype}",
            wanted=f"uint8 (n, h, w, 3) or floating (n, 3, h, w), with sides of {SMALLEST} pixels or more",
            do="Convert them to RGB, or enlarge them.",
        )


def _pixels(images: np.ndarray | Tensor) -> np.ndarray:
    """(3, n, h, w) float32 from 0 to 1. Raises DataError for values beyond, unless they are rounding."""
    if isinstance(images, np.ndarray):
        return np.ascontiguousarray(images.transpose(3, 0, 1, 2)) / np.float32(255)
    x = images.detach().float().numpy()
    if not ((x >= -1e-3) & (x <= 1 + 1e-3)).all():  # NaN is refused too
        raise DataError("pixel values outside 0 to 1", wanted="pictures before normalisation", do="Undo it: x * std + mean.")
    return np.ascontiguousarray(x.transpose(1, 0, 2, 3)).clip(0, 1)


def _measured(x: np.ndarray) -> np.ndarray:
    red, green, blue = x
    grey = np.float32(0.299) * red + np.float32(0.587) * green + np.float32(0.114) * blue
    found = _brightness(grey) | _gradients(grey) | _colour(red, green, blue) | _frequencies(grey)
    return np.stack([found[name] for name in IMAGE_STATISTICS], 1).astype(np.float32)


def _mean(values: np.ndarray) -> np.ndarray:
    """Over each picture. Rows are laid out flat: numpy then adds up each one by itself, in an order that the batch does not change."""
    return values.reshape(len(values), -1).mean(1, dtype=np.float32)


def _var(values: np.ndarray) -> np.ndarray:
    flat = values.reshape(len(values), -1)
    centred = flat - _mean(flat)[:, None]
    return _mean(centred * centred)


def _brightness(grey: np.ndarray) -> dict[str, np.ndarray]:
    mean = _mean(grey)
    centred = grey - mean[:, None, None]
    squared = centred * centred
    var = _mean(squared)
    counts = _tiled_histogram(grey)
    tiles = _entropy_bits(counts)
    return {
        "grey_mean": mean,
        "grey_std": np.sqrt(var),
        "grey_skewness": _mean(squared * centred) / (var**1.5 + FLOOR),
        "dark_share": _mean(grey < 0.05),
        "bright_share": _mean(grey > 0.95),
        "asymmetry": _mean(np.abs(grey - grey[:, :, ::-1])),
        "entropy_bits": _entropy_bits(counts.sum(1)),
        "tile_entropy_mean": _mean(tiles),
        "tile_entropy_var": _var(tiles),
        "tile_grey_var": _var(_tile_means(grey)),
    }


def _gradients(grey: np.ndarray) -> dict[str, np.ndarray]:
    here = grey[:, :-1, :-1]
    right, down = grey[:, :-1, 1:] - here, grey[:, 1:, :-1] - here
    across, along = right * right, down * down
    size = np.sqrt(across + along)
    xx, yy, xy = _mean(across), _mean(along), _mean(right * down)
    curved = 4 * grey[:, 1:-1, 1:-1] - grey[:, :-2, 1:-1] - grey[:, 2:, 1:-1] - grey[:, 1:-1, :-2] - grey[:, 1:-1, 2:]
    rank = math.ceil(0.95 * size[0].size) - 1
    tiles = _tile_means(size)
    centre = tiles.reshape(-1, TILES, TILES)[:, 1:-1, 1:-1]
    return {
        "gradient_mean": _mean(size),
        "gradient_var": _var(size),
        "gradient_p95": np.partition(size.reshape(len(size), -1), rank, axis=1)[:, rank],
        "edge_density": _mean(size > EDGE),
        "coherence": np.sqrt((xx - yy) ** 2 + 4 * xy**2) / (xx + yy + FLOOR),
        "log_laplacian_var": np.log(_var(curved) + FLOOR),
        "tile_gradient_var": _var(tiles),
        "centre_gradient_share": _mean(centre) / (4 * _mean(tiles) + FLOOR),
    }


def _colour(red: np.ndarray, green: np.ndarray, blue: np.ndarray) -> dict[str, np.ndarray]:
    first, second = red - green, (red + green) / 2 - blue
    var = _var(first) + _var(second)
    highest = np.maximum(np.maximum(red, green), blue)
    saturation = (highest - np.minimum(np.minimum(red, green), blue)) / np.maximum(highest, FLOOR)
    return {
        "red_mean": _mean(red),
        "green_mean": _mean(green),
        "blue_mean": _mean(blue),
        "colour_var": var,
        "colourfulness": np.sqrt(var) + 0.3 * np.sqrt(_mean(first) ** 2 + _mean(second) ** 2),
        "saturation_mean": _mean(saturation),
        "saturation_std": np.sqrt(_var(saturation)),
    }


def _frequencies(grey: np.ndarray) -> dict[str, np.ndarray]:
    """Mean energy of the coefficients of an orthonormal DCT of 8 x 8 blocks, by band."""
    n, rows, columns = grey.shape
    down, across = rows // BLOCK, columns // BLOCK
    blocks = grey[:, : down * BLOCK, : across * BLOCK].reshape(n, down, BLOCK, across, BLOCK)
    place = np.arange(BLOCK)
    basis = np.cos(math.pi / BLOCK * place[:, None] * (place + 0.5)) * math.sqrt(2 / BLOCK)
    basis[0] /= math.sqrt(2)
    half = np.einsum("njykx,vx->nvjyk", blocks, basis.astype(np.float32))
    energy = np.einsum("nvjyk,uy->nuvjk", half, basis.astype(np.float32)) ** 2
    order = place[:, None] + place
    bands = [_mean(energy[:, (order >= low) & (order < high)]) for low, high in pairwise(BANDS)]
    return {f"log_dct_{name}": np.log(band + FLOOR) for name, band in zip(("low", "middle", "high", "highest"), bands, strict=True)}


def _tiled_histogram(grey: np.ndarray) -> np.ndarray:
    """Pixels of each level in each tile, (n, tiles, bins)."""
    n, rows, columns = grey.shape
    level = np.minimum((grey * BINS).astype(np.int64), BINS - 1)
    tile = TILES * (TILES * np.arange(rows) // rows)[:, None] + TILES * np.arange(columns) // columns
    place = (np.arange(n)[:, None, None] * TILES**2 + tile) * BINS + level
    return np.bincount(place.ravel(), minlength=n * TILES**2 * BINS).reshape(n, TILES**2, BINS)


def _tile_means(values: np.ndarray) -> np.ndarray:
    """(n, h, w) -> (n, tiles). The edges of the tiles are those of the histogram."""
    cuts = [list(pairwise(-(-side * i // TILES) for i in range(TILES + 1))) for side in values.shape[1:]]
    return np.stack([_mean(values[:, a:b, c:d]) for a, b in cuts[0] for c, d in cuts[1]], 1)


def _entropy_bits(counts: np.ndarray) -> np.ndarray:
    share = counts / counts.sum(-1, keepdims=True)
    return -(share * np.log2(np.where(share > 0, share, 1.0))).sum(-1)


@dataclass(frozen=True, slots=True, eq=False)
class Vocabulary:
    """How often each word, in lower case, occurs in the texts it was counted on."""

    counts: Mapping[str, int]
    total: int

    @classmethod
    def of(cls, texts: Sequence[str]) -> Vocabulary:
        """Count these texts, of which none should be one that control learns from or is judged on."""
        counts = Counter(word for text in texts for word in _words(text))
        return cls(dict(counts), counts.total())

    def log_frequency(self, word: str) -> float:
        """Natural logarithm of the share of this word, one added to every count and one more word kept for all that are unseen."""
        return math.log((self.counts.get(word, 0) + 1) / (self.total + len(self.counts) + 1))


def text_statistics(texts: Sequence[str], vocabulary: Vocabulary) -> Tensor:
    """The numbers that TEXT_STATISTICS names, one row for each text: length, repetition, rarity of words, marks, digits and capitals.

    A word is a run of letters, digits and underscores. Shares are of the characters that are not white space. A text without words has 0
    throughout, except for its length and its marks. Shapes: n texts -> float32 (n, 11). Each row depends on its text alone.
    Raises DataError, naming the row, for what is not a string. Cost: about 0.3 us for each character.
    When not to use: scripts that put no space between words, whose sentences count as words here.
    """
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"{type(text).__name__} at row {row}", wanted="a string", do="Correct or leave out this row.")
    return torch.tensor([_read(text, vocabulary) for text in texts], dtype=torch.float32).view(-1, len(TEXT_STATISTICS))


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def _read(text: str, vocabulary: Vocabulary) -> tuple[float, ...]:
    words = _words(text)
    marks = [c for c in text if not c.isspace()]
    n, written = max(len(words), 1), max(len(marks), 1)
    rarity = [vocabulary.log_frequency(word) for word in words]
    return (
        math.log1p(len(text)),
        math.log1p(len(words)),
        len(set(words)) / n,
        sum(rarity) / n,
        min(rarity, default=0.0),
        sum(word not in vocabulary.counts for word in words) / n,
        sum(map(len, words)) / n,
        max(map(len, words), default=0),
        sum(not (c.isalnum() or c == "_") for c in marks) / written,
        sum(c.isdigit() for c in marks) / written,
        sum(c.isupper() for c in marks) / written,
    )
