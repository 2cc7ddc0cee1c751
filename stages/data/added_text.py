"""Text that comes to a run later, made into token shards as `cpipe tokenize` made the run's: read, filtered, split so.

- interrupted, it goes on after the last finished segment, as tokenizing does
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from schemas.failures import InputFailure
from schemas.files import FileRef
from schemas.tokenize_text import SPLITS, Counts, Segment
from schemas.train_experts import AddedMetrics
from stages.data.corpus import Corpus
from stages.data.merging import merge
from stages.data.segments import PARTS, Job, encode_part, forget_encoder
from stages.data.tokenizer import load_tokenizer
from stages.data.workers import run_jobs


def encode_added(
    corpus: Corpus, folder: Path, run_dir: Path, tokenizer: Path, end_of_text: int, source: str
) -> tuple[list[FileRef], AddedMetrics]:
    """Write the token shards of both splits into `folder`, every document with `source`; `end_of_text` is an id.

    Raises InputFailure for text that cannot be read, and when there is none to train on.
    """
    end = load_tokenizer(tokenizer.read_bytes(), str(tokenizer)).id_to_token(end_of_text)
    jobs = [Job(corpus, part, folder, run_dir, tokenizer, end, source) for part in corpus.parts]
    found: dict[int, list[Segment]] = {}
    for some in run_jobs(encode_part, jobs, corpus.config.workers or 1):
        found[some[0].part] = some
    forget_encoder()
    segments = [segment for part in corpus.parts for segment in found[part.number]]
    merged = merge(corpus, segments, folder, run_dir)
    splits = {split: Counts.total([of[split] for of in merged.sources.values() if split in of]) for split in SPLITS}
    if not splits["train"].documents:
        raise InputFailure(
            f"no text to add as {source}: {len(corpus.files)} file(s) hold no document to train on, "
            f"{splits['valid'].documents} to hold out: give more documents"
        )
    metrics = AddedMetrics(
        train=splits["train"],
        valid=splits["valid"],
        left_out=merged.left_out,
        lossy=sum(segment.lossy for segment in segments),
        encoder=", ".join(sorted({segment.encoder for segment in segments})),
    )
    shards = [ref for split in SPLITS for ref in merged.shards[split]]
    return [*shards, *([merged.skipped] if merged.skipped else [])], metrics


def drop_work(folder: Path, outputs: Sequence[FileRef]) -> None:
    """Remove what the work needed and is not among the outputs; a crash before it leaves that behind."""
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    named = {Path(ref.path).name for ref in outputs}
    for path in folder.glob("*.arrow"):
        if path.name not in named:
            path.unlink()
