"""Turn raw text into token shards: `tokens/` of a run.

- the corpus is cut into parts; each makes shards of its own, so processes and machines (`--shard i/n`) can share the
  work, and an interrupted start goes on where it stopped; the bytes are the same in every case
- two passes over the text where a tokenizer is trained: one takes a sample, one encodes
- memory, for each worker: the sample drawn (train_bytes; the trainer takes about 10 times that, once), a batch of text
  and its tokens (about 100 MiB), and the longest document, whatever the size of the corpus; merging takes about 100
  bytes a document
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from loguru import logger

from schemas.failures import InputFailure, StaleFailure, UsageFailure
from schemas.files import FileRef, digest_of, write_bytes
from schemas.manifest import FILE_NAME, InputRef
from schemas.tokenize_text import (
    SPLITS,
    Counts,
    Segment,
    ShareManifest,
    ShareMetrics,
    TokenizeConfig,
    TokenizeManifest,
    TokenizeMetrics,
)
from stages.artifacts.locks import turn_by_turn
from stages.artifacts.stage_folder import claim_folder, share_folder
from stages.data.concept_tokens import CONCEPT, rename_unused
from stages.data.corpus import STDIN, Corpus, find_corpus
from stages.data.encoder import Encoder
from stages.data.merging import Merged, merge
from stages.data.parts import Part
from stages.data.segments import Job, encode_part, encoder_of, finished_segments, forget_encoder
from stages.data.text_sample import SampleJob, join_samples, sample_part
from stages.data.tokenizer import FILE_NAME as TOKENIZER
from stages.data.tokenizer import end_of_text_named, tokenizer_files, train_tokenizer
from stages.data.workers import cores, run_jobs

ENOUGH_BYTES = 256 << 20  # of text, for more than this process: below, starting others takes longer than they save


def run(config: TokenizeConfig, run_dir: Path, *, force: bool = False) -> TokenizeManifest | ShareManifest:
    """Read `config.inputs`, train or take a tokenizer, write both splits as token shards; or do a share of that.

    Raises InputFailure for text that cannot be read and for splits that would be empty.
    """
    corpus = find_corpus(config, run_dir)
    inputs = [*corpus.inputs(), *_tokenizer_inputs(config)]
    if config.shard:
        return _run_share(config.shard, corpus, inputs, run_dir, force)
    with claim_folder(run_dir, TokenizeManifest, config, inputs, force=force) as claim:
        manifest = claim.finished
        if manifest is None:
            encoder = _prepare(corpus, claim.path, run_dir)
            segments = _encode(corpus, corpus.parts, claim.path, run_dir)
            merged = merge(corpus, segments, claim.path, run_dir)
            metrics = _metrics(corpus, merged, segments, encoder)
            manifest = claim.finish(_outputs(merged, claim.path, run_dir), metrics)
        _tidy(manifest, run_dir)
        return _as_strict(manifest, config, claim.path)


def _tokenizer_inputs(config: TokenizeConfig) -> list[InputRef]:
    if config.tokenizer is None:
        return []
    files = tokenizer_files(Path(config.tokenizer))
    names = [TOKENIZER, *(path.name for path in files[1:])]
    return [InputRef(name=name, digest=digest_of(path)) for name, path in zip(names, files, strict=True)]


def _run_share(
    share: str, corpus: Corpus, inputs: Sequence[InputRef], run_dir: Path, force: bool
) -> TokenizeManifest | ShareManifest:
    """Encode every n-th part, beside others who do the rest."""
    if force:
        raise UsageFailure(
            f"--force with --shard would throw away what others have done: remove {run_dir / TokenizeManifest.folder} "
            "before the first of them starts, or use another run"
        )
    number, count = map(int, share.split("/"))
    folder = f"{ShareManifest.folder}/{number:03d}-of-{count:03d}"
    with share_folder(run_dir, TokenizeManifest, corpus.config, inputs) as whole:
        if whole.finished:
            return _as_strict(whole.finished, corpus.config, whole.path)
        with claim_folder(run_dir, ShareManifest, corpus.config, inputs, folder=folder) as claim:
            if claim.finished:
                return claim.finished
            _prepare(corpus, whole.path, run_dir)
            segments = _encode(corpus, corpus.parts[number - 1 :: count], whole.path, run_dir)
            metrics = ShareMetrics(
                parts=len({segment.part for segment in segments}),
                documents=sum(segment.table.rows or 0 for segment in segments),
                tokens=sum(ref.tokens or 0 for segment in segments for ref in segment.shards),
            )
            return claim.finish([ref for segment in segments for ref in segment.shards], metrics)


def _prepare(corpus: Corpus, folder: Path, run_dir: Path) -> Encoder:
    """The encoder, its tokenizer written to the folder by the first who needs it."""
    path = folder / TOKENIZER
    with turn_by_turn(run_dir, "tokenizer"):
        if not path.exists():
            write_bytes(path, _tokenizer_json(corpus), run_dir)
    return encoder_of(path, _end_of_text(corpus.config), corpus.config)


def _end_of_text(config: TokenizeConfig) -> str | None:
    if config.end_of_text or config.tokenizer is None:
        return config.end_of_text
    return end_of_text_named(tokenizer_files(Path(config.tokenizer)))


def _tokenizer_json(corpus: Corpus) -> bytes:
    """The tokenizer given, byte for byte but for concept tokens, or one trained on a sample of the training split."""
    config = corpus.config
    if config.tokenizer is not None:
        content = tokenizer_files(Path(config.tokenizer))[0].read_bytes()
        if not config.concept_tokens:
            return content
        return rename_unused(content, config.concept_tokens, config.unused_tokens, config.unused_pattern)[0]
    jobs = [SampleJob(corpus, part) for part in corpus.parts]
    sample = join_samples(run_jobs(sample_part, jobs, _workers(corpus, len(jobs))), config.train_bytes)
    if not sample:
        why = "; --on-error stop says what is wrong with them" if config.on_error == "skip" else ""
        found = f"{len(corpus.files)} file(s) hold no document for the train split{why}"
        raise InputFailure(f"no text to train a tokenizer on: {found}")
    logger.info("training a tokenizer of {} ids on {:.1f} MB", config.vocab_size, sum(map(len, sample)) / 1e6)
    tokenizer = train_tokenizer(sample, config.vocab_size, config.concept_tokens)
    if tokenizer.get_vocab_size() < config.vocab_size:
        logger.warning("the text gives {} token ids, not {}", tokenizer.get_vocab_size(), config.vocab_size)
    return tokenizer.to_str().encode()


def _workers(corpus: Corpus, jobs: int) -> int:
    """Processes to use; one where there is too little text for more to be worth their start."""
    enough = corpus.shard_bytes * jobs >= ENOUGH_BYTES
    return corpus.config.workers or (cores() if enough else 1)


def _encode(corpus: Corpus, parts: Sequence[Part], folder: Path, run_dir: Path) -> list[Segment]:
    """The segments of `parts`, in order; parts finished before are left as they are."""
    found = {part.number: finished_segments(folder, run_dir, part.number) for part in parts}
    missing = [part for part in parts if not found[part.number] or not found[part.number][-1].last]
    if missing and corpus.config.merge:
        numbers = ", ".join(str(part.number + 1) for part in missing[:12])
        raise UsageFailure(
            f"{len(missing)} of {len(parts)} parts are not done (number {numbers}): wait for the shares that do them, "
            "or run without --merge to do them here"
        )
    if len(missing) < len(parts):
        logger.info("{} of {} parts are done already", len(parts) - len(missing), len(parts))
    jobs = [Job(corpus, part, folder, run_dir, folder / TOKENIZER, _end_of_text(corpus.config)) for part in missing]
    for done, segments in enumerate(run_jobs(encode_part, jobs, _workers(corpus, len(jobs))), 1):
        found[segments[0].part] = segments
        logger.bind(task="tokenize", done=done, total=len(jobs), text="parts").debug("part {} done", segments[0].part)
    forget_encoder()
    return [segment for part in parts for segment in found[part.number]]


def _outputs(merged: Merged, folder: Path, run_dir: Path) -> list[FileRef]:
    path = folder / TOKENIZER
    name = path.relative_to(run_dir).as_posix()
    tokenizer = FileRef(path=name, size=path.stat().st_size, digest=digest_of(path))
    shards = [ref for split in SPLITS for ref in merged.shards[split]]
    return [tokenizer, *shards, *([merged.skipped] if merged.skipped else [])]


def _metrics(corpus: Corpus, merged: Merged, segments: Sequence[Segment], encoder: Encoder) -> TokenizeMetrics:
    splits = {split: Counts.total([of[split] for of in merged.sources.values() if split in of]) for split in SPLITS}
    whole = Counts.total(list(splits.values()))
    for split in SPLITS:
        if not splits[split].documents:
            raise _empty_split(corpus, merged, whole.documents, split)
    return TokenizeMetrics(
        vocab_size=encoder.vocab_size,
        end_of_text=encoder.end_of_text,
        concept_tokens=encoder.ids([CONCEPT.format(number) for number in range(corpus.config.concept_tokens)]),
        train=splits["train"],
        valid=splits["valid"],
        sources={source: Counts.total(list(of.values())) for source, of in merged.sources.items()},
        left_out=merged.left_out,
        lossy=sum(segment.lossy for segment in segments),
        bytes_per_token=round(whole.bytes / whole.tokens, 4),
        encoder=", ".join(sorted({segment.encoder for segment in segments})),
    )


def _empty_split(corpus: Corpus, merged: Merged, documents: int, split: str) -> InputFailure:
    if not documents:
        reasons = [f"{count} {name.replace('_', ' ')}" for name, count in merged.left_out if count]
        found = f"{len(corpus.files)} file(s) hold no document that counts ({', '.join(reasons) or 'none at all'})"
        return InputFailure(f"no text to tokenize: {found}")
    more = "larger" if split == "valid" else "smaller"
    return InputFailure(
        f"the {split} split is empty: {documents} document(s) were read, and --valid-fraction "
        f"{corpus.config.valid_fraction} left none for it; give a {more} --valid-fraction or more documents"
    )


def _tidy(manifest: TokenizeManifest, run_dir: Path) -> None:
    """Remove what the work needed and the manifest does not name; a crash after it was written leaves that behind."""
    folder = run_dir / manifest.folder
    named = {FILE_NAME, *(ref.path.rsplit("/", 1)[-1] for ref in manifest.outputs)}
    for path in folder.iterdir():
        if path.name not in named:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(run_dir / STDIN, ignore_errors=True)


def _as_strict(manifest: TokenizeManifest, config: TokenizeConfig, folder: Path) -> TokenizeManifest:
    """The manifest, unless faults were skipped in it that this start does not want skipped."""
    faulty = manifest.metrics.left_out.faulty
    if config.on_error == "stop" and faulty:
        raise StaleFailure(
            f"{folder} is finished, but {faulty} faulty record(s) were skipped, listed in {folder / 'skipped.jsonl'}: "
            "take it with --on-error skip, or mend the text and give --force to do it again"
        )
    return manifest
