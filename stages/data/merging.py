"""The finished parts of a corpus joined: what can only be decided over all of it.

- in the order of the corpus: documents beyond the limit of their source, of the name or, if asked for, with the text
  of an earlier one are taken out; their shards are written anew without them, all others stay as they are
- memory: about 100 bytes a document while this is decided
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from schemas.failures import InputFailure
from schemas.files import CHUNK, FileRef, NewFile, new_file
from schemas.tokenize_text import SPLITS, Counts, LeftOut, Segment, Split
from stages.data.corpus import Corpus, repetition
from stages.data.reading.readers import Rejected
from stages.data.segments import list_skipped
from stages.data.token_store import keep_rows

SKIPPED = "skipped.jsonl"


@dataclass(frozen=True)
class Merged:
    """What remains: shards in the order of the documents, and counts."""

    shards: dict[Split, list[FileRef]]
    skipped: FileRef | None
    sources: dict[str, dict[Split, Counts]]
    left_out: LeftOut


def merge(corpus: Corpus, segments: Sequence[Segment], folder: Path, run_dir: Path) -> Merged:
    """Join the segments of all parts, in their order. Raises InputFailure for a name that stands twice."""
    table = _judged(_read(segments, run_dir), corpus)
    repeated = table.filter(pl.col("verdict") == "faulty")
    if len(repeated) and corpus.config.on_error == "stop":
        raise InputFailure(next(_repetitions(table, corpus)).message)
    gone = table.filter(pl.col("verdict").is_not_null())["verdict"].value_counts()
    return Merged(
        shards=_shards(table, segments, folder, run_dir),
        skipped=_skipped(table, segments, corpus, folder, run_dir),
        sources=_counts(table.filter(pl.col("verdict").is_null())),
        left_out=_left_out(corpus, segments, dict(gone.iter_rows())),
    )


def _read(segments: Sequence[Segment], run_dir: Path) -> pl.DataFrame:
    """A row per document, in the order of the corpus."""
    return pl.concat([pl.read_ipc(segment.table.locate(run_dir)) for segment in segments])


def _judged(table: pl.DataFrame, corpus: Corpus) -> pl.DataFrame:
    """The table with a `verdict`: null for documents that stay, else the field of LeftOut that counts them."""
    limit = corpus.config.limit_bytes_per_source
    beyond = pl.lit(False) if limit is None else pl.col("bytes").cum_sum().over("source") > limit
    table = table.with_columns(verdict=pl.when(beyond).then(pl.lit("over_limit")))
    table = _verdict_on_repeated(table, "id", "faulty")
    return _verdict_on_repeated(table, "text", "duplicates") if corpus.config.deduplicate else table


def _verdict_on_repeated(table: pl.DataFrame, column: str, verdict: str) -> pl.DataFrame:
    """The verdict on documents that stay so far and whose hash of `column` is that of an earlier one that stays."""
    hashes = [f"{column}_high", f"{column}_low"]
    stays = pl.col("verdict").is_null()
    first = table.with_row_index("row").filter(stays).unique(hashes, keep="first")["row"]
    repeated = stays & ~pl.int_range(pl.len(), dtype=pl.UInt32).is_in(first.implode())
    return table.with_columns(verdict=pl.when(repeated).then(pl.lit(verdict)).otherwise("verdict"))


def _repetitions(table: pl.DataFrame, corpus: Corpus) -> Iterator[Rejected]:
    """The documents whose name stands twice, in order, each with the place of the first of its name."""
    repeated = table.filter(pl.col("verdict") == "faulty")
    hashes = ["id_high", "id_low"]
    firsts = table.filter(pl.col("verdict").ne_missing("faulty"), pl.col("verdict").ne_missing("over_limit"))
    joined = repeated.join(firsts.unique(hashes, keep="first"), on=hashes, how="left", suffix="_first")
    for file, line, first_file, first_line in joined.select("file", "line", "file_first", "line_first").iter_rows():
        found, first = corpus.files[file], corpus.files[first_file]
        yield Rejected(found.label, line, repetition(found, line, first, first_line))


def _shards(
    table: pl.DataFrame, segments: Sequence[Segment], folder: Path, run_dir: Path
) -> dict[Split, list[FileRef]]:
    shards: dict[Split, list[FileRef]] = {split: [] for split in SPLITS}
    stays = table["verdict"].is_null().to_numpy()
    splits = table["split"].to_numpy()
    start = 0
    for segment in segments:
        rows = slice(start, start + (segment.table.rows or 0))
        start = rows.stop
        for ref in segment.shards:
            split = next(split for split in SPLITS if Path(ref.path).name.startswith(split))
            kept = stays[rows][splits[rows] == SPLITS.index(split)]
            remaining = ref if kept.all() else _without(ref, kept, folder, run_dir)
            shards[split] += [remaining] if remaining else []
    return shards


def _without(ref: FileRef, kept: np.ndarray, folder: Path, run_dir: Path) -> FileRef | None:
    """A copy of a shard with the documents kept; the shard itself stays until the stage is finished."""
    path = run_dir / ref.path
    return keep_rows(ref.check(run_dir), kept, folder / f"{path.stem}_kept{path.suffix}", run_dir)


def _skipped(
    table: pl.DataFrame, segments: Sequence[Segment], corpus: Corpus, folder: Path, run_dir: Path
) -> FileRef | None:
    """The lists of the parts, and names that stand twice, as one file; None when nothing was skipped."""
    lists = [segment.skipped for segment in segments if segment.skipped and segment.skipped.size]
    repetitions = list(_repetitions(table, corpus)) if (table["verdict"] == "faulty").any() else []
    if not corpus.unreadable and not lists and not repetitions:
        return None
    with new_file(folder / SKIPPED) as file:
        for rejected in corpus.unreadable:
            list_skipped(file, rejected)
        for ref in lists:
            _append(file, ref.locate(run_dir))
        for rejected in repetitions:
            list_skipped(file, rejected)
    return file.ref(folder / SKIPPED, run_dir)


def _append(target: NewFile, path: Path) -> None:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            target.write(chunk)


def _counts(kept: pl.DataFrame) -> dict[str, dict[Split, Counts]]:
    sums = kept.group_by("source", "split").agg(pl.len(), pl.col("tokens").sum(), pl.col("bytes").sum())
    counts: dict[str, dict[Split, Counts]] = defaultdict(dict)
    for source, split, documents, tokens, size in sums.sort("source", "split").iter_rows():
        counts[source][SPLITS[split]] = Counts(documents=documents, tokens=tokens, bytes=size)
    return counts


def _left_out(corpus: Corpus, segments: Sequence[Segment], gone: dict[str, int]) -> LeftOut:
    totals = dict.fromkeys(LeftOut.model_fields, 0) | gone
    totals["faulty"] += len(corpus.unreadable)
    for segment in segments:
        for name, count in segment.left_out:
            totals[name] += count
    return LeftOut(**totals)
