"""A corpus cut into parts: pieces of work that any process on any machine can do, in any order, with the same result.

- plain JSON lines are cut at lines and parquet at row groups; any other file is one piece; small files share a part
- the cuts follow from the files alone, never from the number of workers
- one pass over each file finds its sha256 and the lines at its cuts; what is found is kept in a cache, which holds as
  long as size and times of the file do, so the tasks of an array do not all hash the whole corpus
"""

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from schemas.failures import InputFailure, IntegrityFailure
from schemas.files import write_bytes
from schemas.tokenize_text import Survey, SurveyedFile
from stages.data.reading.readers import Span
from stages.data.reading.sources import TextFile

CHUNK = 1 << 20
SMALLEST, LARGEST = 32 << 20, 256 << 20  # bytes of a part where nothing is asked for
MOST_PARTS = 1024  # of a corpus that needs no larger parts for it
EXPANSION = 4  # times its size, a compressed file of text
SETTLED = 2.0  # seconds after which a file's time stamp tells it from a later change


class Piece(NamedTuple):
    """A span of the file of that number in the corpus."""

    file: int
    span: Span


class Part(NamedTuple):
    """Pieces that are read one after another and make shards of their own."""

    number: int
    pieces: tuple[Piece, ...]


def part_bytes(files: Sequence[TextFile], asked: int | None) -> int:
    """The size of a part: as asked for, or fit for the corpus."""
    total = sum(_weight(file, _stat(file.path).st_size) for file in files)
    return asked or min(LARGEST, max(SMALLEST, total // MOST_PARTS))


def _weight(file: TextFile, size: int) -> int:
    return size * EXPANSION if file.codec or file.kind == "parquet" else size


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise InputFailure(f"{path} cannot be read: {error.strerror}") from error


def survey(paths: Sequence[Path], cut_bytes: int, cache: Path) -> list[SurveyedFile]:
    """Digest, size, times and cuts of each file, from the cache where nothing has changed since.

    Raises InputFailure for a file that cannot be read, or changes meanwhile.
    """
    known = {file.path: file for file in _read_cache(cache)}

    def look(path: Path) -> SurveyedFile:
        before = known.get(os.path.abspath(path))
        holds = before is not None and before.cut_bytes == cut_bytes and is_as_surveyed(before)
        return before if before and holds else _survey(path, cut_bytes)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        found = list(threads.map(look, paths))
    newest = max((file.changed[0] for file in found), default=0)
    if any(known.get(file.path) != file for file in found) and newest < time.time_ns() - SETTLED * 1e9:
        write_bytes(cache, Survey(files=tuple(found)).model_dump_json().encode(), cache.parent)
    return found


def _read_cache(cache: Path) -> Sequence[SurveyedFile]:
    try:
        return Survey.from_json(cache.read_bytes()).files
    except (OSError, ValidationError, IntegrityFailure):
        return ()  # a cache


def is_as_surveyed(file: SurveyedFile) -> bool:
    """Whether the file has the size and times it had."""
    status = _stat(Path(file.path))
    return (status.st_size, (status.st_mtime_ns, status.st_ctime_ns)) == (file.size, file.changed)


def check_unchanged(file: SurveyedFile) -> None:
    """Raise InputFailure when the file was changed since it was surveyed."""
    if not is_as_surveyed(file):
        raise InputFailure(f"{file.path} was changed while it was read: run again when it is at rest")


def _survey(path: Path, cut_bytes: int) -> SurveyedFile:
    before = _stat(path)
    digest = sha256()
    cuts: list[tuple[int, int]] = []
    start = lines = 0
    wanted = cut_bytes
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                counted = 0
                while (end := chunk.find(b"\n", max(wanted - start - 1, 0)) + 1) and wanted <= start + len(chunk):
                    lines += chunk.count(b"\n", counted, end)
                    counted = end
                    cuts.append((start + end, lines + 1))
                    wanted = (start + end) // cut_bytes * cut_bytes + cut_bytes
                lines += chunk.count(b"\n", counted)
                start += len(chunk)
    except OSError as error:
        raise InputFailure(f"{path} cannot be read: {error.strerror}") from error
    found = SurveyedFile(
        path=os.path.abspath(path),
        size=before.st_size,
        changed=(before.st_mtime_ns, before.st_ctime_ns),
        digest=f"sha256:{digest.hexdigest()}",
        cut_bytes=cut_bytes,
        cuts=tuple(cut for cut in cuts if cut[0] < start),
    )
    check_unchanged(found)
    return found


def parts_of(files: Sequence[TextFile], surveyed: Sequence[SurveyedFile], size: int) -> list[Part]:
    """Parts of about `size` bytes of text each, in the order of the files."""
    parts: list[Part] = []
    pieces: list[Piece] = []
    weight = 0
    for number, (file, found) in enumerate(zip(files, surveyed, strict=True)):
        for span, more in _spans(file, found, size):
            if pieces and weight + more > 1.5 * size:
                parts.append(Part(len(parts), tuple(pieces)))
                pieces, weight = [], 0
            pieces.append(Piece(number, span))
            weight += more
    if pieces:
        parts.append(Part(len(parts), tuple(pieces)))
    return parts


def _spans(file: TextFile, found: SurveyedFile, size: int) -> Iterator[tuple[Span, int]]:
    """The spans of a file, each with its bytes of text, more or less."""
    if file.kind == "jsonl" and not file.codec and found.cuts:
        borders = [(0, 1), *found.cuts, (found.size, 0)]
        for (start, line), (stop, _) in pairwise(borders):
            yield Span(start, stop, line), stop - start
    elif file.kind == "parquet":
        yield from _row_groups(file, size)
    else:
        yield Span(), _weight(file, found.size)


def _row_groups(file: TextFile, size: int) -> Iterator[tuple[Span, int]]:
    try:
        metadata = pq.read_metadata(file.path)
    except (OSError, pa.ArrowException):
        yield Span(), 0  # the reader says what is wrong
        return
    start = rows = first = weight = 0
    for group in range(metadata.num_row_groups):
        rows += metadata.row_group(group).num_rows
        weight += metadata.row_group(group).total_byte_size
        if weight >= size or group + 1 == metadata.num_row_groups:
            yield Span(start, group + 1, first + 1), weight
            start, first, weight = group + 1, rows, 0
    if not metadata.num_row_groups:
        yield Span(), 0
