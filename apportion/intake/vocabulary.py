"""A vocabulary of word pieces, learned from a user's own texts: what a model of texts begins with where there is none to read.

Pieces: Schuster and Nakajima 2012, "Japanese and Korean Voice Search", section 3, as used by Devlin et al. 2019, "BERT", arXiv 1810.04805, section 3. The
search for pieces is that of the package tokenizers: the pair that occurs most often is joined, until there are `size` of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from apportion.errors import DataError, PlanError
from apportion.intake.texts import Text, Tokenise

PADDING, UNKNOWN, FIRST, LAST = SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
BEHIND = "##"  # stands before a piece that goes on with a word
LETTERS = 1000  # at most, the most frequent ones: others become unknown words
SEEN = 2  # times that two pieces must stand together before they are joined


def learned(texts: Sequence[Text], *, length: int, size: int = 8000) -> Tokenise:
    """Texts, or pairs of them, to a Tokenise of at most `size` pieces: lower case, no accents, [CLS] text [SEP], and a second text behind with [SEP].

    The same texts, in whatever order, give the same bytes. Cost: 1 s for some 100,000 words on one core. Raises DataError where there is no letter, PlanError
    for a size that does not hold the letters, a length that holds no word, and without the package tokenizers. Not for languages that write without spaces.
    """
    try:
        from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    except ImportError as error:
        raise PlanError(f"no tokenizers here ({error})", wanted="the package", do="Install the extra: pip install 'apportion[text]'.") from error
    normaliser, divide = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    words = Counter(word for text in _single(texts) for word, _ in divide.pre_tokenize_str(normaliser.normalize_str(text)))
    first, behind = _letters(words)
    if not first:
        raise DataError(f"{len(texts)} texts without a letter", wanted="words to learn from", do="Correct the data.")
    least = len(SPECIAL) + len(first) + len(behind)
    if size < least or length <= len(SPECIAL):
        wanted = f"at least {least}, for every letter on its own, and more than {len(SPECIAL)} tokens"
        raise PlanError(f"a vocabulary of {size} and texts of {length} tokens", wanted=wanted, do="Raise them.")
    tokenizer: Any = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # The trainer numbers letters behind others in the order of a hash, and breaks ties by number: given beforehand, they have theirs.
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        min_frequency=SEEN,
        show_progress=False,
        special_tokens=[*SPECIAL, *behind],
        initial_alphabet=first,
        limit_alphabet=len(first),
        continuing_subword_prefix=BEHIND,
    )
    tokenizer.train_from_iterator((word for word in sorted(words) for _ in range(words[word])), trainer)
    made: Any = Tokenizer(models.WordPiece(tokenizer.get_vocab(), unk_token=UNKNOWN, continuing_subword_prefix=BEHIND))
    made.add_special_tokens(list(SPECIAL))
    made.normalizer, made.pre_tokenizer, made.decoder = normaliser, divide, decoders.WordPiece(prefix=BEHIND)
    made.post_processor = processors.TemplateProcessing(
        single=f"{FIRST}:0 $A:0 {LAST}:0",
        pair=f"{FIRST}:0 $A:0 {LAST}:0 $B:1 {LAST}:1",
        special_tokens=[(name, SPECIAL.index(name)) for name in (FIRST, LAST)],
    )
    pairs = any(isinstance(text, tuple) for text in texts)
    return Tokenise(made.to_str(), length=length, padding=SPECIAL.index(PADDING), pairs=pairs)


def entries(tokenise: Tokenise) -> int:
    """How many pieces a vocabulary has, those that stand for no letters included."""
    from tokenizers import Tokenizer

    return Tokenizer.from_str(tokenise.tokenizer).get_vocab_size()


def _single(texts: Iterable[Text]) -> Iterator[str]:
    for text in texts:
        yield from (text,) if isinstance(text, str) else text


def _letters(words: Counter[str]) -> tuple[list[str], list[str]]:
    """The most frequent letters, and with their mark those of them that occur behind others."""
    count, behind = Counter[str](), set[str]()
    for word, times in words.items():
        for letter in word:
            count[letter] += times
        behind.update(word[1:])
    kept = sorted(sorted(count, key=lambda letter: (-count[letter], letter))[:LETTERS])
    return kept, [BEHIND + letter for letter in kept if letter in behind]
