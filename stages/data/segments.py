"""A part of the corpus made into token shards: what one worker does.

- a part is finished segment by segment: a shard of each split, a table with a row per document, and last the record
  that says so; interrupted, the work goes on after the last record
- a segment ends with the document that brings it to `shard_bytes` of text, so it is the same in every attempt
- memory: a batch of text (2^20 characters, or the longest document) while the next is read, and a batch of each shard
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache, partial
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from schemas.files import FileRef, NewFile, new_file, write_bytes
from schemas.tokenize_text import SPLITS, LeftOut, Segment, TokenizeConfig
from stages.data.corpus import Corpus
from stages.data.encoder import Encoded, Encoder
from stages.data.parts import Part, check_unchanged
from stages.data.reading.readers import Rejected
from stages.data.selection import Selection, split_of
from stages.data.token_store import ShardWriter, write_table

PARTS = "parts"  # folder of the records and tables, until they are merged


@dataclass(frozen=True)
class Job:
    """One part to encode into `folder` of the run, with the tokenizer that lies there."""

    corpus: Corpus
    part: Part
    folder: Path
    run_dir: Path
    tokenizer: Path
    end_of_text: str | None
    source: str | None = None  # of all documents, whatever they say

    @property
    def skips(self) -> Path:
        """The list of skipped records of this part."""
        return self.folder / PARTS / f"{self.part.number:05d}.skipped.jsonl"


def encode_part(job: Job) -> list[Segment]:
    """Encode what is not finished of a part; all its segments. Raises InputFailure at a record that cannot be read."""
    segments = finished_segments(job.folder, job.run_dir, job.part.number)
    if segments and segments[-1].last:
        return segments
    config = job.corpus.config
    encoder = encoder_of(job.tokenizer, job.end_of_text, config)
    with ExitStack() as stack:
        skips = stack.enter_context(new_file(job.skips)) if config.on_error == "skip" else None
        skip = partial(list_skipped, skips) if skips else None
        text = Selection(config, job.corpus.files, job.corpus.text_columns, job.part, skip)
        documents = iter(text)
        done = segments[-1].documents if segments else 0
        for _ in islice(documents, done):
            pass
        encoded = encoder.encode(documents)
        while not segments or not segments[-1].last:
            unrecorded = _write_segment(job, len(segments), done, text, encoded, encoder)
            if not unrecorded.last:
                segments.append(_record(job, unrecorded))
                done = segments[-1].documents
                continue
            for number in {piece.file for piece in job.part.pieces}:
                check_unchanged(job.corpus.surveyed[number])
            stack.close()
            skipped = skips.ref(job.skips, job.run_dir) if skips else None
            left_out = LeftOut(**text.left_out)
            segments.append(_record(job, unrecorded.model_copy(update={"left_out": left_out, "skipped": skipped})))
    return segments


def finished_segments(folder: Path, run_dir: Path, part: int) -> list[Segment]:
    """The segments of a part whose records exist. Raises IntegrityFailure when a file of theirs is gone."""
    segments: list[Segment] = []
    while (path := folder / PARTS / _name(part, len(segments), ".json")).is_file():
        segments.append(Segment.from_json(path.read_bytes()))
        for ref in (*segments[-1].shards, segments[-1].table):
            ref.locate(run_dir)
    return segments


def _name(part: int, segment: int, suffix: str) -> str:
    return f"{part:05d}{f'_{segment:03d}' if segment else ''}{suffix}"


def _record(job: Job, segment: Segment) -> Segment:
    path = job.folder / PARTS / _name(segment.part, segment.number, ".json")
    write_bytes(path, segment.model_dump_json().encode(), job.run_dir)
    return segment


def encoder_of(path: Path, end_of_text: str | None, config: TokenizeConfig) -> Encoder:
    """The encoder of the tokenizer at `path`; a process makes it once."""
    return _encoder(path.read_bytes(), end_of_text, config)


@lru_cache(maxsize=1)
def _encoder(tokenizer_json: bytes, end_of_text: str | None, config: TokenizeConfig) -> Encoder:
    return Encoder(tokenizer_json, end_of_text, config.encoder, allow_lossy=config.allow_lossy)


def forget_encoder() -> None:
    """Let go of the encoder's memory, which its caches of words make large."""
    _encoder.cache_clear()


def list_skipped(file: NewFile, rejected: Rejected) -> None:
    """Add a record to a list of skipped ones: a JSON object a line."""
    entry = {"file": rejected.file, "line": rejected.line, "reason": rejected.message}
    file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")


def _write_segment(
    job: Job, number: int, done: int, text: Selection, encoded: Iterator[Encoded], encoder: Encoder
) -> Segment:
    """Write the next `shard_bytes` of the part's text, from its document number `done` on."""
    table = _Table(job, text, done)
    lossy = size = 0
    full = False
    with ExitStack() as stack:
        names = {split: job.folder / f"{split}-{_name(job.part.number, number, '.arrow')}" for split in SPLITS}
        writers = {
            split: stack.enter_context(ShardWriter(path, job.run_dir, encoder.vocab_size))
            for split, path in names.items()
        }
        for item in encoded:
            document = item.document
            split = split_of(document.group, job.corpus.config.valid_fraction)
            writers[split].add(document.id, job.source or document.source, document.size, item.tokens)
            table.add(item, SPLITS.index(split))
            lossy += item.lossy
            size += document.size
            if full := size >= job.corpus.shard_bytes:
                break
        shards = [ref for writer in writers.values() if (ref := writer.finish())]
    return Segment(
        part=job.part.number,
        number=number,
        last=not full,
        documents=done + len(table),
        shards=tuple(shards),
        table=table.write(job.folder / PARTS / _name(job.part.number, number, ".arrow")),
        left_out=LeftOut(),
        skipped=None,
        lossy=lossy,
        encoder=encoder.name,
    )


class _Table:
    """What merging needs of each document of a segment: its hashes, split, source, size, and where it was found."""

    def __init__(self, job: Job, text: Selection, done: int) -> None:
        self._job = job
        self._text = text
        self._done = done
        self._hash_texts = job.corpus.config.deduplicate
        self._rows: list[tuple[str, int, int, int, int]] = []
        self._ids: list[bytes] = []
        self._texts: list[bytes] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, item: Encoded, split: int) -> None:
        document = item.document
        self._rows.append((document.source, split, document.size, len(item.tokens), document.line))
        self._ids.append(_digest(document.id))
        if self._hash_texts:
            self._texts.append(_digest(document.text))

    def write(self, path: Path) -> FileRef:
        source, *numbers = zip(*self._rows, strict=True) if self._rows else [()] * 5
        columns: dict[str, Any] = {"source": source, "file": self._files()}
        columns |= {
            name: np.array(values, dtype=np.int64)
            for name, values in zip(("split", "bytes", "tokens", "line"), numbers, strict=True)
        }
        hashed = {"id": self._ids, "text": self._texts} if self._hash_texts else {"id": self._ids}
        for name, digests in hashed.items():
            halves = np.frombuffer(b"".join(digests), dtype=np.uint64).reshape(-1, 2)
            columns |= {f"{name}_high": halves[:, 0], f"{name}_low": halves[:, 1]}
        return write_table(path, columns, self._job.run_dir)

    def _files(self) -> np.ndarray:
        numbers = self._done + np.arange(len(self))
        pieces = np.searchsorted(self._text.begins, numbers, side="right") - 1
        return np.array([piece.file for piece in self._job.part.pieces], dtype=np.int64)[pieces]


def _digest(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=16).digest()
