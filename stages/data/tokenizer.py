"""Byte-level BPE: trained, loaded, and run over documents.

- tokens give the text back exactly: byte-level, no normalizer, nothing added; another's tokenizer is checked for it on
  every document
- text that spells a special token is encoded as ordinary text, so the separator never occurs inside a document
- `tokenizers` takes 100 to 200 bytes of memory per character of one call, so long texts are encoded in pieces: with
  GPT-2's pattern a cut between a non-space and the space after it never moves a token border; others are encoded whole
"""

import json
import re
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from schemas.failures import InputFailure
from stages.data.readers import Document

BATCH_CHARACTERS = 1 << 20  # encoded in one call
PIECE_CHARACTERS = 1 << 16
SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")  # what end of text is called; ours first
SPACE_AFTER_TEXT = re.compile(r"(?<=\S)[ \n]")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with GPT-2's pattern; fewer ids than `vocab_size` when the texts offer no more pairs to merge."""
    tokenizer = _untrained()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATORS[0]],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _untrained() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a `tokenizer.json`. Raises InputFailure when it is none."""
    if not path.is_file():
        raise InputFailure(f"no such file: {path}; --tokenizer takes a tokenizer.json")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises the bare class
        raise InputFailure(f"{path} is not a tokenizer.json: {' '.join(str(error).split())}") from error


def separator_of(tokenizer: Tokenizer) -> int:
    """Id of the token between documents. Raises InputFailure when the tokenizer has none."""
    for name in SEPARATORS:
        if (token := tokenizer.token_to_id(name)) is not None:
            return token
    raise InputFailure(f"the tokenizer has no token that ends a text; expected one of {', '.join(SEPARATORS)}")


class Encoder:
    """Turns documents into token ids. `exact` says that the tokenizer is known to give every text back."""

    def __init__(self, tokenizer: Tokenizer, *, exact: bool) -> None:
        self.tokenizer = tokenizer
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True
        self.end_of_text = separator_of(tokenizer)
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.name = f"tokenizers {version('tokenizers')}"
        self._exact = exact
        self._cuts = _cuts_safely(tokenizer)

    def encode(self, documents: Iterable[Document]) -> Iterator[tuple[Document, np.ndarray]]:
        """Each document with its ids (uint32), in order; the separator is not added.

        Raises InputFailure when a tokenizer that was given does not give a text back.
        """
        batch: list[Document] = []
        characters = 0
        for document in documents:
            batch.append(document)
            characters += len(document.text)
            if characters >= BATCH_CHARACTERS:
                yield from self._encode_batch(batch)
                batch, characters = [], 0
        yield from self._encode_batch(batch)

    def _encode_batch(self, batch: list[Document]) -> Iterator[tuple[Document, np.ndarray]]:
        parts: list[list[np.ndarray]] = [[] for _ in batch]
        for numbers, texts in _calls(batch, self._cuts):
            encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            for number, encoding in zip(numbers, encodings, strict=True):
                parts[number].append(np.array(encoding.ids, dtype=np.uint32))
        tokens = [np.concatenate(arrays) for arrays in parts]
        if not self._exact:
            self._check(batch, tokens)
        yield from zip(batch, tokens, strict=True)

    def _check(self, batch: list[Document], tokens: list[np.ndarray]) -> None:
        texts = self.tokenizer.decode_batch([row.tolist() for row in tokens], skip_special_tokens=False)
        for document, row, text in zip(batch, tokens, texts, strict=True):
            if text != document.text:
                raise InputFailure(
                    f"the tokenizer does not give document {document.id!r} back as it was; a byte-level one is expected"
                )
            if (row == self.end_of_text).any():
                raise InputFailure(f"the tokenizer puts its separator inside document {document.id!r}")


def _calls(batch: list[Document], cut: bool) -> Iterator[tuple[list[int], list[str]]]:
    """The batch in calls of bounded size: numbers of documents, and their texts or pieces of them."""
    numbers: list[int] = []
    texts: list[str] = []
    characters = 0
    for number, document in enumerate(batch):
        for piece in pieces(document.text, PIECE_CHARACTERS) if cut else [document.text]:
            numbers.append(number)
            texts.append(piece)
            characters += len(piece)
            if characters >= BATCH_CHARACTERS:
                yield numbers, texts
                numbers, texts, characters = [], [], 0
    if texts:
        yield numbers, texts


def pieces(text: str, characters: int) -> Iterator[str]:
    """Cut `text` before a space or line end that follows something else, every `characters` or a little later."""
    start = 0
    while found := SPACE_AFTER_TEXT.search(text, start + characters):
        yield text[start : found.start()]
        start = found.start()
    yield text[start:]


def _cuts_safely(tokenizer: Tokenizer) -> bool:
    """Whether no token reaches over a cut of `pieces`: GPT-2's pattern, no normalizer, no added words with spaces."""
    ours = json.loads(_untrained().to_str())
    given = json.loads(tokenizer.to_str())
    added = [token for token in given["added_tokens"] if not token["special"]]
    return not added and all(given[part] == ours[part] for part in ("normalizer", "pre_tokenizer"))
