"""From pictures to what a network takes: resize, centre crop, normalise, as timm does when it evaluates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from apportion.errors import DataError


@dataclass(frozen=True, slots=True)
class Preprocess:
    """Uint8 pictures in, float32 (n, 3, size, size) out: shorter side to floor(size / crop), centre crop, (x / 255 - mean) / std.

    `squash` gives both sides that length instead, so that nothing but the border is cut away. The rounding follows timm 1.0.31, so that pixels agree with it.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop: float = 1.0
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    squash: bool = False

    def __call__(self, images: np.ndarray | Sequence[Image.Image]) -> Tensor:
        """An (n, size, size, 3) array counts as cropped already and is not resampled. Raises DataError for anything that is not RGB in 8 bits."""
        if isinstance(images, np.ndarray) and (images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3):
            raise DataError(
                f"images of shape {images.shape} and type {images.dtype}", wanted="(n, rows, columns, 3) of uint8", do="Convert them to RGB in 8 bits."
            )
        if isinstance(images, np.ndarray) and images.shape[1:3] == (self.size, self.size):
            pixels = images
        else:
            pixels = np.stack([np.asarray(self._fit(Image.fromarray(i) if isinstance(i, np.ndarray) else i)) for i in images])
        x = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float().div_(255)
        return x.sub_(torch.tensor(self.mean).view(3, 1, 1)).div_(torch.tensor(self.std).view(3, 1, 1)).contiguous()

    def _fit(self, image: Image.Image) -> Image.Image:
        if not isinstance(image, Image.Image):
            raise DataError(f"a {type(image).__name__}", wanted="a picture", do="Give pictures: this model reads no texts.")
        if image.mode != "RGB":
            raise DataError(f"an image of mode {image.mode}", wanted="RGB", do="Convert it with image.convert('RGB').")
        return self.fit(image, Image.Resampling.BICUBIC if self.interpolation == "bicubic" else Image.Resampling.BILINEAR)

    def fit(self, image: Image.Image, resampling: Image.Resampling) -> Image.Image:
        """Resized and cropped, whatever is in its pixels."""
        short = math.floor(self.size / self.crop)
        scale = min(image.size)
        wanted = (short, short) if self.squash else (int(short * image.width / scale), int(short * image.height / scale))
        if image.size != wanted:
            image = image.resize(wanted, resampling)
        left, top = round((image.width - self.size) / 2), round((image.height - self.size) / 2)
        return image.crop((left, top, left + self.size, top + self.size))
