"""The documents of a part that count: read, judged by the filters, and assigned to a split.

- a document goes to its split by a hash of its group: it stays there however the corpus grows
- what is left out is counted by reason; a record that cannot be read stops the work, or is handed to the list of
  skipped ones
"""

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from hashlib import blake2b

import numpy as np

from schemas.failures import InputFailure
from schemas.tokenize_text import Split, TokenizeConfig
from stages.data.parts import Part
from stages.data.reading.readers import Columns, Document, Rejected, read_documents
from stages.data.reading.sources import TextFile


def split_of(group: str, valid_fraction: float) -> Split:
    """The split of a group: its hash as a number in [0, 1), held out when below `valid_fraction`."""
    return "valid" if hash_of(group) / 2**64 < valid_fraction else "train"


def hash_of(name: str) -> int:
    """The first 64 bits of blake2b."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big")


class Selection:
    """The documents of `part` that count, in order. `text_columns` names the column of the text of each file.

    Iterating raises InputFailure at the first record that cannot be read, unless `skip` takes it.
    """

    def __init__(
        self,
        config: TokenizeConfig,
        files: Sequence[TextFile],
        text_columns: Sequence[str | None],
        part: Part,
        skip: Callable[[Rejected], None] | None = None,
    ) -> None:
        self._config = config
        self._files = files
        self._text_columns = text_columns
        self._part = part
        self._skip = skip
        self.left_out: Counter[str] = Counter()
        self.begins: list[int] = []  # number of the first document of each piece
        self._count = 0

    def __iter__(self) -> Iterator[Document]:
        config = self._config
        taken: Counter[str] = Counter()
        limit = config.limit_bytes_per_source
        for document in self._read():
            if reason := _unwanted(document.text, config):
                self.left_out[reason] += 1
                continue
            if limit is not None:
                # The document that passes the limit is kept here: merging needs it to see that the limit is reached.
                if taken[document.source] > limit:
                    self.left_out["over_limit"] += 1
                    continue
                taken[document.source] += document.size
            self._count += 1
            yield document

    def _read(self) -> Iterator[Document]:
        config = self._config
        for piece in self._part.pieces:
            self.begins.append(self._count)
            columns = Columns(
                self._text_columns[piece.file], config.id_column, config.source_column, config.group_column
            )
            for record in read_documents(self._files[piece.file], columns, config.txt_documents, piece.span):
                if isinstance(record, Document):
                    yield record
                elif self._skip is None:
                    raise InputFailure(f"{record.message} (--on-error skip goes on without it)")
                else:
                    self.left_out["faulty"] += 1
                    self._skip(record)


def _unwanted(text: str, config: TokenizeConfig) -> str | None:
    """Why a document is left out, as a field of LeftOut; None when it is kept."""
    if not text or text.isspace():
        return "empty"
    if config.min_characters is not None and len(text) < config.min_characters:
        return "too_short"
    if config.max_characters is not None and len(text) > config.max_characters:
        return "too_long"
    if config.max_symbol_share is not None and symbol_share(text) > config.max_symbol_share:
        return "symbols"
    return None


def symbol_share(text: str) -> float:
    """Share of the characters that are punctuation, symbols or control characters other than white space."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    return float(_symbols()[codes].mean()) if len(codes) else 0.0


@cache
def _symbols() -> np.ndarray:
    """Which code points are neither letters, marks, numbers nor white space: Unicode's categories P, S and C."""
    characters = map(chr, range(0x110000))
    return np.array([unicodedata.category(c)[0] in "PSC" and not c.isspace() for c in characters])
