"""An engine for each length of text: a short text costs what a short text costs."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol, Self, final

import torch
import torch.nn.functional as F
from torch import Tensor

from apportion.engine.relay import Relay
from apportion.errors import EngineError
from apportion.vocab import Answer


class Routed(Protocol):
    """What runs samples along paths of their own: an Engine or a Relay."""

    @property
    def wanted(self) -> int: ...
    @property
    def built(self) -> int: ...
    @property
    def traffic(self) -> Counter[int]: ...
    @property
    def weight_bytes(self) -> int: ...
    def warm(self, progress: Callable[[str], None] | None = None) -> int: ...
    def at(self, buckets: Sequence[int]) -> Self: ...
    def forget(self) -> None: ...
    def __call__(self, inputs: Tensor, *, budget: float, cap: float = math.inf) -> Answer: ...
    def forced(self, inputs: Tensor, rung: int) -> Answer: ...
    def decided(self, inputs: Tensor, *, budget: float, cap: float = math.inf) -> Tensor: ...


@final
class Lengths:
    """Sends every text to the engine of the shortest length that holds it, whatever it was padded to, and puts the answers back in order.

    `engines`: for each length, ascending, one of the same rungs whose inputs are int64 (length,) or, with token types, (2, length).
    Inputs: (b, n) or (b, 2, n) for any n; what stands after the last token that is not `padding` is taken away. Graphs: those of all engines together,
    and the memory of their copies of the weights. An answer does not depend on the texts beside it, nor on what a text was padded to.
    """

    def __init__(self, engines: Mapping[int, Routed], *, padding: int) -> None:
        if not engines or list(engines) != sorted(engines) or min(engines) < 1:
            raise EngineError(f"engines for lengths {tuple(engines)}", wanted="positive lengths, ascending", do="Use for example (32, 64, 128).")
        self._engines, self._padding, self._tokens = dict(engines), padding, Counter[int]()

    @property
    def wanted(self) -> int:
        """How many graphs there are to build: every path at every bucket and length."""
        return sum(engine.wanted for engine in self._engines.values())

    @property
    def built(self) -> int:
        """How many of them there are."""
        return sum(engine.built for engine in self._engines.values())

    @property
    def weight_bytes(self) -> int:
        """What all graphs hold of weights beside the modules' own."""
        return sum(engine.weight_bytes for engine in self._engines.values())

    @property
    def traffic(self) -> Counter[int]:
        """How often calls brought a group of each size, to any of the lengths: what `choose` finds buckets for."""
        return sum((engine.traffic for engine in self._engines.values()), Counter[int]())

    @property
    def tokens(self) -> Counter[int]:
        """How many texts of each length calls brought: what `choose_lengths` finds lengths for. Calls in several threads at once may lose a count."""
        return self._tokens.copy()

    def forget(self) -> None:
        """Count traffic and tokens anew."""
        self._tokens.clear()
        for engine in self._engines.values():
            engine.forget()

    def warm(self, progress: Callable[[str], None] | None = None) -> int:
        """Build every graph that is not built yet and return how many there are. Raises EngineError."""
        for length, engine in self._engines.items():
            engine.warm(None if progress is None else lambda text, length=length: progress(f"{length} tokens, {text}"))
        return self.wanted

    def at(self, buckets: Sequence[int]) -> Lengths:
        """The same at other batch sizes, as each of its engines gives it; texts are counted on."""
        other = copy.copy(self)
        other._engines = {length: engine.at(buckets) for length, engine in self._engines.items()}
        return other

    def __call__(self, inputs: Tensor, *, budget: float, cap: float | Sequence[float] = math.inf) -> Answer:
        """Answers for any number of texts, in order; `cap` is one for all or one for each length. Raises like an engine, and for a text that is too long."""
        caps = dict(zip(self._engines, cap if isinstance(cap, Sequence) else [cap] * len(self._engines), strict=True))
        answer = self._answers(inputs, lambda length, rows: self._engines[length](rows, budget=budget, cap=caps[length]))
        self._tokens.update(used(inputs, self._padding).tolist())
        return answer

    def forced(self, inputs: Tensor, rung: int) -> Answer:
        """Answers along one rung, as an engine gives them."""
        return self._answers(inputs, lambda length, rows: self._engines[length].forced(rows, rung))

    def every(self, inputs: Tensor) -> Tensor:
        """The answers of all rungs, (b, k, classes), where the engines run one rung after the other."""
        found = []
        for length, rows, part in self._parts(inputs):
            engine = self._engines[length]
            if not isinstance(engine, Relay):
                raise EngineError("engines that decide once", wanted="a Relay for each length", do="Ask for one rung after the other with forced().")
            found.append((rows, engine.every(part)))
        return as_wide([part for _, part in found], inputs.shape[-1], leading=2)[torch.cat([rows for rows, _ in found]).argsort()]

    def decided(self, inputs: Tensor, *, budget: float, cap: float = math.inf) -> Tensor:
        """The (b,) rungs alone, at the cost of the glance."""
        found = [(rows, self._engines[length].decided(part, budget=budget, cap=cap)) for length, rows, part in self._parts(inputs)]
        return torch.cat([part for _, part in found])[torch.cat([rows for rows, _ in found]).argsort()]

    def places(self, inputs: Tensor) -> Tensor:
        """For each text the place of its length among the lengths, (b,). Raises EngineError for a text that is too long."""
        tokens = used(inputs, self._padding)
        place = torch.searchsorted(torch.tensor(list(self._engines), device=tokens.device), tokens)
        if len(tokens) and int(place.max()) == len(self._engines):
            found = f"a text of {int(tokens.max())} tokens at row {int(tokens.argmax())}"
            raise EngineError(found, wanted=f"at most {max(self._engines)}", do="Cut it, or read the model with a larger length.")
        return place

    def _answers(self, inputs: Tensor, call: Callable[[int, Tensor], Answer]) -> Answer:
        found = [(rows, call(length, part)) for length, rows, part in self._parts(inputs)]
        if len(found) == 1:  # all of one length, a single text among them
            answer = found[0][1]
            return answer._replace(logits=as_wide([answer.logits], inputs.shape[-1], leading=1))
        back = torch.cat([rows for rows, _ in found]).argsort()
        logits, path, cost = zip(*(answer for _, answer in found), strict=True)
        return Answer(as_wide(logits, inputs.shape[-1], leading=1)[back], torch.cat(path)[back], torch.cat(cost)[back])

    def _parts(self, inputs: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Length, rows and inputs of each group of texts."""
        place = self.places(inputs)
        if not len(place):
            raise EngineError("no text", wanted="at least one", do="Give some.")
        lengths, first = list(self._engines), int(place[0])
        if len(place) == 1 or bool((place == first).all()):
            yield lengths[first], torch.arange(len(place)), cut(inputs, lengths[first], self._padding)
            return
        for number, length in enumerate(lengths):
            rows = (place == number).nonzero()[:, 0]
            if len(rows):
                yield length, rows, cut(inputs[rows], length, self._padding)


def as_wide(answers: Sequence[Tensor], tokens: int, *, leading: int) -> Tensor:
    """Answers of several lengths in one tensor. Where each token has its own, (leading axes, n, classes), there are as many as tokens came in, 0 at padding."""
    if answers[0].ndim == leading + 1:
        return torch.cat(list(answers))
    return torch.cat([F.pad(part, (0, 0, 0, tokens - part.shape[-2])) for part in answers])  # a negative number cuts


def used(inputs: Tensor, padding: int) -> Tensor:
    """How many places each text takes up to its last token that is not padding, at least 1, (b,). Raises EngineError for inputs that are no texts."""
    if inputs.dtype != torch.int64 or not (inputs.ndim == 2 or (inputs.ndim == 3 and inputs.shape[1] == 2)) or not inputs.shape[-1]:
        found = f"inputs of shape {tuple(inputs.shape)}, {inputs.dtype}"
        raise EngineError(found, wanted="int64 (b, n), or (b, 2, n) with token types", do="Tokenise the texts.")
    ids = inputs if inputs.ndim == 2 else inputs[:, 0]
    return ((ids != padding) * torch.arange(1, ids.shape[1] + 1, device=ids.device)).amax(1).clamp_min(1)


def cut(inputs: Tensor, length: int, padding: int) -> Tensor:
    """The same texts at exactly this length: padded, or cut behind."""
    if inputs.shape[-1] == length:
        return inputs
    kept = min(length, inputs.shape[-1])
    made = inputs.new_zeros(*inputs.shape[:-1], length)
    (made if made.ndim == 2 else made[:, 0]).fill_(padding)
    made[..., :kept] = inputs[..., :kept]
    return made
