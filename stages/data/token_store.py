"""Documents as token ids in Arrow IPC files: written in shards, read through a memory map.

- the IPC *file* format only: a *stream* cut at a message border reads as complete
- Arrow accepts most flipped bits as valid data, so a reader checks the shard's digest (`FileRef.check`) before it opens
- a shard under construction lives in memory (`SHARD_TOKENS` ids) and reaches the disk whole
- the same documents give the same bytes: no metadata, no compression, dictionary-free
- token ids are uint16 while the vocabulary fits (65,536), else uint32; the ids read are views of the map, not copies
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from schemas.failures import IntegrityFailure
from schemas.files import FileRef, new_file

SHARD_TOKENS = 16 << 20  # 32 MiB of uint16
SHARD_DOCUMENTS = 1 << 20  # so that a million tiny documents stay bounded as well
BATCH_TOKENS = 1 << 20
BATCH_DOCUMENTS = 1 << 16


def token_type(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    """The narrowest dtype that holds every id below `vocab_size`."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def _schema(dtype: type[np.uint16] | type[np.uint32]) -> pa.Schema:
    tokens = pa.list_(pa.field("item", pa.from_numpy_dtype(dtype), nullable=False))
    return pa.schema({"id": pa.string(), "source": pa.string(), "bytes": pa.int64(), "tokens": tokens})


class ShardWriter:
    """Writes documents, in the order added, to `<stem>-00000.arrow`, `<stem>-00001.arrow`, … in `folder`.

    A shard is closed by the document that fills it, so no document straddles two; `finish` writes the last.
    """

    def __init__(
        self, folder: Path, stem: str, run_dir: Path, vocab_size: int, shard_tokens: int = SHARD_TOKENS
    ) -> None:
        self._folder = folder
        self._stem = stem
        self._run_dir = run_dir
        self._dtype = token_type(vocab_size)
        self._shard_tokens = shard_tokens
        self._batch_tokens = min(BATCH_TOKENS, shard_tokens)
        self._schema = _schema(self._dtype)
        self._refs: list[FileRef] = []
        self._open_shard()

    def _open_shard(self) -> None:
        self._batches: list[pa.RecordBatch] = []
        self._documents = 0
        self._tokens = 0
        self._open_batch()

    def _open_batch(self) -> None:
        self._ids: list[str] = []
        self._sources: list[str] = []
        self._bytes: list[int] = []
        self._rows: list[np.ndarray] = []
        self._waiting = 0

    def add(self, document: str, source: str, size: int, tokens: Sequence[int] | np.ndarray) -> None:
        """Append the document named `document`: `size` UTF-8 bytes of text, as `tokens`."""
        self._ids.append(document)
        self._sources.append(source)
        self._bytes.append(size)
        self._rows.append(np.asarray(tokens, dtype=self._dtype))
        self._waiting += len(tokens)
        if self._waiting >= self._batch_tokens or len(self._ids) >= BATCH_DOCUMENTS:
            self._close_batch()
        if self._tokens >= self._shard_tokens or self._documents >= SHARD_DOCUMENTS:
            self._close_shard()

    def _close_batch(self) -> None:
        offsets = np.zeros(len(self._rows) + 1, dtype=np.int32)
        np.cumsum([len(row) for row in self._rows], out=offsets[1:])
        values = np.concatenate(self._rows)
        tokens = pa.ListArray.from_arrays(pa.array(offsets), pa.array(values), type=self._schema.field("tokens").type)
        columns = [pa.array(self._ids), pa.array(self._sources), pa.array(self._bytes, pa.int64()), tokens]
        self._batches.append(pa.record_batch(columns, schema=self._schema))
        self._documents += len(self._rows)
        self._tokens += self._waiting
        self._open_batch()

    def _close_shard(self) -> None:
        path = self._folder / f"{self._stem}-{len(self._refs):05d}.arrow"
        with new_file(path) as file:
            _write(file, self._schema, self._batches)
        self._refs.append(file.ref(path, self._run_dir, rows=self._documents, tokens=self._tokens))
        self._open_shard()

    def finish(self) -> list[FileRef]:
        """Write what is left; the descriptors of all shards, in order. No documents, no shards."""
        if self._ids:
            self._close_batch()
        if self._batches:
            self._close_shard()
        return list(self._refs)


class TokenStore:
    """The documents of a split, over all its shards. Opening reads the shards' offsets, never their tokens."""

    def __init__(self, batches: Sequence[pa.RecordBatch]) -> None:
        self._batches = list(batches)
        self._offsets = [batch.column("tokens").offsets.to_numpy() for batch in self._batches]
        self._values = [batch.column("tokens").values.to_numpy() for batch in self._batches]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
        lengths = [np.diff(offsets) for offsets in self._offsets]
        self.lengths: np.ndarray = np.concatenate([np.zeros(0, dtype=np.int64), *lengths], dtype=np.int64)

    @classmethod
    def open(cls, paths: Sequence[Path]) -> "TokenStore":
        """Map the shards at `paths`, in that order. Raises IntegrityFailure when one is not a token shard."""
        return cls([batch for path in paths for batch in _map_shard(path)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def tokens(self, document: int) -> np.ndarray:
        """The ids of document number `document` ([tokens], uint16 or uint32): a read-only view of the file."""
        if not 0 <= document < len(self):
            raise IndexError(f"document {document} of {len(self)}")
        batch = int(np.searchsorted(self._starts, document, side="right")) - 1
        row = document - self._starts[batch]
        offsets = self._offsets[batch]
        return self._values[batch][offsets[row] : offsets[row + 1]]

    @cached_property
    def bytes(self) -> np.ndarray:
        """UTF-8 bytes of each document's text (int64)."""
        columns = [batch.column("bytes").to_numpy() for batch in self._batches]
        return np.concatenate([np.zeros(0, dtype=np.int64), *columns])

    @cached_property
    def ids(self) -> list[str]:
        """The documents' names."""
        return [name for batch in self._batches for name in batch.column("id").to_pylist()]

    @cached_property
    def sources(self) -> list[str]:
        """Where each document comes from."""
        return [name for batch in self._batches for name in batch.column("source").to_pylist()]


def _map_shard(path: Path) -> list[pa.RecordBatch]:
    reader = _map(path)
    if reader.schema not in (_schema(np.uint16), _schema(np.uint32)):
        raise IntegrityFailure(f"{path} is not a token shard (its columns: {', '.join(reader.schema.names)})")
    return [reader.get_batch(index) for index in range(reader.num_record_batches)]


def write_table(path: Path, columns: Mapping[str, Sequence[str] | np.ndarray], run_dir: Path) -> FileRef:
    """Write a small table, columns of equal length, as one Arrow IPC file; numpy dtypes are kept."""
    arrays = [pa.array(values, None if isinstance(values, np.ndarray) else pa.string()) for values in columns.values()]
    batch = pa.record_batch(arrays, names=list(columns))
    with new_file(path) as file:
        _write(file, batch.schema, [batch])
    return file.ref(path, run_dir, rows=batch.num_rows)


def read_table(path: Path) -> dict[str, Any]:
    """Read what `write_table` wrote: numbers as numpy arrays, strings as lists. Raises IntegrityFailure."""
    table = _map(path).read_all()
    columns = zip(table.column_names, table.columns, strict=True)
    return {
        name: column.to_pylist() if pa.types.is_string(column.type) else column.to_numpy() for name, column in columns
    }


def _write(file: Any, schema: pa.Schema, batches: Sequence[pa.RecordBatch]) -> None:
    with pa.ipc.new_file(file, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def _map(path: Path) -> Any:
    try:
        return pa.ipc.open_file(pa.memory_map(str(path)))
    except (pa.ArrowInvalid, OSError) as error:
        raise IntegrityFailure(f"{path} is not an Arrow file: rerun the stage that wrote it with --force") from error
