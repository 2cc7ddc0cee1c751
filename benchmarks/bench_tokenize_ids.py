"""Token ids of documents: made by either library, read back from what each pipeline left on disk, and compared.

Nothing here is timed but `Encode`: readers and comparisons run between the measurements.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

BATCH_CHARACTERS = 1 << 20  # of documents encoded in one call

# texts -> ids of all of them one after the other, and how many each text has
Encode = Callable[[list[str]], tuple[np.ndarray, np.ndarray]]


def load_fastokens(tokenizer: str) -> Encode:
    import fastokens

    encoder = fastokens.Tokenizer.from_file(tokenizer)

    def encode(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, starts = encoder.encode_batch_flat(texts, False, True)  # nothing added; specials in a text are text
        return np.frombuffer(ids, np.uint32), np.diff(np.frombuffer(starts, np.uint64).astype(np.int64))

    return encode


def load_tokenizers(tokenizer: str) -> Encode:
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(tokenizer)
    encoder.encode_special_tokens = True

    def encode(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        rows = [encoding.ids for encoding in encoder.encode_batch_fast(texts, add_special_tokens=False)]
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        return np.concatenate([np.array(row, dtype=np.uint32) for row in rows]), lengths

    return encode


LIBRARIES: dict[str, Callable[[str], Encode]] = {"fastokens": load_fastokens, "tokenizers": load_tokenizers}


def in_batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Lists of at least `BATCH_CHARACTERS` characters, of whole documents."""
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


@dataclass(frozen=True)
class Ids:
    """The ids of documents, one after the other (uint32), and how many each document has."""

    values: np.ndarray
    lengths: np.ndarray

    @classmethod
    def join(cls, parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> "Ids":
        values = np.concatenate([np.zeros(0, np.uint32), *(values.astype(np.uint32) for values, _ in parts)])
        lengths = np.concatenate([np.zeros(0, np.int64), *(lengths.astype(np.int64) for _, lengths in parts)])
        assert lengths.sum() == len(values), f"{lengths.sum()} ids expected, {len(values)} found"
        return cls(values, lengths)

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(np.split(self.values, np.cumsum(self.lengths)[:-1]))

    @cached_property
    def sha256(self) -> str:
        """Of the ids as little-endian uint32, in the order of the documents."""
        return hashlib.sha256(self.values.astype("<u4").tobytes()).hexdigest()

    @cached_property
    def documents(self) -> Counter[bytes]:
        """The documents in no order."""
        return Counter(hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in self)


class Comparison(NamedTuple):
    same: bool
    text: str


def compare(found: Ids, reference: Ids) -> Comparison:
    """Whether the same documents have the same ids; another order of the documents counts as the same."""
    if found.sha256 == reference.sha256 and np.array_equal(found.lengths, reference.lengths):
        return Comparison(True, "same")
    if found.documents == reference.documents:
        return Comparison(True, "same, other order")
    missing = (reference.documents - found.documents).total()
    return Comparison(False, f"DIFFERENT: {missing} of {len(reference.lengths)} documents, {len(found.lengths)} found")


def encode_all(encode: Encode, texts: Iterable[str]) -> Ids:
    return Ids.join([encode(batch) for batch in in_batches(texts)])


def write_binary(folder: Path, ids: Ids) -> None:
    """`tokens.bin` and `tokens.idx`, the documents' lengths."""
    ids.values.tofile(folder / "tokens.bin")
    ids.lengths.tofile(folder / "tokens.idx")


def read_binary(folder: Path) -> Ids:
    lengths = np.fromfile(folder / "tokens.idx", dtype=np.int64)
    size = (folder / "tokens.bin").stat().st_size // max(1, lengths.sum())
    return Ids.join([(np.fromfile(folder / "tokens.bin", dtype=f"<u{size}"), lengths)])


def read_datasets(folder: Path) -> Ids:
    """The Arrow streams that `save_to_disk` writes, in the order of the rows."""
    import pyarrow as pa

    parts = []
    for path in sorted((folder / "dataset").glob("data-*.arrow")):
        for batch in pa.ipc.open_stream(pa.memory_map(str(path))):
            column = batch.column("input_ids")
            lengths = column.value_lengths().to_numpy(zero_copy_only=False)
            parts.append((column.flatten().to_numpy(), lengths))
    return Ids.join(parts)


def read_datatrove(folder: Path) -> Ids:
    """Tokens and the documents' ends, task by task."""
    parts = []
    for path in sorted((folder / "tokens").glob("*.ds")):
        ends = np.fromfile(f"{path}.index", dtype="<u8").astype(np.int64)
        if not len(ends):
            continue  # a task without a file
        size = path.stat().st_size // max(1, int(ends[-1]))
        parts.append((np.fromfile(path, dtype=f"<u{size}"), np.diff(ends, prepend=0)))
    return Ids.join(parts)


def read_cpipe(run: Path) -> Ids:
    """The shards that the manifest lists, their digests checked: the training split, then the held-out one."""
    from schemas.tokenize_text import SPLITS, TokenizeManifest
    from stages.data.token_store import TokenStore

    manifest = TokenizeManifest.read(run)
    parts = []
    for split in SPLITS:
        store = TokenStore.open([ref.check(run) for ref in manifest.shards(split)])
        rows = [store.tokens(number) for number in range(len(store))]
        parts.append((np.concatenate([np.zeros(0, np.uint32), *rows]), np.asarray(store.lengths)))
    return Ids.join(parts)
