"""From text to token ids, by the fastest library at hand that gives the ids of `tokenizers`.

- `fastokens` encodes BPE many times faster; before it is trusted with a tokenizer it must agree with `tokenizers` on
  strings that trip encoders (`PROBES`); where it cannot load the tokenizer, or disagrees, `tokenizers` encodes
- text that spells a special token is encoded as ordinary text, so the separator never occurs inside a document
- `tokenizers` takes 100 to 200 bytes of memory per character of one call, so there long texts are encoded in pieces:
  with GPT-2's pattern a cut between a non-space and the space after it never moves a token border
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from loguru import logger

from schemas.failures import InputFailure, UsageFailure
from schemas.tokenize_text import Library
from stages.data.reading.readers import Document
from stages.data.tokenizer import is_unchanged, keeps_text, load_tokenizer, separator_of, uses_pattern_of_gpt2

BATCH_CHARACTERS = 1 << 20  # encoded in one call
PIECE_CHARACTERS = 1 << 16
SPACE_AFTER_TEXT = re.compile(r"(?<=\S)[ \n]")
PROBES = (
    "It's we'll I'VE they'd 'tis  don''t",
    " \n\n\t  a\r\n b \u00a0\u2003\u3000c\u2028d\x0b\x1c ",
    "12345 1,000.50 ٣٤٥ ⅷ ½ ²",
    "def f(x):\n    return x**2  # ok\n\n\n\tif True: pass",
    "Größe naïve e\u0301 ﬁ Ångström ǅ ẞ",
    "日本語テキスト 한국어 العربية עברית हिन्दी ไทย",
    "😀👩‍👩‍👧‍👦🏳️‍🌈 \ufe0f\u200d\u200b\ufeff",
    "<|endoftext|><s></s>[CLS] <concept_0><|im_start|>",
    "\u0000\u0001\u007f\u0080\ue000\ufffd\U0001f9ff\U0010ffff\U000e0001",
    "!!!???...---___===///\\\\\\(((",
    "a" * 300 + " " * 300 + "é" * 99,
    "",
)
Batch = list[Document]
Encode = Callable[[list[str]], tuple[np.ndarray, np.ndarray]]


class Encoded(NamedTuple):
    """A document with its ids (uint32); `lossy` when the tokenizer does not give the text back."""

    document: Document
    tokens: np.ndarray
    lossy: bool


class Encoder:
    """Runs one tokenizer over documents. `name` is the library that does, with its version."""

    def __init__(
        self, tokenizer_json: bytes, end_of_text: str | None, library: Library, *, allow_lossy: bool = False
    ) -> None:
        """Raises InputFailure for a tokenizer without separator, UsageFailure when `library` cannot run it."""
        self.tokenizer = load_tokenizer(tokenizer_json, "the tokenizer")
        self._content = json.loads(self.tokenizer.to_str())
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True
        self.end_of_text = separator_of(self.tokenizer, end_of_text)
        self._vocabulary = self.tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._vocabulary.values()) + 1
        self._allow_lossy = allow_lossy
        self._keeps_text = keeps_text(self._content)
        self._cuts = uses_pattern_of_gpt2(self._content)
        self._encode, self.name = self._choose(tokenizer_json, library)

    def _choose(self, tokenizer_json: bytes, library: Library) -> tuple[Encode, str]:
        doubt = "not asked for"
        if library != "tokenizers":
            encode, doubt = _fast(tokenizer_json.decode())
            if encode is not None and (doubt := self._disagreement(encode)) == "":
                return encode, f"fastokens {version('fastokens')}"
            if library == "fastokens":
                raise UsageFailure(f"fastokens cannot encode here ({doubt}): leave --encoder to choose by itself")
            logger.info("encoding with tokenizers: fastokens {}", doubt)
        return self._slow, f"tokenizers {version('tokenizers')}"

    def _disagreement(self, encode: Encode) -> str:
        """Where `encode` differs from `tokenizers` on the probes, in words; empty when nowhere."""
        ids, offsets = encode(list(PROBES))
        for number, probe in enumerate(PROBES):
            expected = self.tokenizer.encode(probe, add_special_tokens=False).ids
            if ids[offsets[number] : offsets[number + 1]].tolist() != expected:
                return f"gives other ids for {probe[:20]!r}"
        return ""

    def ids(self, tokens: Sequence[str]) -> tuple[int, ...]:
        """The ids of tokens by name. Raises KeyError for one it has not."""
        return tuple(self._vocabulary[token] for token in tokens)

    def encode(self, documents: Iterable[Document]) -> Iterator[Encoded]:
        """Each document with its ids, in order; the separator is not added. Reading goes on while a batch is encoded.

        Raises InputFailure when the tokenizer loses text and that is not allowed.
        """
        waiting: Future[list[Encoded]] | None = None
        with ThreadPoolExecutor(1) as thread:
            for batch in _batches(documents):
                future = thread.submit(self._encode_batch, batch)
                if waiting:
                    yield from waiting.result()
                waiting = future
            if waiting:
                yield from waiting.result()

    def _encode_batch(self, batch: Batch) -> list[Encoded]:
        ids, offsets = self._encode([document.text for document in batch])
        if (ids == self.end_of_text).any():
            place = int(np.searchsorted(offsets, np.argmax(ids == self.end_of_text), side="right")) - 1
            raise InputFailure(f"the tokenizer puts its separator inside document {batch[place].id!r}")
        bounds = offsets.tolist()
        rows = [ids[start:stop] for start, stop in pairwise(bounds)]
        lossy = self._lossy(batch, rows)
        if not self._allow_lossy and any(lossy):
            raise InputFailure(
                f"the tokenizer does not give document {batch[lossy.index(True)].id!r} back as it was: take "
                "a byte-level one, or --allow-lossy, and bits per byte will be of changed text"
            )
        return list(map(Encoded, batch, rows, lossy))

    def _lossy(self, batch: Batch, rows: list[np.ndarray]) -> list[bool]:
        if self._keeps_text:
            return [not is_unchanged(document.text, self._content) for document in batch]
        texts = self.tokenizer.decode_batch([row.tolist() for row in rows], skip_special_tokens=False)
        return [document.text != text for document, text in zip(batch, texts, strict=True)]

    def _slow(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        lengths = np.zeros(len(texts) + 1, dtype=np.int64)
        found = [np.zeros(0, dtype=np.uint32)]
        for numbers, some in _calls(texts, self._cuts):
            for number, encoding in zip(
                numbers, self.tokenizer.encode_batch_fast(some, add_special_tokens=False), strict=True
            ):
                found.append(np.array(encoding.ids, dtype=np.uint32))
                lengths[number + 1] += len(found[-1])
        return np.concatenate(found), np.cumsum(lengths)


def _fast(tokenizer_json: str) -> tuple[Encode | None, str]:
    """The encoder of `fastokens`, or why there is none."""
    try:
        from fastokens import Tokenizer
    except ImportError:
        return None, "is not installed"
    try:
        tokenizer = Tokenizer.from_json_str(tokenizer_json)
    except Exception as error:  # fastokens raises what its parser raises; the tokenizer itself was found to be good
        return None, f"does not take this tokenizer ({' '.join(str(error).split())})"
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def encode(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, offsets = tokenizer.encode_batch_flat(texts, False, True)  # no special tokens added, none matched
        return np.frombuffer(ids, dtype="<u4"), np.frombuffer(offsets, dtype="<u8").astype(np.int64)

    return encode, ""


def limit_threads(threads: int) -> None:
    """Let both libraries use so many threads; works before either has started one."""
    for name in ("FASTOKENS_BPE_THREADS", "RAYON_NUM_THREADS"):
        os.environ[name] = str(threads)


def _batches(documents: Iterable[Document]) -> Iterator[Batch]:
    batch: Batch = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _calls(texts: list[str], cut: bool) -> Iterator[tuple[list[int], list[str]]]:
    """The texts in calls of bounded size: their numbers, and they or pieces of them."""
    numbers: list[int] = []
    some: list[str] = []
    characters = 0
    for number, text in enumerate(texts):
        for piece in pieces(text, PIECE_CHARACTERS) if cut else [text]:
            numbers.append(number)
            some.append(piece)
            characters += len(piece)
            if characters >= BATCH_CHARACTERS:
                yield numbers, some
                numbers, some, characters = [], [], 0
    if some:
        yield numbers, some


def pieces(text: str, characters: int) -> Iterator[str]:
    """Cut `text` before a space or line end that follows something else, every `characters` or a little later."""
    start = 0
    while found := SPACE_AFTER_TEXT.search(text, start + characters):
        yield text[start : found.start()]
        start = found.start()
    yield text[start:]
