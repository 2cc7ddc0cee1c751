"""Documents as token ids in Arrow IPC files: written in shards, read through a memory map.

- the IPC *file* format only: a *stream* cut at a message border reads as complete
- Arrow accepts most flipped bits as valid data, so a reader checks the shard's digest (`FileRef.check`) before it opens
- a shard is streamed to the disk in batches (`BATCH_TOKENS` ids) and has its name only when it is whole
- the same documents give the same bytes: no metadata, no compression, dictionary-free
- token ids are uint16 while the vocabulary fits (65,536), else uint32; the ids read are views of the map, not copies
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa

from schemas.failures import IntegrityFailure
from schemas.files import FileRef, NewFile, new_file

BATCH_TOKENS = 1 << 20
BATCH_DOCUMENTS = 1 << 16


def token_type(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    """The narrowest dtype that holds every id below `vocab_size`."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def _schema(dtype: type[np.uint16] | type[np.uint32]) -> pa.Schema:
    tokens = pa.list_(pa.field("item", pa.from_numpy_dtype(dtype), nullable=False))
    return pa.schema({"id": pa.string(), "source": pa.string(), "bytes": pa.int64(), "tokens": tokens})


class ShardWriter:
    """Writes documents, in the order added, to one shard: a context, in which `finish` gives the file its name.

    Memory: one batch, `BATCH_TOKENS` ids and the longest document. Left without `finish`, nothing stays behind.
    """

    def __init__(self, path: Path, run_dir: Path, vocab_size: int) -> None:
        self._path = path
        self._run_dir = run_dir
        self._dtype = token_type(vocab_size)
        self._schema = _schema(self._dtype)
        self._open = ExitStack()
        self._file: NewFile | None = None
        self._documents = 0
        self._tokens = 0
        self._open_batch()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if self._file is not None:
            left = error or RuntimeError("left without finish")
            self._open.__exit__(type(left), left, trace)

    def _open_batch(self) -> None:
        self._ids: list[str] = []
        self._sources: list[str] = []
        self._bytes: list[int] = []
        self._rows: list[Sequence[int] | np.ndarray] = []
        self._waiting = 0

    def add(self, document: str, source: str, size: int, tokens: Sequence[int] | np.ndarray) -> None:
        """Append the document named `document`: `size` UTF-8 bytes of text, as `tokens`."""
        self._ids.append(document)
        self._sources.append(source)
        self._bytes.append(size)
        self._rows.append(tokens)
        self._waiting += len(tokens)
        if self._waiting >= BATCH_TOKENS or len(self._ids) >= BATCH_DOCUMENTS:
            self._close_batch()

    def _close_batch(self) -> None:
        offsets = np.zeros(len(self._rows) + 1, dtype=np.int32)
        np.cumsum([len(row) for row in self._rows], out=offsets[1:])
        values = np.concatenate(self._rows, dtype=self._dtype, casting="unsafe")
        kind = self._schema.field("tokens").type
        tokens = pa.Array.from_buffers(
            kind, len(offsets) - 1, [None, pa.py_buffer(offsets)], children=[_numbers(values)]
        )
        sizes = _numbers(np.array(self._bytes, dtype=np.int64))
        columns = [_strings(self._ids), _strings(self._sources), sizes, tokens]
        self._write(pa.record_batch(columns, schema=self._schema), self._waiting)
        self._open_batch()

    def _write(self, batch: pa.RecordBatch, tokens: int) -> None:
        if self._file is None:
            self._file = self._open.enter_context(new_file(self._path))
            self._arrow = pa.ipc.new_file(self._file, self._schema)
        self._arrow.write_batch(batch)
        self._documents += batch.num_rows
        self._tokens += tokens

    def copy(self, batch: pa.RecordBatch) -> None:
        """Append the documents of another shard's batch."""
        offsets = batch.column("tokens").offsets.to_numpy()
        self._write(batch, int(offsets[-1] - offsets[0]))

    def finish(self) -> FileRef | None:
        """Complete the file; its descriptor, or None when no document was added."""
        if self._ids:
            self._close_batch()
        if self._file is None:
            return None
        self._arrow.close()
        file, self._file = self._file, None
        self._open.close()
        return file.ref(self._path, self._run_dir, rows=self._documents, tokens=self._tokens)


# `pa.array` would import pandas wherever it is installed, which takes longer than to tokenize a small corpus.
def _numbers(values: np.ndarray) -> pa.Array:
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)])


def _strings(values: Sequence[str]) -> pa.Array:
    encoded = [value.encode() for value in values]
    offsets = np.zeros(len(encoded) + 1, dtype=np.int32)
    np.cumsum([len(value) for value in encoded], out=offsets[1:])
    return pa.StringArray.from_buffers(len(encoded), pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded)))


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
    schema, batches = _map(path)
    if schema not in (_schema(np.uint16), _schema(np.uint32)):
        raise IntegrityFailure(f"{path} is not a token shard (its columns: {', '.join(schema.names)!r:.200})")
    return batches


def keep_rows(shard: Path, kept: np.ndarray, target: Path, run_dir: Path) -> FileRef | None:
    """Copy the documents that `kept` (bool [documents]) marks into a new shard; None when it marks none."""
    batches = _map_shard(shard)
    writer = ShardWriter(target, run_dir, 1 << 16 if batches[0].schema == _schema(np.uint16) else 1 << 32)
    start = 0
    with writer:
        for batch in batches:
            some = batch.take(_numbers(np.flatnonzero(kept[start : start + batch.num_rows])))
            start += batch.num_rows
            if some.num_rows:
                writer.copy(some)
        return writer.finish()


def write_table(path: Path, columns: Mapping[str, Sequence[str] | np.ndarray], run_dir: Path) -> FileRef:
    """Write a small table, columns of equal length, as one Arrow IPC file; numpy dtypes are kept."""
    arrays = [
        _numbers(np.ascontiguousarray(values)) if isinstance(values, np.ndarray) else _strings(values)
        for values in columns.values()
    ]
    batch = pa.record_batch(arrays, names=list(columns))
    with new_file(path) as file:
        _write(file, batch.schema, [batch])
    return file.ref(path, run_dir, rows=batch.num_rows)


def read_table(path: Path) -> dict[str, Any]:
    """Read what `write_table` wrote: numbers as numpy arrays, strings as lists. Raises IntegrityFailure."""
    schema, batches = _map(path)
    table = pa.Table.from_batches(batches, schema)
    columns = zip(table.column_names, table.columns, strict=True)
    return {
        name: column.to_pylist() if pa.types.is_string(column.type) else column.to_numpy() for name, column in columns
    }


def _write(file: Any, schema: pa.Schema, batches: Sequence[pa.RecordBatch]) -> None:
    with pa.ipc.new_file(file, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def _map(path: Path) -> tuple[pa.Schema, list[pa.RecordBatch]]:
    """The batches of a file, whose offsets were found to lie inside it: Arrow trusts them, and would read anywhere."""
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
        for batch in batches:
            batch.validate(full=True)
        return reader.schema, batches
    except (pa.ArrowException, OSError) as error:
        raise IntegrityFailure(f"{path} is not an Arrow file: rerun the stage that wrote it with --force") from error
