"""What each slot takes and gives back: a method's signature is its documentation.

Shapes: b samples, n tokens, d channels, h heads. `macs` is the closed form of one call per sample, in multiply-adds, beside the code it counts.
Every method also has a `card` and is built with `from_dense(part, **options)` from the part that it replaces.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor, nn

from apportion.vocab import Notes, Tokens


class Mixed(NamedTuple):
    """What a mixer gives: the branch to add, and what a reducer may look at without computing it again."""

    out: Tensor  # (b, n, d)
    query: Tensor  # (b, h, n, d / h)
    key: Tensor  # (b, h, n, d / h)


class Contribution(NamedTuple):
    """Where the importance of a hidden unit (or head) shows: at the input of this module, in groups of `unit` channels."""

    into: nn.Module
    unit: int
    strength: Tensor  # (input channels of the module,) squared norm of what leaves each one


class Tokeniser(Protocol):
    def __call__(self, inputs: Tensor, patch: int) -> Tokens: ...
    def macs(self, patch: int) -> int: ...


class Reducer(Protocol):
    reduces: bool

    # `real` (b,) comes with padding (tokens of size 0, always last): how many of the kept are to be real tokens, row by row.
    def __call__(self, tokens: Tokens, keep: int, mixed: Mixed, notes: Notes | None = None, real: Tensor | None = None) -> Tokens: ...
    def macs(self, before: int, keep: int, prefix: int, mixed_heads: int) -> int: ...


class Mixer(Protocol):
    choices: tuple[int, ...]

    def __call__(self, tokens: Tokens, heads: int, notes: Notes | None = None) -> Mixed: ...
    def macs(self, tokens: int, heads: int) -> int: ...
    def contribution(self) -> Contribution: ...
    def permute(self, order: Tensor) -> None: ...


class FeedForward(Protocol):
    choices: tuple[int, ...]

    # `size` (b, n) comes where there may be padding (tokens of size 0), for methods in which a sample's tokens share something.
    def __call__(self, x: Tensor, width: int, notes: Notes | None = None, size: Tensor | None = None) -> Tensor: ...
    def macs(self, tokens: int, width: int) -> int: ...
    def contribution(self) -> Contribution: ...
    def permute(self, order: Tensor) -> None: ...


class Norm(Protocol):
    def __call__(self, x: Tensor) -> Tensor: ...


class Nested(Norm, Protocol):
    """A norm that takes any prefix of its channels."""

    def permute(self, order: Tensor) -> None: ...


class Residual(Protocol):
    def __call__(self, x: Tensor, branch: Tensor) -> Tensor: ...


class Adapter(Protocol):
    def __call__(self, x: Tensor, branch: Tensor) -> Tensor: ...
    def macs(self, tokens: int) -> int: ...


class Depth(Protocol):
    skips: bool

    def orders(self, blocks: int) -> tuple[tuple[int, ...], ...]: ...


class Bridge(Protocol):
    runs: tuple[tuple[int, int], ...]

    # For the blocks from `first` up to `last` (not included), which a path leaves out; `runs` are those for which something stands.
    def __call__(self, tokens: Tokens, first: int, last: int) -> Tokens: ...
    def macs(self, tokens: int, first: int, last: int) -> int: ...


class Head(Protocol):
    def __call__(self, tokens: Tokens) -> Tensor: ...
    def macs(self, tokens: int, prefix: int) -> int: ...


class Weight(Protocol):
    in_features: int
    out_features: int

    def __call__(self, x: Tensor, out: int | None = None, inp: int | None = None) -> Tensor: ...
    def permute(self, *, out: Tensor | None = None, inp: Tensor | None = None) -> None: ...
    def strength(self) -> Tensor: ...


class Matrix(Weight, Protocol):
    """A weight that is a matrix and a bias, as they stand."""

    weight: Tensor
    bias: Tensor | None


class Layers(FeedForward, Protocol):
    """The plain FFN: what stands between its two products can be looked at, and done in part."""

    up: Matrix
    down: Matrix
    act: nn.Module
    gate: Matrix | None
    norm: Nested | None
    training: bool


class Objective(Protocol):
    def __call__(self, student: Tensor, *, teacher: Tensor | None = None, target: Tensor | None = None) -> Tensor: ...
