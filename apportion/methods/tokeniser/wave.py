"""Waveform embedding: strided convolutions over raw sound, a projection, and one more convolution whose output is added as position.

Baevski et al. 2020, "wav2vec 2.0", arXiv 2006.11477, section 2; also HuBERT (arXiv 2106.07447) and WavLM (arXiv 2110.13900).
(b, samples) float -> Tokens, 49 for a second at 16 kHz with the published strides. There is no mask: shorter sound is filled up with zeros, and where the norm
is over time all features see how many. Cost: in the base models two thirds of what their 12 blocks cost, and no path saves any of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apportion.errors import PathError
from apportion.vocab import Card, Tokens


class Layer(nn.Module):
    """Convolution, norm and activation, (b, channels, n) in and out; `norm` None: none."""

    def __init__(self, conv: nn.Conv1d, norm: nn.Module | None, act: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.act = conv, norm, act

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if isinstance(self.norm, nn.LayerNorm):
            x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        elif self.norm is not None:
            x = self.norm(x)
        return self.act(x)


class WaveTokeniser(nn.Module):
    """`channels`, `kernels` and `steps` of the convolutions, first to last; `project_norm` stands before the projection, `norm` behind the positions.

    With `layer_norms` there is a norm over channels behind each convolution, else one over time behind the first; both have the eps of torch, 1e-5.
    """

    card = Card("wav2vec 2.0 feature encoder", "Baevski et al. 2020", "2006.11477", None, exact=True, needs="nothing")
    entering: tuple[int, ...] = ()

    def __init__(
        self,
        *,
        samples: int,
        dim: int,
        channels: Sequence[int],
        kernels: Sequence[int],
        steps: Sequence[int],
        layer_norms: bool,
        bias: bool,
        act: nn.Module,
        position_kernel: int,
        position_groups: int,
        project_norm: nn.Module,
        norm: nn.Module,
    ) -> None:
        super().__init__()
        self.samples = samples

        def normed(index: int, width: int) -> nn.Module | None:
            return nn.LayerNorm(width) if layer_norms else nn.GroupNorm(width, width) if index == 0 else None

        shapes = zip(itertools.pairwise((1, *channels)), kernels, steps, strict=True)
        self.layers = nn.ModuleList(
            Layer(nn.Conv1d(inp, out, kernel, step, bias=bias), normed(index, out), act) for index, ((inp, out), kernel, step) in enumerate(shapes)
        )
        self.project_norm, self.project = project_norm, nn.Linear(channels[-1], dim)
        self.position = nn.Conv1d(dim, dim, position_kernel, groups=position_groups)
        self.act, self.norm = act, norm

    def forward(self, inputs: Tensor, patch: int) -> Tokens:
        if patch:
            raise PathError(f"patch {patch}", wanted="patch 0: a waveform has none", do="Build paths with Space.path().")
        if inputs.shape[1:] != (self.samples,):
            raise PathError(f"an input of {tuple(inputs.shape)}", wanted=f"(batch, {self.samples})", do="Cut the sound, or fill it up with zeros.")
        x = inputs[:, None]
        for layer in self.layers:
            x = layer(x)
        x = self.project(self.project_norm(x.transpose(1, 2)))
        # An even kernel looks back one token further than ahead.
        kernel = self.position.kernel_size[0]
        around = self.position(F.pad(x.transpose(1, 2), (kernel // 2, (kernel - 1) // 2)))
        x = self.norm(x + self.act(around).transpose(1, 2))
        b, n, _ = x.shape
        return Tokens(x, x.new_ones(b, n), torch.arange(n, device=x.device).expand(b, n), 0)

    def macs(self, patch: int) -> int:
        total, n = 0, self.samples
        for conv in (part for part in self.layers.modules() if isinstance(part, nn.Conv1d)):
            n = (n - conv.kernel_size[0]) // conv.stride[0] + 1
            total += n * conv.weight.numel()
        return total + n * (self.project.weight.numel() + self.position.weight.numel())


METHOD = WaveTokeniser
