"""What a dense network is made of: plain numbers and names, enough to build it again without the library it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from apportion.vocab import Task

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu", "tanh", "identity"]


@dataclass(frozen=True, slots=True)
class Architecture:
    """Shape and flavour of a dense encoder for images; for texts where `words` is not 0, for sound where `samples` or `frames` is, for rows of a table
    where `numbers` or `categories` are, for time series of so many `channels` where `points` is (then `image_size` is 0).

    Sound is a waveform of `samples` numbers, or a spectrogram of `frames` by `bands`: cut into patches, or with `patch` 0 convolved along time.

    `eps` is that of all norms; `classes` 0 means that the head returns the pooled features. A path's token counts are stated at `length` tokens; a
    shorter text keeps the same share. With `global_every` above 1, block i has a `window` and `rotary_local` unless i is a multiple of it. For images, rotary
    and relative positions are those of rows and columns, and `relative_buckets` is (2 * side - 1) ** 2 + 3 for a grid of side by side patches.
    """

    image_size: int
    patch: int
    dim: int
    depth: int
    heads: int
    hidden: int
    classes: int
    channels: int = 3
    stem: Literal["patch", "conv"] = "patch"
    patch_bias: bool = True
    class_token: bool = True
    registers: int = 0
    position_prefix: bool = True  # positions for class and register tokens as well
    stem_norm: bool = False  # a norm before the first block (CLIP)
    qkv_bias: bool = True
    proj_bias: bool = True
    qk_norm: bool = False
    layer_scale: bool = False
    norm_first: bool = True  # False: the norm stands after each residual, as in BERT
    activation: Activation = "gelu"
    eps: float = 1e-6
    final_norm: bool = True
    head_norm: bool = False  # a norm after pooling
    head_bias: bool = True
    pool: Literal["class_token", "mean", "attention_pool", "distilled", "prefix_mean", "every_token"] = "class_token"
    norm_bias: bool = True
    first_norm: bool = True  # False: no norm before the first mixer (ModernBERT)
    gated: bool = False  # GeGLU, SwiGLU: hidden units multiplied by those of a third layer
    ffn_bias: bool = True
    rotary: float = 0.0  # base of rotary positions; 0: none
    rotary_local: float = 0.0  # the same in blocks with a window
    window: int = 0  # how far a token sees to either side; 0: everywhere
    global_every: int = 1
    relative_buckets: int = 0  # of a learned bias by distance; 0: none
    head_hidden: Activation | None = None  # a layer of `head_width` units before the classes
    head_hidden_bias: bool = True
    head_hidden_norm: bool = False
    head_unit: bool = False  # an answer of length 1
    words: int = 0  # entries of the vocabulary
    length: int = 0  # tokens at full
    padding: int = 0  # id of the token that stands for nothing
    embedding: int = 0  # width of the tables; 0: dim
    positions: int = 0  # rows of learned positions; 0: none
    position_offset: int = 0  # the first that is used
    token_types: int = 0
    learned_positions: bool = True  # of patches
    rotary_start: float = 0.0  # coordinate of the first row and column of patches: the angle of a patch is a coordinate times a rate
    rotary_step: float = 1.0  # from one row or column to the next
    norm_branch: bool = False  # the norm stands on the branch, before it is added; `norm_first` is False then
    mixer_norm: bool = False  # a norm over all heads together, before they are projected
    ffn_norm: bool = False  # a norm over the hidden units
    pool_heads: int = 0  # of an attention pool; 0: heads
    pool_hidden: int = 0  # 0: hidden
    head_width: int = 0  # 0: dim
    samples: int = 0  # of a waveform
    frames: int = 0  # of a spectrogram
    bands: int = 0
    patch_steps: tuple[int, int] = (0, 0)  # from one patch of a spectrogram to the next, in bands and in frames: patches may overlap
    wave_channels: tuple[int, ...] = ()  # of the convolutions over a waveform, first to last
    wave_kernels: tuple[int, ...] = ()
    wave_steps: tuple[int, ...] = ()
    wave_norm: Literal["group", "layer"] = "group"  # over time behind the first of them, or over channels behind each
    wave_bias: bool = False
    wave_activation: Activation = "gelu"  # also behind the convolution that gives positions
    wave_project_norm: bool = True  # a norm before what they found is projected
    position_kernel: int = 0  # tokens that the convolution sees that gives positions
    position_groups: int = 1
    relative_range: int = 128  # distance from which on all share the last bucket
    relative_gate: bool = False  # each query says how much of the bias by distance it lets in (WavLM)
    content_to_position: bool = False  # each query has a score of its own for each bucket of distance (DeBERTa); `relative_range` 0: one for each distance
    position_to_content: bool = False  # so has each key
    grey_level: float = 0.0  # one of 255 in the units of an image: plain squares of four patches may become one token each; 0: never
    tape: int = 0  # places behind the patches of an image for what it reads from a bank; 0: none
    tape_rows: int = 0  # of that bank
    tape_key: int = 0  # channels by which a row is sought; 0: dim
    task: Task = "classification"  # what the `classes` outputs mean
    span: float = 0.0  # how far numbers range that are foretold: an error of this much is worth nothing
    numbers: int = 0  # columns of a table that hold numbers
    categories: tuple[int, ...] = ()  # entries of each of the others: its values, one for what is missing and one for what is unknown
    points: int = 0  # of a time series, in each of its channels
    stride: int = 0  # from one patch of it to the next

    @property
    def tokens(self) -> int:
        if self.columns:
            return self.columns + self.prefix
        if self.points:
            return (self.points - self.patch) // self.stride + 2 + self.prefix
        if self.words:
            return self.length
        if self.samples:
            n = self.samples
            for kernel, step in zip(self.wave_kernels, self.wave_steps, strict=True):
                n = (n - kernel) // step + 1
            return n
        if self.frames and self.patch:
            rows, columns = ((side - self.patch) // step + 1 for side, step in zip((self.bands, self.frames), self.patch_steps, strict=True))
            return rows * columns + self.prefix
        return (self.frames + 1) // 2 if self.frames else self.grid**2 + self.prefix + self.tape

    @property
    def columns(self) -> int:
        """Of a table; 0 for other inputs."""
        return self.numbers + len(self.categories)

    @property
    def grid(self) -> int:
        """Patches on a side of an image; 0 for other inputs."""
        return self.image_size // self.patch if self.image_size else 0

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one sample: what a batch of inputs has behind its first axis. A text may be shorter."""
        if self.columns:
            return (self.columns,)
        if self.points:
            return (self.channels, self.points)
        if self.words or self.samples:
            return (self.length if self.words else self.samples,)
        if self.frames:
            return (self.frames, self.bands) if self.patch else (self.bands, self.frames)
        return (self.channels, self.image_size, self.image_size)

    @property
    def prefix(self) -> int:
        return int(self.class_token) + self.registers
