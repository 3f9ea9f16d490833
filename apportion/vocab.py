"""The words every room shares. Integers, tensors and conditions; torch is the only import, and nothing here decides anything."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple

from torch import Tensor

from apportion.errors import ControlError, PathError, PlanError

Task = Literal["classification", "multilabel", "regression", "embedding", "token_classification", "segmentation"]
"""What the numbers that a network answers with mean."""
Control = Literal["glance", "checkpoints", "entry"]
"""Where it is decided how much a sample gets."""
Axis = Literal["patch", "tokens", "heads", "width", "depth"]
Notes = dict[str, list[Tensor]]
"""Facts that training or a picture wants from a forward pass. The caller brings the empty dict; serving passes None."""


class Tokens(NamedTuple):
    """What flows through the network: a pytree of plain tensors and one constant."""

    x: Tensor  # (b, n, d) values
    size: Tensor  # (b, n) how many source tokens each one stands for
    origin: Tensor  # (b, n0) where each source token went, so that any head can spread results back
    prefix: int  # leading tokens that are never reduced (class, registers)

    @property
    def reduced(self) -> bool:
        """Whether any token stands for several: known from shapes alone, hence a constant to the compiler."""
        return self.x.shape[1] < self.origin.shape[1]


class Step(NamedTuple):
    """One block of a path."""

    block: int
    tokens: int
    heads: int
    width: int


@dataclass(frozen=True, slots=True)
class Path:
    """One way through the network: integers only, one entry for each block that runs, in the order in which they run.

    `tokens[s]` is the number left after the reducer of step `s` (prefix included): its mixer still sees `tokens[s - 1]`, the first one `entering`.
    """

    patch: int
    blocks: tuple[int, ...]
    tokens: tuple[int, ...]
    heads: tuple[int, ...]
    width: tuple[int, ...]
    entering: int | None = None  # tokens that leave the tokeniser, prefix included; None: all

    def __post_init__(self) -> None:
        lengths = {name: len(getattr(self, name)) for name in ("blocks", "tokens", "heads", "width")}
        if len(set(lengths.values())) != 1:
            raise PathError(f"axes of different lengths {lengths}", wanted="one entry for each block that runs", do="Build paths with Space.path().")

    @property
    def steps(self) -> tuple[Step, ...]:
        return tuple(map(Step, self.blocks, self.tokens, self.heads, self.width))

    @property
    def name(self) -> str:
        """Readable and unique: the key in graphs, tables, files and pictures."""

        def span(values: Sequence[int]) -> str:
            return "0" if not values else str(values[0]) if values[0] == values[-1] else f"{values[0]}-{values[-1]}"

        fewer = () if self.entering is None else (self.entering,)
        digest = hashlib.sha256(repr((self.patch, self.steps, *fewer)).encode()).hexdigest()[:4]
        return f"d{len(self.blocks)}_t{span((*fewer, *self.tokens))}_h{span(self.heads)}_w{span(self.width)}_{digest}"

    def same_start(self, other: Path, steps: int) -> bool:
        """Whether both do the same work in the tokeniser and their first `steps` blocks."""
        same = self.patch == other.patch and self.entering == other.entering
        return same and len(self.steps) >= steps and self.steps[:steps] == other.steps[:steps]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Path:
        axes = (tuple(int(v) for v in data[axis]) for axis in ("blocks", "tokens", "heads", "width"))
        return cls(int(data["patch"]), *axes, entering=None if data.get("entering") is None else int(data["entering"]))

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True)
class Space:
    """Every path a network can take: each axis from small to full, as the methods in its slots allow."""

    patch: int
    depth: int  # blocks
    tokens: int  # at full, prefix included
    prefix: int
    heads: tuple[int, ...]  # choices, ascending; the last is full
    width: tuple[int, ...]
    reduces: bool  # whether a reducer sits in the network
    skips: bool  # whether blocks may be left out
    orders: tuple[tuple[int, ...], ...] = ()  # which blocks run at each depth that the depth method offers
    entering: tuple[int, ...] = ()  # fewer tokens than at full that can leave the tokeniser

    @property
    def full(self) -> Path:
        return self.path()

    def family(self) -> tuple[Path, ...]:
        """The paths to choose from, where the network says which: its axes do not move freely. None: they do."""
        return ()

    def path(
        self,
        *,
        blocks: Sequence[int] | None = None,
        tokens: int | Sequence[int] | None = None,
        heads: int | Sequence[int] | None = None,
        width: int | Sequence[int] | None = None,
        entering: int | None = None,
    ) -> Path:
        """The path with these entries, full where nothing is said; one integer stands for every step. Raises PathError.

        Where fewer tokens are `entering` and of `tokens` nothing is said, all of them stay.
        """
        entering = None if entering == self.tokens else entering
        which = tuple(range(self.depth)) if blocks is None else tuple(blocks)

        def every(value: int | Sequence[int] | None, full: int) -> tuple[int, ...]:
            return (full if value is None else value,) * len(which) if value is None or isinstance(value, int) else tuple(value)

        path = Path(self.patch, which, every(tokens, entering or self.tokens), every(heads, self.heads[-1]), every(width, self.width[-1]), entering)
        self.check(path)
        return path

    def merging(self, rate: int, *, start: int = 0, depth: int | None = None) -> tuple[int, ...]:
        """A token schedule that takes away `rate` tokens in each step from `start` on, at most half of those that may go."""
        left, schedule = self.tokens, []
        for step in range(self.depth if depth is None else depth):
            if step >= start:
                left -= max(0, min(rate, (left - self.prefix) // 2, left - self.prefix - 1))
            schedule.append(left)
        return tuple(schedule)

    def check(self, path: Path) -> None:
        """Raises PathError, naming the first entry that no method here can serve."""

        def refuse(found: str, wanted: str) -> None:
            raise PathError(found, wanted=wanted, do="Put a method that adapts this axis into the network, or build the path with Space.path().")

        if path.patch != self.patch:
            refuse(f"patch {path.patch}", f"patch {self.patch}")
        if not self.skips and path.blocks != tuple(range(self.depth)):
            refuse(f"blocks {path.blocks}", f"all {self.depth} blocks in order")
        if path.entering is not None and path.entering not in self.entering:
            refuse(f"{path.entering} tokens from the tokeniser", f"one of {self.entering}" if self.entering else f"None: all {self.tokens}")
        before = self.tokens if path.entering is None else path.entering
        for step in path.steps:
            if not 0 <= step.block < self.depth:
                refuse(f"block {step.block}", f"0 to {self.depth - 1}")
            if step.heads not in self.heads:
                refuse(f"{step.heads} heads in block {step.block}", f"one of {self.heads}")
            if step.width not in self.width:
                refuse(f"width {step.width} in block {step.block}", f"one of {self.width}")
            if step.tokens != before and not self.reduces:
                refuse(f"{step.tokens} tokens after block {step.block}", f"{before}: no reducer is in place")
            if step.tokens > before or before - step.tokens > (before - self.prefix) // 2 or step.tokens <= self.prefix:
                refuse(f"{step.tokens} tokens after block {step.block}", f"at most {before}, and no more than half of them taken away at once")
            before = step.tokens


@dataclass(frozen=True, slots=True)
class Ladder:
    """The served paths, cheapest first and full last; all do the same work in their first `glance` blocks, where the decision is made.

    A glance of -1: it is made before the tokeniser, and nothing is shared.
    """

    paths: tuple[Path, ...]
    glance: int

    def __post_init__(self) -> None:
        for path in self.paths:
            if self.glance >= 0 and not path.same_start(self.paths[-1], self.glance):
                raise PathError(
                    f"path {path.name}, which differs from {self.paths[-1].name} before the decision",
                    wanted=f"the same first {self.glance} blocks",
                    do="Make the glance shorter or the path longer.",
                )


@dataclass(frozen=True, slots=True)
class Budget:
    """What may be spent per sample: a mean target, or with `cap` a ceiling that no sample passes."""

    amount: float
    unit: Literal["x", "ms", "gmacs"] = "x"
    cap: bool = False

    @classmethod
    def parse(cls, text: str | float | Budget) -> Budget:
        """`0.5x` of the full path, `12ms`, `2GMACs`; with a leading `<` it is a cap. Raises PlanError."""
        if isinstance(text, Budget):
            return text
        body = str(text).strip().lower()
        cap, body = body.startswith("<"), body.lstrip("<= ")
        for suffix, unit in (("gmacs", "gmacs"), ("ms", "ms"), ("x", "x"), ("", "x")):
            number = body.removesuffix(suffix).strip()
            if body.endswith(suffix):
                try:
                    amount = float(number)
                except ValueError:
                    break
                if amount > 0 and math.isfinite(amount):
                    return cls(amount, unit, cap)  # pyright: ignore[reportArgumentType]
                break
        raise PlanError(f"budget {text!r}", wanted="a positive amount such as 0.5x, 12ms or 2GMACs (<0.5x for a cap)", do="Give one of these.")


@dataclass(frozen=True, slots=True)
class Outcomes:
    """Samples by paths: all that control ever learns from, so that it can be tested with a made-up table."""

    signal: Tensor  # (n, f) what the glance saw
    quality: Tensor  # (n, k) how good each answer is, 0 to 1; for one class right or wrong (bool is taken as 1 and 0); by the full path's answer without labels
    agree: Tensor  # (n, k) bool: same answer as the full path
    loss: Tensor  # (n, k)
    margin: Tensor  # (n, k) how sure it is: for one class the top probability minus the second
    cost: Tensor  # (k,) relative to the full path, controller included, ascending

    def __post_init__(self) -> None:
        object.__setattr__(self, "quality", self.quality.float())
        n, k = self.quality.shape
        shapes = {name: tuple(getattr(self, name).shape) for name in ("agree", "loss", "margin")}
        if any(shape != (n, k) for shape in shapes.values()) or self.cost.shape != (k,) or self.signal.shape[0] != n or not n:
            raise ControlError(
                f"tables of shapes {shapes} for {n} samples and {k} paths",
                wanted="one row for each sample, one column for each path",
                do="Measure all paths on the same samples.",
            )
        if not bool(((self.quality >= 0) & (self.quality <= 1)).all()):
            row, path = (~((self.quality >= 0) & (self.quality <= 1))).nonzero()[0].tolist()
            found = f"quality {self.quality[row, path].item():.4g} of sample {row} along path {path}"
            raise ControlError(found, wanted="0 to 1", do="Bring the task's measure to that range.")
        if not bool((self.cost[1:] >= self.cost[:-1]).all()):
            raise ControlError("paths that are not in order of cost", wanted="cheapest first, full last", do="Sort the ladder.")

    @property
    def correct(self) -> Tensor:
        """Where an answer is wholly right, (n, k) bool."""
        return self.quality >= 1

    def rows(self, index: Tensor) -> Outcomes:
        """The same table for some of the samples."""
        return replace(self, **{name: getattr(self, name)[index] for name in ("signal", "quality", "agree", "loss", "margin")})

    def columns(self, index: Tensor) -> Outcomes:
        """The same table for some of the paths (ascending indices)."""
        return replace(self, **{name: getattr(self, name)[:, index] for name in ("quality", "agree", "loss", "margin")}, cost=self.cost[index])


class Answer(NamedTuple):
    """What a call returns, one row for each sample."""

    logits: Tensor  # (b, classes); numbers or an embedding (b, outputs); a class for each token or patch (b, n, classes)
    path: Tensor  # (b,) rung of the ladder taken
    cost: Tensor  # (b,) GMACs spent, controller included


@dataclass(frozen=True, slots=True)
class Card:
    """Who thought of a method and what may be assumed of it; sits in the method's file."""

    title: str
    source: str  # authors, year
    arxiv: str  # "" where there is none
    axis: Axis | None  # the integer of a path that it listens to
    exact: bool  # equals the dense part at full
    needs: Literal["nothing", "calibration", "healing", "training"]
    changed: str = ""  # what we do differently from the paper, and why


@dataclass(frozen=True, slots=True)
class Choice:
    """One method in one slot of some blocks (all where none is named)."""

    slot: str
    name: str
    blocks: tuple[int, ...] = ()
    options: dict[str, int | float | bool | str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Plan:
    """All of the configuration there is: what is adapted, how it is taught and what is promised."""

    choices: tuple[Choice, ...] = (Choice("reducer", "tome"), Choice("ffn", "matformer"), Choice("mixer", "head_prefix"), Choice("depth", "skip"))
    glance: int = 1  # blocks that run before the decision
    rungs: int = 6  # served paths at most
    tolerance: float = 0.3  # percentage points of accuracy that may be lost
    confidence: float = 0.0  # with which the tolerance holds, certified on images that nothing else saw; 0 certifies nothing
    # decide once, after the glance; run exits in turn and leave at the first that is sure; or decide before the tokeniser, by how plain a picture is
    control: Control = "glance"
    search: Literal["macs", "ms"] = "macs"  # what the served paths are chosen to save; ms of this device are foretold from a few paths that are built and timed
    never_slower: bool = True  # a path that is not faster than the dense model on this device is not served
    epochs: float = 0.0  # of sandwich distillation; 0 adapts without training
    taught: Literal["network", "maps"] = "network"  # what learns in them; maps alone, which stand for blocks left out, leave the full path as it was read
    batch: int = 128
    learning_rate: float = 5e-4
    seed: int = 0
