"""Texts with labels, from .csv, .tsv or .jsonl files (also .gz), from .parquet files or from lists; what cannot be used is named, never dropped in silence."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor

from apportion.errors import DataError, PlanError
from apportion.intake import parquet
from apportion.intake.folders import OnSkip, Split, batched, cut, parted
from apportion.intake.labels import parsed
from apportion.intake.laid import HELD, HELD_BYTES, Lay, laid
from apportion.intake.shards import TORN, ending, opened, pieces, unread
from apportion.intake.sieve import Sieve
from apportion.intake.written import TEXT, picked
from apportion.methods.task import UNKNOWN
from apportion.vocab import Task

Text = str | tuple[str, str]
COUNTED = 64  # texts tokenised at a time where all are: while they are, they take some hundred times as much as their tokens


@dataclass(frozen=True, slots=True)
class Tokenise:
    """Texts in, int64 ids (b, n) out, n that of the longest; with `pairs` (b, 2, n), ids and token types, and texts may be pairs of them.

    `tokenizer`: the content of a tokenizer.json. Texts are cut to `length`. Raises DataError for an empty text, one with the padding token in it, and a
    pair where `pairs` is false; PlanError for a tokenizer that cannot be read or whose padding is another id, and without the package tokenizers.
    """

    tokenizer: str = field(repr=False)
    length: int
    padding: int
    pairs: bool = False
    _encoder: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise PlanError(f"no tokenizers here ({error})", wanted="the package", do="Install the extra: pip install 'apportion[text]'.") from error
        try:
            encoder = Tokenizer.from_str(self.tokenizer)
        except Exception as error:  # the package raises plain exceptions
            raise PlanError(f"a tokenizer that cannot be read ({str(error)[:200]})", wanted="the content of a tokenizer.json", do="Fetch it again.") from error
        declared = encoder.padding
        if declared is not None and declared["pad_id"] != self.padding:
            raise PlanError(f"padding with id {declared['pad_id']}", wanted=f"{self.padding}, the model's", do="Take the tokenizer of this model.")
        encoder.no_padding()
        encoder.enable_truncation(self.length)
        object.__setattr__(self, "_encoder", encoder)

    @classmethod
    def from_file(cls, file: str | File, *, length: int, padding: int, pairs: bool = False) -> Tokenise:
        """The same from a tokenizer.json on disk."""
        try:
            content = File(file).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"{file}: {error}", wanted="a tokenizer.json", do="Correct the path.") from error
        return cls(content, length=length, padding=padding, pairs=pairs)

    def __call__(self, texts: Sequence[Text], *, where: Sequence[str] = (), width: int = 0) -> Tensor:
        """`where`: what to call each text in an error, such as its file and line. `width`: the least n."""
        found = self._encoded(texts, where)
        n = max(width, *(len(one.ids) for one in found))
        ids = torch.tensor([one.ids + [self.padding] * (n - len(one.ids)) for one in found])
        if not self.pairs:
            return ids
        return torch.stack((ids, torch.tensor([one.type_ids + [0] * (n - len(one.ids)) for one in found])), 1)

    def sizes(self, texts: Sequence[Text], *, where: Sequence[str] = ()) -> Tensor:
        """How many tokens each text has, (b,)."""
        return torch.tensor([len(one.ids) for one in self._encoded(texts, where)])

    def spans(self, text: Text) -> list[tuple[int, int]]:
        """First and last character of each token in its text; equal where a token stands for no letters."""
        return self._encoded([text], ())[0].offsets

    def words(self, text: Text) -> list[int]:
        """For each token the number of the word that it begins, counted between spaces; -100 for one that goes on with a word or stands for no letters."""
        if not isinstance(text, str):
            raise DataError("a pair of texts", wanted="one text, whose words have labels", do="Give single texts.")
        number, begun = -1, UNKNOWN
        starts = [0] * len(text)
        for place, letter in enumerate(text):
            number += not letter.isspace() and (place == 0 or text[place - 1].isspace())
            starts[place] = number
        found = list[int]()
        for first, last in self.spans(text):
            word = starts[last - 1] if last > first else UNKNOWN
            found.append(word if word != begun else UNKNOWN)
            begun = word if word != UNKNOWN else begun
        return found

    def labelled(self, texts: Sequence[Text], labels: Tensor, *, width: int = 0) -> Tensor:
        """Labels of words (b, most words) as labels of tokens (b, n), n at least `width`: each at the first token of its word, -100 elsewhere."""
        words = [self.words(text) for text in texts]
        made = torch.full((len(words), max(width, *map(len, words))), UNKNOWN)
        for row, found in enumerate(words):
            for place, word in enumerate(found):
                if word != UNKNOWN:
                    made[row, place] = labels[row, word]
        return made

    def _encoded(self, texts: Sequence[Text], where: Sequence[str]) -> list[Any]:
        if isinstance(texts, str):
            raise DataError("one string", wanted="a list of texts", do="Put it into a list.")

        def refuse(row: int, found: str, wanted: str, do: str) -> DataError:
            return DataError(f"{where[row] if where else f'row {row}'}: {found}", wanted=wanted, do=do)

        for row, text in enumerate(texts):
            if fault := _fault(text):
                raise refuse(row, fault, "a text with words in it", "Correct or remove it.")
            if isinstance(text, tuple) and not self.pairs:
                raise refuse(row, "a pair of texts", "one text: pairs were not asked for", "Join them, or take a model and data of pairs.")
        if not len(texts):
            raise DataError("no text", wanted="at least one", do="Give more.")
        found = self._encoder.encode_batch(list(texts))
        for row, one in enumerate(found):
            if not one.ids or self.padding in one.ids:
                raise refuse(row, "the padding token in the text" if one.ids else "no token", "words of the vocabulary", "Correct or remove it.")
        return found


@dataclass(frozen=True, slots=True, eq=False)
class TextSet:
    """Texts (or pairs of them) and their labels: in memory, or where they are too many, in a file (`written`)."""

    texts: Sequence[Text]
    labels: Tensor | None  # int64 (n,), or one for each word (n, most words); several, or numbers, (n, outputs) float
    classes: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...] = ()  # file and row, why
    where: Sequence[str] = ()  # file and row of each text
    lay: Lay = HELD

    def __post_init__(self) -> None:
        if self.labels is not None and len(self.labels) != len(self.texts):
            raise DataError(f"{len(self.labels)} labels for {len(self.texts)} texts", wanted="one label for each text", do="Correct the data.")

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def pairs(self) -> bool:
        """Whether any of them is a pair."""
        return any(isinstance(text, tuple) for text in self.texts)

    def rows(self, index: Tensor | Sequence[int]) -> TextSet:
        """The same set with these rows only, in this order."""
        rows = torch.as_tensor(index, dtype=torch.int64)
        labels = None if self.labels is None else self.lay.picked(self.labels, rows)
        return TextSet(picked(self.texts, rows), labels, self.classes, self.skipped, picked(self.where, rows), self.lay)

    def split(self, holdout: float, *, seed: int = 0) -> tuple[TextSet, TextSet]:
        """(rest, held out): `holdout` of the texts, spread evenly over the classes, chosen by `seed`. Raises DataError where one side would be empty."""
        rest, held = parted(self.labels, len(self), holdout, seed=seed, what="texts")
        return self.rows(rest), self.rows(held)

    def check(self, outputs: int) -> None:
        """Raises DataError, naming the first row whose label a network with so many outputs cannot give."""
        if self.labels is None:
            return
        if self.labels.is_floating_point():
            if self.labels.shape[1] != outputs:
                raise DataError(
                    f"{self.labels.shape[1]} labels or numbers for a text", wanted=f"{outputs}, the network's outputs", do="Name the model's classes."
                )
            return
        labels = self.labels.unsqueeze(-1) if self.labels.ndim == 1 else self.labels
        bad = (((labels < 0) & (labels != UNKNOWN)) | (labels >= outputs)).nonzero().tolist()
        if bad:
            row, column = bad[0]
            place = self.where[row] if self.where else f"row {row}"
            found = f"label {int(labels[row, column])} at {place} ({len(bad)} such labels)"
            raise DataError(found, wanted=f"0 to {outputs - 1}, as the network has {outputs} outputs", do="Give labels as the model numbers them.")

    def batches(self, batch: int, tokenise: Tokenise, *, seed: int | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """(inputs, labels) of `batch` texts and a shorter rest; in order, or shuffled by `seed`. Raises DataError for a text that has no tokens."""
        return self._batches(batch, tokenise, 0, seed)

    def _batches(self, batch: int, tokenise: Tokenise, width: int, seed: int | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
        for rows in batched(len(self), batch, seed):
            some = self.rows(rows)
            inputs, labels = tokenise(some.texts, where=some.where, width=width), some.labels
            yield inputs, tokenise.labelled(some.texts, labels, width=width) if labels is not None and some.of_words else labels

    @property
    def of_words(self) -> bool:
        """Whether each word has a label."""
        return self.labels is not None and self.labels.ndim == 2 and not self.labels.is_floating_point()

    def gathered(
        self, tokenise: Tokenise, *, bound: int = HELD_BYTES, folder: File | None = None, tell: Callable[[str], None] = lambda text: None
    ) -> tuple[Tensor, Tensor | None]:
        """(inputs, labels) of all texts, as long as the longest of them: `laid`. Each is tokenised twice, as only then it is known how long that is."""
        width = int(self.sizes(tokenise).max())

        def every(parts: Iterator[Tensor]) -> Tensor:
            return laid(parts, len(self), bound=bound, folder=folder, tell=tell)

        inputs = every(part for part, _ in self._batches(COUNTED, tokenise, width))
        return inputs, every(part for _, part in self._batches(COUNTED, tokenise, width) if part is not None) if self.of_words else self.labels

    def sizes(self, tokenise: Tokenise) -> Tensor:
        """How many tokens each text has, (n,). Raises DataError for a text that has none."""
        parts = (self.rows(rows) for rows in batched(len(self), COUNTED, None))
        return torch.cat([tokenise.sizes(some.texts, where=some.where) for some in parts])


def read_texts(
    source: str | File | Sequence[Text],
    *,
    labels: Sequence[int | str] | None = None,
    split: Split = "all",
    text: str = "text",
    pair: str | None = None,
    label: str = "label",
    classes: Sequence[str] | None = None,
    limit: int | None = None,
    on_skip: OnSkip | None = None,
    task: Task = "classification",
    bound: int = HELD_BYTES,
    folder: File | None = None,
) -> TextSet:
    """Read a list of texts with `labels`, a file, or a folder with train and test (or dev, val, validation) files, or with pieces of one (`shards.pieces`).

    Columns (of .parquet, or of .csv and .tsv, which need a header line) or keys (of .jsonl): `text`, `pair` for a second text, `label`; without it, no labels.
    Labels are whole numbers from 0, or names: then their place in `classes` (such as the model's), or else in the alphabet, over all files of a folder. By
    `task`, a cell holds one; several, as a list or a|b; numbers; or one for each word of a text, which is a list of words or has spaces between them.
    Where the data brings no split of its own, every fifth text of each class is `test`. `limit` keeps that many, spread evenly over the classes.
    Rows that cannot be used are in `skipped`, by file and line (rows of .parquet and lists count from 0), and told to `on_skip`.
    Of files, row after row is read; more than `bound` bytes of texts, of places or of labels are written into a file in `folder`, or that for temporary files.
    Raises DataError: nothing there, a column that is missing, more than half of the rows bad, labels of two kinds; PlanError for .parquet without pyarrow.
    """
    if split not in ("train", "test", "all") or (limit is not None and limit < 1):
        raise DataError(f"split {split!r}, limit {limit}", wanted="train, test or all; at least 1", do="Correct them.")
    lay, own = Lay(bound, folder), False
    with Sieve[Text](TEXT, lay, task) as sieve:
        if isinstance(source, str | File):
            if labels is not None:
                raise DataError("labels beside a file", wanted="labels for a list of texts", do=f"Put them into the column {label!r}.")
            chosen, every, own = pieces(File(source), split, {text, pair or text, label})
            for file in every:
                for row in _rows(file, text, pair, label, task):
                    sieve.take(*row, chosen=file in chosen)
        else:
            given = list(source)
            if labels is not None and len(labels) != len(given):
                raise DataError(f"{len(labels)} labels for {len(given)} texts", wanted="one label for each text", do="Correct the data.")
            for i, one in enumerate(given):
                sieve.take(*_row(f"row {i}", one, None if labels is None else labels[i], task, labels is not None))
        found = sieve.sieved(source if isinstance(source, str | File) else "the list", "rows", classes, on_skip)
    made = TextSet(found.values, found.labels, found.classes, found.skipped, found.where, lay)
    return cut(made, "all" if own else split, limit, "text")


Row = tuple[str, Any, Any, str]  # where, text, label, fault


def _row(where: str, text: Any, label: Any, task: Task, labelled: bool) -> Row:
    """`labelled`: whether a row without a label lacks something."""
    if isinstance(text, list) and all(isinstance(word, str) for word in text):
        if split := next((word for word in text if not word or any(letter.isspace() for letter in word)), None):
            return where, "", None, f"a word {split!r} with a space in it"
        text = " ".join(text)
    value, fault = parsed(label, task, len(text.split()) if isinstance(text, str) else 0) if labelled else (None, "")
    return where, text, value, _fault(text) or fault


def _fault(text: Any) -> str:
    parts = text if isinstance(text, tuple) else (text,)
    if not all(isinstance(part, str) for part in parts) or len(parts) not in (1, 2):
        return f"{type(text).__name__} where a text or a pair of texts was wanted"
    return "" if all(part.strip() for part in parts) else "an empty text"


def _rows(file: File, text: str, pair: str | None, label: str, task: Task) -> Iterator[Row]:
    columns = [text] if pair is None else [text, pair]
    if ending(file) == ".parquet":
        yield from _checked(file, "row", parquet.entries(file, columns, label), columns, label, task)
        return
    try:
        yield from _checked(file, "line", _entries(file, columns), columns, label, task)
    except TORN as error:
        raise unread(file, error) from error


def _checked(file: File, unit: str, entries: Iterable[tuple[int, Any]], columns: Sequence[str], label: str, task: Task) -> Iterator[Row]:
    for number, entry in entries:
        where = f"{file}, {unit} {number}"
        if not isinstance(entry, dict) or any(entry.get(name) is None for name in columns):
            yield where, "", None, f"no {' and '.join(columns)}" if isinstance(entry, dict) else "not a JSON object"
            continue
        body = entry[columns[0]] if len(columns) == 1 else tuple(entry[name] for name in columns)
        yield _row(where, body, entry.get(label), task, label in entry)


def _entries(file: File, columns: Sequence[str]) -> Iterator[tuple[int, Any]]:
    with opened(file) as lines:
        if ending(file) == ".jsonl":
            for line, row in enumerate(lines, 1):
                if row.strip():
                    try:
                        yield line, json.loads(row)
                    except ValueError:
                        yield line, None
            return
        reader = csv.DictReader(lines, delimiter="\t" if ending(file) == ".tsv" else ",")
        here = reader.fieldnames or ()
        if missing := [name for name in columns if name not in here]:
            raise DataError(f"{file} with columns {', '.join(here)}", wanted=f"a column {missing[0]!r}", do="Name the columns, or add a header.")
        for row in reader:
            yield reader.line_num, row
