"""Texts of all lengths in one graph: packed into rows of a fixed number of tokens, run in batches of rows, and put back in order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor, nn

from apportion.engine.compile import build
from apportion.engine.graph import Backend, serving
from apportion.engine.route import fill, some
from apportion.engine.table import Build, Table
from apportion.engine.texts import used
from apportion.errors import EngineError


def pack(tokens: Sequence[int], *, length: int, slots: int) -> list[list[int]]:
    """Which texts go into which row of `length` tokens, at most `slots` in each: the longest first, each into the fullest row that has room for it.

    Best fit, decreasing: without `slots` at most 11/9 of the fewest rows there could be, and 2/3 (Johnson 1973; the bound of Dosa 2007). Equal lengths go in
    order. Cost: texts x rows steps. Raises EngineError for a text of no token or of more than `length`.
    """
    if slots < 1 or (tokens and not 1 <= min(tokens) <= max(tokens) <= length):
        found = f"texts of {min(tokens, default=0)} to {max(tokens, default=0)} tokens, {slots} to a row"
        raise EngineError(found, wanted=f"texts of 1 to {length} tokens, one to a row at least", do="Cut them, or make the rows longer.")
    rows, room = list[list[int]](), list[int]()
    for text in sorted(range(len(tokens)), key=lambda text: -tokens[text]):
        fits = [row for row, left in enumerate(room) if left >= tokens[text] and len(rows[row]) < slots]
        if fits:
            row = min(fits, key=room.__getitem__)
        else:
            row = len(rows)
            rows.append([])
            room.append(length)
        rows[row].append(text)
        room[row] -= tokens[text]
    return rows


@final
class Packs:
    """Runs texts along one path, in rows that hold several of them: one graph for each number of rows, whatever the lengths of the texts.

    `module`: (ids int64 (r, length) or with token types (r, 2, length), text (r, length)) -> (r, slots, ...), as `network.packed.Packed` takes and gives them.
    `buckets`: numbers of rows. Inputs: (b, n) or (b, 2, n) for any n; padding is taken away wherever it stands, as the tokeniser does.
    An answer does not depend on the texts beside it, up to rounding. Cost beside the graphs: laying texts into rows on the host, 0.9 ms for 32 texts.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        length: int,
        slots: int,
        padding: int,
        pairs: bool = False,
        buckets: Sequence[int] = (1, 8, 32),
        backend: Backend = "inductor",
        make: Build = build,
    ) -> None:
        self.length, self.slots, self._padding = length, slots, padding
        shape = (2, length) if pairs else (length,)
        word = int(padding == 0)  # any that is not the padding
        self._table = Table({"rows": module}, buckets=buckets, backend=backend, input_shape=shape, dtype=torch.int64, fill=word, make=make)
        self._traffic = Counter[int]()

    @property
    def wanted(self) -> int:
        """How many graphs there are to build: one for each number of rows."""
        return self._table.wanted

    @property
    def weight_bytes(self) -> int:
        """What its graphs hold of weights beside the modules' own."""
        return self._table.weight_bytes

    @property
    def traffic(self) -> Counter[int]:
        """How often calls brought each number of rows, for `choose`. Calls in several threads at once may lose a count."""
        return self._traffic.copy()

    def warm(self, progress: Callable[[str], None] | None = None) -> int:
        """Build every graph that is not built yet and return how many there are. Raises EngineError."""
        table = self._table
        if table.whole:
            return table.wanted
        with serving():
            blank = table.blank()
            found = [table.add("rows", (blank[:size].clone(), blank.new_zeros(size, self.length)), size, progress) for size in table.buckets]
            table.close({tuple(answer.shape[1:]) for answer in found})
        return table.wanted

    def tokens_run(self, inputs: Tensor) -> int:
        """Tokens that go through the layers for these texts, padding between texts and in the last batch of rows included."""
        rows = pack([text.shape[-1] for text in self._texts(inputs)], length=self.length, slots=self.slots)
        return self.length * sum(piece.size for piece in fill(range(len(rows)), self._table.buckets, among=len(rows)))

    def __call__(self, inputs: Tensor) -> Tensor:
        """Answers (b, ...) for any number of texts, in order. Raises EngineError before `warm()`, and for what is no text, too long or of another form."""
        texts = self._texts(inputs)
        rows = pack([text.shape[-1] for text in texts], length=self.length, slots=self.slots)
        given, text, slot = self._laid(texts, rows)
        self._table.check(given)
        self._traffic[len(rows)] += 1
        with serving():
            found = [
                self._table["rows", piece.size](some(given, piece.rows), some(text, piece.rows))[: piece.real]
                for piece in fill(range(len(rows)), self._table.buckets, among=len(rows))
            ]
            return torch.cat(found).flatten(0, 1).index_select(0, slot.to(inputs.device))

    def _texts(self, inputs: Tensor) -> list[Tensor]:
        """Each text without its padding; of one that is nothing else, the first token. Raises EngineError for inputs that are no texts."""
        most = int(used(inputs, self._padding).max()) if len(inputs) else 0
        kept = inputs[..., :most]
        real = (kept if kept.ndim == 2 else kept[:, 0]) != self._padding
        real[:, :1] |= ~real.any(1, keepdim=True)
        return [text[..., each] for text, each in zip(kept, real, strict=True)]

    def _laid(self, texts: list[Tensor], rows: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs and text numbers of each row, and the place of each text's answer among all slots."""
        if not texts:
            raise EngineError("no text", wanted="at least one", do="Give some.")
        given = texts[0].new_full((len(rows), *texts[0].shape[:-1], self.length), self._padding)
        if given.ndim == 3:
            given[:, 1] = 0
        text, slot = texts[0].new_full((len(rows), self.length), self.slots), torch.empty(len(texts), dtype=torch.int64)
        for row, members in enumerate(rows):
            end = 0
            for number, member in enumerate(members):
                start, end = end, end + texts[member].shape[-1]
                given[row, ..., start:end] = texts[member]
                text[row, start:end] = number
                slot[member] = row * self.slots + number
        return given, text, slot
