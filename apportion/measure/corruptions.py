"""Inputs made worse by degrees, so that a bundle can be checked on data that is not what it was calibrated on."""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Callable, Sequence
from typing import Literal, overload

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from apportion.errors import DataError

Kind = Literal["noise", "blur", "contrast", "fog"]

# One entry for each strength. Noise, blur and contrast take the benchmark's figures for 224 pixels; the haze is our own form, with our own figures.
NOISE_STD = (0.08, 0.12, 0.18, 0.26, 0.38)
BLUR_PIXELS = (1.0, 2.0, 3.0, 4.0, 6.0)  # at 224; falls with the root of the side, which at 32 comes near what is used for small pictures
CONTRAST_KEPT = (0.4, 0.3, 0.2, 0.1, 0.05)
FOG_DENSITY = (0.4, 0.7, 1.0, 1.4, 2.0)
TYPO_SHARE = (0.02, 0.04, 0.08, 0.12, 0.20)


@overload
def corrupt(images: Tensor, kind: Kind, strength: int, *, seed: int = 0) -> Tensor: ...
@overload
def corrupt(images: np.ndarray, kind: Kind, strength: int, *, seed: int = 0) -> np.ndarray: ...
def corrupt(images: Tensor | np.ndarray, kind: Kind, strength: int, *, seed: int = 0) -> Tensor | np.ndarray:
    """The same images with noise, blur, less contrast or fog, at strength 1 to 5; a stronger one is never nearer to the clean image.

    Source: the idea and three of the strength tables of Hendrycks and Dietterich (2019, arXiv 1903.12261); figures differ from that benchmark's files, so do
    not compare with its published error rates. What is random is drawn from `seed` and the image's own bytes: neighbours change nothing.
    Shapes: float (b, 3, h, w) in 0..1 before normalisation, or uint8 (b, h, w, 3); the result is of the same kind. Raises DataError for anything else.
    """
    if kind not in _KINDS:
        raise DataError(f"corruption {kind!r}", wanted=f"one of {', '.join(_KINDS)}", do="Give one of these.")
    _check_strength(strength)
    if isinstance(images, np.ndarray):
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise DataError(f"images of shape {images.shape} and type {images.dtype}", wanted="(b, h, w, 3) of uint8", do="Convert them to RGB in 8 bits.")
        planes = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
        return (corrupt(planes, kind, strength, seed=seed) * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    if not images.is_floating_point() or images.ndim != 4 or images.shape[1] != 3 or not bool(((images >= 0) & (images <= 1)).all()):
        found = f"images of shape {tuple(images.shape)} and type {images.dtype}"
        raise DataError(found, wanted="floats (b, 3, h, w), all within 0..1", do="Corrupt before normalising.")
    worse = [_KINDS[kind](image, strength - 1, _draws(image, seed)) for image in images]
    return torch.stack(worse).clamp(0, 1) if worse else images.clone()


def _check_strength(strength: int) -> None:
    if strength not in range(1, 6):
        raise DataError(f"strength {strength}", wanted="1 to 5", do="Give one of these.")


def _draws(image: Tensor, seed: int) -> np.random.Generator:
    """The same for every strength, so that one field of noise grows."""
    return np.random.default_rng([seed, zlib.crc32(image.detach().cpu().contiguous().numpy().tobytes())])


def _noise(image: Tensor, level: int, draws: np.random.Generator) -> Tensor:
    return image + NOISE_STD[level] * torch.from_numpy(draws.standard_normal(image.shape)).to(image)


def _blur(image: Tensor, level: int, _: np.random.Generator) -> Tensor:
    """A Gaussian integrated over each pixel: sampled at the middle, a narrow one would change nothing on small pictures."""
    height, width = image.shape[1:]
    std = BLUR_PIXELS[level] * math.sqrt(min(height, width) / 224)
    reach = min(math.ceil(3 * std), min(height, width) - 1)
    edges = torch.special.ndtr((torch.arange(-reach, reach + 2, dtype=torch.float64) - 0.5) / std)
    kernel = (edges.diff() / edges.diff().sum()).to(image)
    wide = F.pad(image[None], (reach, reach, reach, reach), mode="reflect")[0]
    across = F.conv2d(wide[:, None], kernel[None, None, None])
    return F.conv2d(across, kernel[None, None, :, None])[:, 0]


def _contrast(image: Tensor, level: int, _: np.random.Generator) -> Tensor:
    return torch.lerp(image.mean((1, 2), keepdim=True), image, CONTRAST_KEPT[level])


def _fog(image: Tensor, level: int, draws: np.random.Generator) -> Tensor:
    """White haze by Koschmieder's law: what comes through falls exponentially with the depth of the haze, a field of clouds of mean 1."""
    height, width = image.shape[1:]
    clouds = torch.ones(height, width, dtype=torch.float64)
    cells, share = 2, 0.25
    while cells <= min(height, width):
        field = torch.from_numpy(draws.uniform(-1, 1, (1, 1, cells, cells)))
        clouds += share * F.interpolate(field, size=(height, width), mode="bilinear", align_corners=True)[0, 0]
        cells, share = 2 * cells, share / 2  # amplitudes 1/4, 1/8, ... sum to less than 1/2: nowhere is the haze thinner than half of its mean
    return torch.lerp(torch.ones_like(image), image, torch.exp(-FOG_DENSITY[level] * clouds).to(image))


_KINDS: dict[str, Callable[[Tensor, int, np.random.Generator], Tensor]] = {"noise": _noise, "blur": _blur, "contrast": _contrast, "fog": _fog}


def typos(texts: Sequence[str], strength: int, *, seed: int = 0) -> list[str]:
    """The same texts with letters swapped with the next one, dropped or doubled: about 2, 4, 8, 12 or 20 % of the letters.

    What a stronger call changes includes what a weaker one does. Spaces, digits and signs stay, so words stay words.
    Draws come from `seed` and the text itself. Raises DataError on a strength that is not 1 to 5.
    """
    _check_strength(strength)
    return [_typo(text, TYPO_SHARE[strength - 1], random.Random(f"{seed} {text}")) for text in texts]


def _typo(text: str, share: float, draws: random.Random) -> str:
    hits = [(draws.random() < share, draws.choice(("swap", "drop", "double"))) for _ in text]
    letters, place = list(text), 0
    while place < len(text):
        hit, how = hits[place]
        if hit and text[place].isalpha():
            if how == "drop":
                letters[place] = ""
            elif how == "double":
                letters[place] = 2 * text[place]
            elif place + 1 < len(text) and text[place + 1].isalpha():
                letters[place], letters[place + 1] = text[place + 1], text[place]
                place += 1  # the letter that came forward is done with
        place += 1
    return "".join(letters)
