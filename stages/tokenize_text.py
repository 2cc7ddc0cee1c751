"""Turn raw text into token shards: `tokens/` of a run.

- two passes over the text: one takes a sample to train the tokenizer on, one encodes
- the sample is drawn from the training split by hash, in pieces, so no long document fills it and the order of the
  files does not matter
- the split is a hash of the document's group: a document stays in its split however the corpus grows
- memory is bounded: the sample and the trainer (about 10 × train_bytes), one shard under construction per split (at
  most 64 MiB), one batch of 2^20 characters in the encoder, and the longest document, whatever the size of the corpus
- interrupted, the stage starts over; it is deterministic, so it ends with the same bytes
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

from loguru import logger

from schemas.failures import InputFailure, UsageFailure
from schemas.files import FileRef, digest_of, write_bytes
from schemas.manifest import InputRef
from schemas.tokenize_text import SPLITS, Counts, Split, TokenizeConfig, TokenizeManifest, TokenizeMetrics
from stages.artifacts.stage_folder import claim_folder, drop_leftovers
from stages.data.readers import Columns, Document, TextFile, find_files, read_documents
from stages.data.token_store import SHARD_TOKENS, ShardWriter
from stages.data.tokenizer import Encoder, load_tokenizer, pieces, train_tokenizer

TOKENIZER = "tokenizer.json"
SAMPLE_CHARACTERS = 1 << 14  # length of the pieces the tokenizer is trained on
LOG_BYTES = 64 << 20  # a line of the log for so much text


def run(config: TokenizeConfig, run_dir: Path, *, force: bool = False) -> TokenizeManifest:
    """Read `config.inputs`, train or take a tokenizer, write both splits as token shards.

    Raises InputFailure for text that cannot be read and for splits that would be empty.
    """
    files = _files(config)
    inputs = [InputRef(name=file.label, digest=_digest(file)) for file in files]
    with claim_folder(run_dir, TokenizeManifest, config, inputs, force=force) as claim:
        if claim.finished:
            return claim.finished
        drop_leftovers(claim.path)
        corpus = _Corpus(config, _text_files(files))
        encoder, tokenizer_json = _encoder(config, corpus)
        tokenizer = write_bytes(claim.path / TOKENIZER, tokenizer_json, run_dir)
        shards, counts = _encode(config, corpus, encoder, claim.path, run_dir)
        return claim.finish(outputs=[tokenizer, *shards], metrics=_metrics(counts, corpus, encoder))


def _files(config: TokenizeConfig) -> list[TextFile]:
    """Everything the stage reads; a tokenizer given comes under one fixed name, which no text file can have."""
    if not config.inputs:
        raise UsageFailure("no text given: name files, folders or globs after the run")
    files = find_files(config.inputs)
    logger.info("reading {} file(s) of text", len(files))
    if config.tokenizer is not None:
        files.append(TextFile(Path(config.tokenizer), TOKENIZER))
    return files


def _digest(file: TextFile) -> str:
    try:
        return digest_of(file.path)
    except OSError as error:
        raise InputFailure(f"{file.path} cannot be read: {error.strerror}") from error


def _text_files(files: Sequence[TextFile]) -> list[TextFile]:
    return [file for file in files if file.label != TOKENIZER]


@dataclass
class _Corpus:
    """The documents that count, in a fixed order, as often as wanted; what the last pass left out, and why."""

    config: TokenizeConfig
    files: Sequence[TextFile]
    read: int = field(default=0, init=False)
    skipped_empty: int = field(default=0, init=False)
    skipped_by_limit: int = field(default=0, init=False)

    def __iter__(self) -> Iterator[tuple[Document, Split]]:
        config = self.config
        columns = Columns(config.text_column, config.id_column, config.source_column, config.group_column)
        self.read = self.skipped_empty = self.skipped_by_limit = 0
        taken: Counter[str] = Counter()
        for document in read_documents(self.files, columns):
            if not document.text or document.text.isspace():
                self.skipped_empty += 1
                continue
            taken[document.source] += document.size
            if config.limit_bytes_per_source is not None and taken[document.source] > config.limit_bytes_per_source:
                self.skipped_by_limit += 1
                continue
            self.read += 1
            yield document, split_of(document.group, config.valid_fraction)


def split_of(group: str, valid_fraction: float) -> Split:
    """The split of a group: its hash as a number in [0, 1), held out when below `valid_fraction`."""
    return "valid" if _hash(group) / 2**64 < valid_fraction else "train"


def _hash(name: str) -> int:
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big")


def _encoder(config: TokenizeConfig, corpus: _Corpus) -> tuple[Encoder, bytes]:
    """The encoder, and its tokenizer as a file: the given one byte for byte, or one trained on a sample."""
    if config.tokenizer is not None:
        path = Path(config.tokenizer)
        return Encoder(load_tokenizer(path), exact=False), path.read_bytes()
    sample = _sample(corpus, config.train_bytes)
    logger.info("training a tokenizer of {} ids on {:.1f} MB", config.vocab_size, sum(map(len, sample)) / 1e6)
    tokenizer = train_tokenizer(sample, config.vocab_size)
    if tokenizer.get_vocab_size() < config.vocab_size:
        logger.warning("the text gives {} token ids, not {}", tokenizer.get_vocab_size(), config.vocab_size)
    return Encoder(tokenizer, exact=True), tokenizer.to_str().encode()


def _sample(corpus: _Corpus, size: int) -> list[str]:
    """Pieces of the training split with the smallest hashes, `size` bytes together at most (one piece at least)."""
    heap: list[tuple[int, str]] = []
    held = 0
    for document, split in corpus:
        if split == "valid":
            continue
        for number, piece in enumerate(pieces(document.text, SAMPLE_CHARACTERS)):
            heapq.heappush(heap, (-_hash(f"{document.id}:{number}"), piece))
            held += len(piece.encode())
            while held > size and len(heap) > 1:
                held -= len(heapq.heappop(heap)[1].encode())
    if not heap:
        raise _empty_split(corpus, "train")
    return [piece for _, piece in sorted(heap, reverse=True)]


def _encode(
    config: TokenizeConfig, corpus: _Corpus, encoder: Encoder, folder: Path, run_dir: Path
) -> tuple[list[FileRef], dict[tuple[str, Split], Counter[str]]]:
    """Write the shards of both splits; counts per source and split."""
    writers = {split: ShardWriter(folder, split, run_dir, encoder.vocab_size, SHARD_TOKENS) for split in SPLITS}
    counts: dict[tuple[str, Split], Counter[str]] = defaultdict(Counter)
    done = 0
    for document, tokens in encoder.encode(document for document, _ in corpus):
        split = split_of(document.group, config.valid_fraction)
        writers[split].add(document.id, document.source, document.size, tokens)
        counts[document.source, split].update(documents=1, tokens=len(tokens), bytes=document.size)
        if (done + document.size) // LOG_BYTES > done // LOG_BYTES:
            logger.info("{:.0f} MB encoded", (done + document.size) / 1e6)
        done += document.size
    shards = {split: writer.finish() for split, writer in writers.items()}
    for split in SPLITS:
        if not shards[split]:
            raise _empty_split(corpus, split)
    return shards["train"] + shards["valid"], counts


def _empty_split(corpus: _Corpus, split: Split) -> InputFailure:
    if not corpus.read:
        skipped = f"{corpus.skipped_empty} empty, {corpus.skipped_by_limit} over the limit"
        return InputFailure(
            f"no text to tokenize: {len(corpus.files)} file(s) hold no document that counts ({skipped})"
        )
    more = "larger" if split == "valid" else "smaller"
    return InputFailure(
        f"the {split} split is empty: {corpus.read} document(s) were read, and --valid-fraction "
        f"{corpus.config.valid_fraction} left none for it; give a {more} --valid-fraction or more documents"
    )


def _metrics(counts: dict[tuple[str, Split], Counter[str]], corpus: _Corpus, encoder: Encoder) -> TokenizeMetrics:
    splits = {split: _total(count for (_, of), count in counts.items() if of == split) for split in SPLITS}
    everything = _total(counts.values())
    return TokenizeMetrics(
        vocab_size=encoder.vocab_size,
        end_of_text=encoder.end_of_text,
        train=splits["train"],
        valid=splits["valid"],
        sources={
            name: _total(counts[name, split] for split in SPLITS) for name in sorted({name for name, _ in counts})
        },
        skipped_empty=corpus.skipped_empty,
        skipped_by_limit=corpus.skipped_by_limit,
        bytes_per_token=round(everything.bytes / everything.tokens, 4),
        encoder=encoder.name,
    )


def _total(counts: Iterable[Counter[str]]) -> Counts:
    total: Counter[str] = sum(counts, Counter())
    return Counts(documents=total["documents"], tokens=total["tokens"], bytes=total["bytes"])
