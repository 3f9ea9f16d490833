"""What a run reads: samples by their numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, final

import torch
from torch import Tensor

from apportion.errors import DataError
from apportion.train.recipe import Recipe

SOME = 2**12  # texts counted at a time: what is made on the way is as large as they are


class Data(Protocol):
    """Samples by number. `batch` must give the same rows for the same numbers in every call: a resumed run relies on it."""

    @property
    def sizes(self) -> Tensor | None: ...  # (n,) what each takes, where samples differ: those of one batch are then alike
    def __len__(self) -> int: ...
    def batch(self, index: Tensor) -> tuple[Tensor, Tensor | None]: ...


@final
class Images:
    """Images held in memory, uint8 (n, h, w, c) or float (n, c, h, w), given out as float (b, c, h, w) less `mean`, over `std`.

    uint8 is brought to 0..1 first, so `mean` and `std` are on that scale. Raises DataError for other shapes or dtypes.
    """

    sizes = None

    def __init__(self, images: Tensor, labels: Tensor | None = None, *, mean: Sequence[float] = (0.0,), std: Sequence[float] = (1.0,)) -> None:
        if images.ndim != 4 or not (images.dtype == torch.uint8 or images.is_floating_point()):
            raise DataError(f"images of shape {tuple(images.shape)}, {images.dtype}", wanted="uint8 (n, h, w, c) or float (n, c, h, w)", do="Convert them.")
        if labels is not None and len(labels) != len(images):
            raise DataError(f"{len(labels)} labels", wanted=f"{len(images)}, one for each image", do="Bring images and labels into line.")
        self.images, self.labels = images, labels
        self.mean, self.std = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        rows = self.images[index]
        inputs = rows.permute(0, 3, 1, 2).float() / 255 if rows.dtype == torch.uint8 else rows.float()
        labels = None if self.labels is None else self.labels[index]
        inputs = inputs.sub_(self.mean).div_(self.std).contiguous()  # what was chosen is a copy already
        return inputs, labels.long() if labels is not None and labels.dtype == torch.int16 else labels  # masks are held in short


@final
class Sounds:
    """Features of recordings, or rows of tables, held in memory, float (n, ...), given out as they are.

    Raises DataError for other dtypes, and for labels not one for each.
    """

    sizes = None

    def __init__(self, features: Tensor, labels: Tensor | None = None) -> None:
        if features.ndim < 2 or not features.is_floating_point():
            raise DataError(f"features of shape {tuple(features.shape)}, {features.dtype}", wanted="float (n, ...)", do="Make them by a Listen.")
        if labels is not None and len(labels) != len(features):
            raise DataError(f"{len(labels)} labels", wanted=f"{len(features)}, one for each recording", do="Bring recordings and labels into line.")
        self.features, self.labels = features, labels

    def __len__(self) -> int:
        return len(self.features)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.features[index], None if self.labels is None else self.labels[index]


@final
class Texts:
    """Texts held in memory as tokens, int64 (n, length) or with their types (n, 2, length), given out without the columns that are `padding` in all of a batch.

    Integer labels may be of tokens, (n, length), and are cut alike. Raises DataError for other shapes or dtypes, and for labels that are not for each text.
    """

    def __init__(self, tokens: Tensor, labels: Tensor | None = None, *, padding: int) -> None:
        if tokens.dtype != torch.int64 or not (tokens.ndim == 2 or (tokens.ndim == 3 and tokens.shape[1] == 2)):
            raise DataError(f"tokens of shape {tuple(tokens.shape)}, {tokens.dtype}", wanted="int64 (n, length) or (n, 2, length)", do="Tokenise them.")
        if labels is not None and len(labels) != len(tokens):
            raise DataError(f"{len(labels)} labels", wanted=f"{len(tokens)}, one for each text", do="Bring texts and labels into line.")
        self.tokens, self.labels = tokens, labels
        ids = tokens if tokens.ndim == 2 else tokens[:, 0]
        places = torch.arange(1, ids.shape[1] + 1)
        self.sizes = torch.cat([((some != padding) * places).amax(1) for some in ids.split(SOME)]).clamp_min(1)

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        longest = int(self.sizes[index].max())
        if self.labels is None:
            return self.tokens[index, ..., :longest].contiguous(), None
        of_tokens = self.labels.ndim == 2 and not self.labels.is_floating_point()
        return self.tokens[index, ..., :longest].contiguous(), self.labels[index, :longest] if of_tokens else self.labels[index]


POOL = 32
"""Batches among which samples of one size are sought: enough to be alike, few enough that each epoch has other neighbours."""


@final
class Order:
    """Which samples a step sees: epochs are shuffled one by one and laid end to end, and step s takes the s-th run of `batch` of them.

    Every sample is seen once in each epoch and no batch is cut short. With `sizes` (n,), each POOL batches of a shuffle are sorted by size and then dealt
    out batch by batch, in random order again. The shuffles in use are kept, since making one takes as long as the whole data.
    """

    def __init__(self, recipe: Recipe, samples: int, sizes: Tensor | None = None) -> None:
        self.recipe, self.samples, self.sizes = recipe, samples, sizes
        self._shuffled: dict[int, Tensor] = {}

    def __call__(self, step: int) -> Tensor:
        """Sample numbers (batch,)."""
        start = step * self.recipe.batch
        epochs = range(start // self.samples, (start + self.recipe.batch - 1) // self.samples + 1)
        self._shuffled = {epoch: self._shuffled[epoch] if epoch in self._shuffled else self._shuffle(epoch) for epoch in epochs}
        runs = torch.cat([self._shuffled[epoch] for epoch in epochs]) if len(epochs) > 1 else self._shuffled[epochs[0]]
        return runs[start - epochs[0] * self.samples :][: self.recipe.batch]

    def _shuffle(self, epoch: int) -> Tensor:
        generator = self.recipe.generator("order", epoch)
        order = torch.randperm(self.samples, generator=generator)
        if self.sizes is None:
            return order
        batches = [batch for pool in order.split(POOL * self.recipe.batch) for batch in pool[self.sizes[pool].argsort(stable=True)].split(self.recipe.batch)]
        return torch.cat([batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()])
