"""Frame embedding: two convolutions along the time of a spectrogram, the second of which halves it, and fixed sinusoidal positions.

Radford et al. 2022, "Whisper", arXiv 2212.04356, section 2.2; the sinusoids: Vaswani et al. 2017, arXiv 1706.03762, section 3.5 (sines first, then cosines).
(b, bands, frames) float -> Tokens, one for each two frames. Silence costs as much as speech: shorter sound is filled up to the full length.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apportion.errors import PathError
from apportion.vocab import Card, Tokens


class FrameTokeniser(nn.Module):
    """`position` is no parameter: training leaves it alone. A source's own table takes its place on reading."""

    card = Card("Whisper frame embedding", "Radford et al. 2022", "2212.04356", None, exact=True, needs="nothing")
    entering: tuple[int, ...] = ()

    def __init__(self, *, frames: int, bands: int, dim: int) -> None:
        super().__init__()
        self.frames, self.bands = frames, bands
        self.first, self.second = nn.Conv1d(bands, dim, 3, padding=1), nn.Conv1d(dim, dim, 3, 2, padding=1)
        self.position: Tensor
        self.register_buffer("position", sinusoids((frames + 1) // 2, dim))

    def forward(self, inputs: Tensor, patch: int) -> Tokens:
        if patch:
            raise PathError(f"patch {patch}", wanted="patch 0: there are none", do="Build paths with Space.path().")
        if inputs.shape[1:] != (self.bands, self.frames):
            raise PathError(f"an input of {tuple(inputs.shape)}", wanted=f"(batch, {self.bands}, {self.frames})", do="Cut the spectrogram, or fill it up.")
        x = F.gelu(self.second(F.gelu(self.first(inputs)))).transpose(1, 2) + self.position
        b, n, _ = x.shape
        return Tokens(x, x.new_ones(b, n), torch.arange(n, device=x.device).expand(b, n), 0)

    def macs(self, patch: int) -> int:
        return self.frames * self.first.weight.numel() + len(self.position) * self.second.weight.numel()


def sinusoids(length: int, dim: int) -> Tensor:
    """(length, dim) float32: turns of 1 to 1e-4 of a position, evenly spaced by their logarithm, both ends included."""
    angle = torch.arange(length)[:, None] * torch.logspace(0, -4, dim // 2)
    return torch.cat((angle.sin(), angle.cos()), 1)


METHOD = FrameTokeniser
