"""A bounded sample of a corpus, for training a tokenizer.

- drawn from the training split by hash, in pieces, so no long document fills it and the order of files does not matter
- the pieces with the smallest hashes win, in each part and then over all: the same sample, whoever reads which part
"""

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from stages.data.corpus import Corpus
from stages.data.encoder import pieces
from stages.data.parts import Part
from stages.data.selection import Selection, hash_of, split_of

PIECE_CHARACTERS = 1 << 14

Drawn = tuple[int, str]  # hash and text of a piece


@dataclass(frozen=True)
class SampleJob:
    """A part to draw from."""

    corpus: Corpus
    part: Part


def sample_part(job: SampleJob) -> list[Drawn]:
    """The pieces of a part that may come into the sample."""
    return smallest(_pieces(job), job.corpus.config.train_bytes)


def _pieces(job: SampleJob) -> Iterable[Drawn]:
    corpus, config = job.corpus, job.corpus.config
    taken: Counter[str] = Counter()
    skip = (lambda rejected: None) if config.on_error == "skip" else None
    for document in Selection(config, corpus.files, corpus.text_columns, job.part, skip):
        taken[document.source] += document.size
        if config.limit_bytes_per_source is not None and taken[document.source] > config.limit_bytes_per_source:
            continue
        if split_of(document.group, config.valid_fraction) == "train":
            for number, piece in enumerate(pieces(document.text, PIECE_CHARACTERS)):
                yield hash_of(f"{document.id}:{number}"), piece


def smallest(drawn: Iterable[Drawn], size: int) -> list[Drawn]:
    """The pieces with the smallest hashes, in their order: `size` bytes together at most, one piece at least."""
    heap: list[Drawn] = []
    held = 0
    for number, piece in drawn:
        heapq.heappush(heap, (-number, piece))
        held += len(piece.encode())
        while held > size and len(heap) > 1:
            held -= len(heapq.heappop(heap)[1].encode())
    return [(-number, piece) for number, piece in sorted(heap, reverse=True)]


def join_samples(samples: Iterable[Sequence[Drawn]], size: int) -> list[str]:
    """The texts of the sample of a whole corpus, from those of its parts."""
    joined: list[Drawn] = []
    for sample in samples:
        joined = smallest([*joined, *sample], size)
    return [piece for _, piece in joined]
