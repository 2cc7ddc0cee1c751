"""Records out of tables: CSV, Parquet, Arrow; only the columns wanted, in few rows at a time.

- a reader shows the table's columns to `select`, which names those to read, and yields as those of JSON do: `(line or
  row, record or fault)`
- Arrow trusts the offsets in a file, which may point anywhere: they are checked before a string is touched
- strings are read as bytes and decoded one by one, so that a row that is no UTF-8 is a fault of that row only
- an Arrow stream that was cut between two batches still reads well, as its end mark is optional: it is asked for here
"""

import csv
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.failures import InputFailure
from stages.data.reading import streams
from stages.data.reading.records import Record, Records, not_utf8, too_long
from stages.data.reading.streams import lines, shown, start_of_text, translated

Fields = Sequence[tuple[str, str]]  # name and type of each column: "string", "integer", "null", or another's name
Select = Callable[[Fields], list[str]]  # the columns to read; raises InputFailure for a table without them

ROWS = 64  # decoded at a time
BATCH_BYTES = 64 << 20  # of fewer, long rows
PAGE_BYTES = 1 << 18  # of a Parquet column read at a time
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
BINARY = {
    pa.string(): pa.binary(),
    pa.large_string(): pa.large_binary(),
    pa.string_view(): pa.binary_view(),
}


class _RecordTooLong(Exception):
    """A row of more than `MAX_DOCUMENT` bytes."""


class _CsvLines:
    """The lines of a CSV file as csv.reader wants them; the bytes and the fault of the row they are for."""

    def __init__(self, stream: BufferedReader, path: Path) -> None:
        self._lines = lines(stream)
        self._path = path
        self.size = 0
        self.fault: tuple[int, str] | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        number, line = next(self._lines)
        if line is None or self.size + len(line) > streams.MAX_DOCUMENT:
            raise _RecordTooLong
        if number == 1:
            line = start_of_text(line, self._path)
        self.size += len(line)
        try:
            return line.decode()
        except UnicodeDecodeError as error:
            self.fault = self.fault or (number, not_utf8(error))
            return line.decode(errors="replace")


def read_csv(stream: BufferedReader, path: Path, delimiter: str, select: Select) -> Records:
    """A row after the header is a record; blank lines are left out, line ends inside quotes are kept (RFC 4180).

    Memory: a row, of `MAX_DOCUMENT` bytes at most, six times (csv keeps four bytes a character).
    """
    header: list[str] = []
    wanted: list[tuple[str, int]] = []
    for line, row in _csv_rows(stream, path, delimiter):
        if isinstance(row, str):
            yield line, row
            if not header:
                return
        elif not header:
            header = row
            _check_separator(header, path, delimiter)
            wanted = [(name, header.index(name)) for name in select([(name, "string") for name in header])]
        elif len(row) != len(header):
            yield line, f"begins a row of {len(row)} fields, expected {len(header)} as in the header"
        else:
            yield line, {name: row[index] for name, index in wanted}


def _csv_rows(stream: BufferedReader, path: Path, delimiter: str) -> Iterator[tuple[int, list[str] | str]]:
    csv.field_size_limit(streams.MAX_DOCUMENT)  # of the whole process; csv's own is 131,072 characters
    feed = _CsvLines(stream, path)
    reader = csv.reader(feed, delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        feed.size, feed.fault = 0, None
        try:
            row = next(reader)
        except StopIteration:
            return
        except _RecordTooLong:
            yield line, f"begins a row that {too_long()} (is a quote never closed?); the rest of the file is left out"
            return
        except csv.Error as error:
            yield line, f"begins a row that is not CSV ({_csv_reason(error)})"
            continue
        if feed.fault:
            yield feed.fault
        elif row:
            yield line, row


def _csv_reason(error: csv.Error) -> str:
    if "unexpected end of data" in str(error):
        return "a quote is never closed"
    if "new-line character" in str(error):
        return "a carriage return outside quotes"
    return str(error).replace("\t", "\\t")  # the delimiter it names may be a tab


def _check_separator(header: list[str], path: Path, delimiter: str) -> None:
    others = [other for other in ",;\t|" if other != delimiter and other in header[0]]
    if len(header) == 1 and others:
        raise InputFailure(
            f"{shown(path)} has one column, {header[0]!r}: it looks separated by {others[0]!r}, expected {delimiter!r}"
        )


def read_parquet(path: Path, select: Select, start: int, stop: int | None, row: int) -> Records:
    """The rows of the row groups [start, stop), numbered from `row` on.

    Memory: 64 rows of the columns wanted, fewer when they are longer than 1 MiB, and one page of each column; a page
    is as long as its writer wanted, 2 GiB at most.
    """
    with _reading(path), pa.OSFile(str(path)) as source:
        file = pq.ParquetFile(source, pre_buffer=False, buffer_size=PAGE_BYTES)
        wanted = select(_fields(file.schema_arrow))
        groups = range(file.num_row_groups)[start:stop]
        for batch in file.iter_batches(_rows_at_once(file.metadata), list(groups), wanted, use_threads=False):
            for record in _records([_as_binary(batch.column(name)) for name in wanted], wanted):
                yield row, record
                row += 1


def _reading(path: Path) -> AbstractContextManager[None]:
    return translated(path, UnicodeDecodeError)  # names of columns that are no UTF-8


def _rows_at_once(metadata: Any) -> int:
    size = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
    return max(1, min(ROWS, BATCH_BYTES * metadata.num_rows // max(size, 1)))


def read_arrow(path: Path, select: Select) -> Records:
    """The rows of an Arrow IPC file (also called Feather version 2) or stream.

    Memory: the file is mapped; what its writer compressed is unpacked, a record batch of the columns wanted at a time.
    """
    row = 1
    with _reading(path), _mapped(path) as source:
        for batch, wanted in _arrow_batches(source, path, select):
            columns = [_as_binary(batch.column(name)) for name in wanted]
            for column in columns:
                column.validate(full=True)
            for record in _records(columns, wanted):
                yield row, record
                row += 1


@contextmanager
def _mapped(path: Path) -> Iterator[Any]:
    if path.stat().st_size == 0:
        raise EOFError("it is empty, which no Arrow file is")
    with pa.memory_map(str(path)) as source:
        yield source


def _arrow_batches(source: Any, path: Path, select: Select) -> Iterator[tuple[Any, list[str]]]:
    """The record batches of the columns wanted, and the names of these."""
    open_reader = _arrow_opener(source, path)
    schema = open_reader(source).schema
    wanted = select(_fields(schema))
    options = pa.ipc.IpcReadOptions(included_fields=[schema.get_field_index(name) for name in wanted])
    source.seek(0)
    reader = open_reader(source, options=options)
    is_file = open_reader is pa.ipc.open_file
    for batch in map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader:
        yield batch, wanted
    if not is_file:
        _check_end(source, path)


def _arrow_opener(source: Any, path: Path) -> Callable[..., Any]:
    start = source.read(len(b"ARROW1"))
    source.seek(0)
    if start.startswith(b"FEA1"):
        raise InputFailure(f"{shown(path)} is Feather of version 1, expected version 2: write it again")
    return pa.ipc.open_file if start == b"ARROW1" else pa.ipc.open_stream


def _check_end(source: Any, path: Path) -> None:
    """The stream that was read to its end in `source` ends with its mark and the file with the stream."""
    end = source.tell()
    source.seek(0)
    if source.read(4) != END_OF_STREAM[:4]:
        return  # from before Arrow 0.15: its mark, four NULs, could as well be data
    source.seek(max(end - len(END_OF_STREAM), 0))
    if source.read(len(END_OF_STREAM)) != END_OF_STREAM:
        raise InputFailure(f"{shown(path)} has no end mark, which an Arrow stream has: it may have been cut short")
    if end < source.size():
        raise InputFailure(f"{shown(path)} holds {source.size() - end} bytes after the end of its Arrow stream")


def table_fields(path: Path, kind: Literal["parquet", "arrow"]) -> Fields:
    """The columns of a Parquet or Arrow file, from its head alone. Raises InputFailure."""
    with _reading(path):
        if kind == "parquet":
            with pa.OSFile(str(path)) as source:
                return _fields(pq.read_schema(source))
        with _mapped(path) as source:
            return _fields(_arrow_opener(source, path)(source).schema)


def _fields(schema: Any) -> Fields:
    return [(field.name, _type_name(field.type)) for field in schema]


def _type_name(kind: Any) -> str:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if kind in BINARY:
        return "string"
    return "integer" if pa.types.is_integer(kind) else shown(f"{kind!s:.60}")


def _as_binary(column: Any) -> Any:
    """The same buffers, with bytes for strings."""
    if pa.types.is_dictionary(column.type):
        return pa.DictionaryArray.from_arrays(column.indices, _as_binary(column.dictionary), safe=False)
    return column.view(BINARY[column.type]) if column.type in BINARY else column


def _records(columns: Sequence[Any], names: Sequence[str]) -> Iterator[Record | str]:
    """The rows of `columns`; strings that are too long, or no UTF-8, are faults of their row."""
    large = any(column.nbytes > streams.MAX_DOCUMENT for column in columns)
    for offset in range(0, len(columns[0]), ROWS):
        for row in zip(*[_values(column.slice(offset, ROWS)) for column in columns], strict=True):
            if large and any(type(value) is bytes and len(value) > streams.MAX_DOCUMENT for value in row):
                yield too_long()
                continue
            try:
                values = [value.decode() if type(value) is bytes else value for value in row]
            except UnicodeDecodeError as error:
                yield not_utf8(error)
            else:
                yield dict(zip(names, values, strict=True))


def _values(column: Any) -> Sequence[Any] | Iterator[Any]:
    """The values of a column; one at a time where together they could be large."""
    if pa.types.is_dictionary(column.type) or column.nbytes > BATCH_BYTES:
        return (scalar.as_py() for scalar in column)
    return column.to_pylist()
