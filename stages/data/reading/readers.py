"""Documents out of text files of any kind, one at a time; what is no document comes as a `Rejected` in its place.

- the reader has no policy: a bad record is told and the next one read; a fault of the file is told and ends the file
- text is UTF-8 and is kept as it is, line ends included; only a byte order mark at the start of a file is dropped
- a NUL byte in a text means that it is binary, or UTF-16; half a surrogate pair, which JSON can spell, is no text and
  has no bytes: both are refused
- memory is bounded per format, by `streams.MAX_DOCUMENT` for text; each reader says how
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any, Literal, NamedTuple

from schemas.failures import InputFailure
from stages.data.reading.records import NUL_FOUND, Record, Records, is_json_lines, read_json, read_json_lines
from stages.data.reading.sources import TextFile
from stages.data.reading.streams import opened, shown
from stages.data.reading.tables import Fields, Select, read_arrow, read_csv, read_parquet, table_fields
from stages.data.reading.texts import TEXT, read_blocks, read_text_lines, read_whole

TxtDocuments = Literal["file", "block", "line"]
NO_COLUMN = "-"  # for `Columns.id`
TEXT_COLUMNS = ("text", "content", "contents", "document", "body", "article", "raw_content", "markdown", "code")
OTHER_COLUMNS = {  # strings that say something about a text
    "id", "doc_id", "uuid", "source", "group", "url", "uri", "link", "title", "name", "file", "filename", "path",
    "author", "date", "time", "timestamp", "created", "added", "language", "lang", "license", "label", "category",
    "type", "domain", "subset", "split",
}  # fmt: skip
TXT_READERS = {"file": read_whole, "block": read_blocks, "line": read_text_lines}
SEPARATORS = {"csv": ",", "tsv": "\t"}
GUESS_RECORDS = 100  # looked at for the first good one


class Columns(NamedTuple):
    """Where a record keeps what. A column named here must be there.

    None guesses the text column, takes `id` and `source` where they are, and makes each document its own group; the id
    "-" names documents by file and line even where there is an `id`.
    """

    text: str | None = None
    id: str | None = None
    source: str | None = None
    group: str | None = None


class Span(NamedTuple):
    """A part of a file: bytes [start, stop) of plain JSON lines, at the borders of lines, or row groups of Parquet.

    `line` is the number of the first line or row. Other files are read as the whole only.
    """

    start: int = 0
    stop: int | None = None
    line: int = 1


class Document(NamedTuple):
    """One text of `size` bytes in UTF-8, from `line` (or row) on. Documents of one group belong in one split."""

    id: str
    source: str
    group: str
    text: str
    size: int
    line: int


class Rejected(NamedTuple):
    """What could not be read, in one whole line. `line` is None when it is the file, or the rest of it."""

    file: str
    line: int | None
    message: str


WHOLE = Span()


def read_documents(
    file: TextFile, columns: Columns, txt_documents: TxtDocuments = "file", span: Span = WHOLE
) -> Iterator[Document | Rejected]:
    """The documents of `file`, empty ones included, in order.

    Ids are the column's, or `label:line`; in a `.json` that is not JSON lines, `label:number`, as many elements can
    begin in one line; of a text file read as one document, `label`.
    """
    if span != WHOLE and (file.kind not in ("jsonl", "parquet") or file.codec):
        raise ValueError(f"{file.label} can be read as a whole only")
    try:
        file = _as_written(file)
        if file.kind == "txt":
            columns = Columns(TEXT, NO_COLUMN)
        elif columns.text is None:
            columns = columns._replace(text=guess_text_column(file))
        records = _records(file, partial(_select, file, columns), txt_documents, span)
        yield from _documents(file, columns, records, _namer(file, txt_documents))
    except InputFailure as failure:
        yield Rejected(file.label, None, str(failure))


def _as_written(file: TextFile) -> TextFile:
    """`file`, of the kind "jsonl" where a `.json` holds JSON lines."""
    if file.kind != "json":
        return file
    try:
        with opened(file.path, file.codec) as stream:
            return file._replace(kind="jsonl") if is_json_lines(stream) else file
    except InputFailure:
        return file  # who reads the documents will meet it, after those before it


def _records(file: TextFile, select: Select, txt_documents: TxtDocuments, span: Span) -> Records:
    if file.kind == "parquet":
        return read_parquet(file.path, select, *span)
    if file.kind == "arrow":
        return read_arrow(file.path, select)
    return _text_records(file, select, txt_documents, span)


def _text_records(file: TextFile, select: Select, txt_documents: TxtDocuments, span: Span) -> Records:
    path = file.path
    with opened(path, file.codec) as stream:
        if file.kind == "jsonl":
            if span.start:
                stream.seek(span.start)
            size = None if span.stop is None else span.stop - span.start
            yield from read_json_lines(stream, path, span.line, size)
        elif file.kind == "json":
            yield from read_json(stream, path)
        elif file.kind == "txt":
            yield from TXT_READERS[txt_documents](stream, path)
        else:
            yield from read_csv(stream, path, SEPARATORS[file.kind], select)


def _select(file: TextFile, columns: Columns, fields: Fields) -> list[str]:
    """The columns of a table that are wanted. Raises InputFailure when one is missing, there twice, or of no use."""
    names = [name for name, _ in fields]
    wanted = []
    for role, given in zip(columns._fields, columns, strict=True):
        column = given or ("" if role == "group" else role)
        if column == NO_COLUMN and role == "id":
            continue
        if column in names:
            _check_column(file, role, column, fields)
            wanted.append(column)
        elif given:
            raise InputFailure(f"{shown(file.path)} {_no_column(given, columns, names)}")
    return list(dict.fromkeys(wanted))


def _check_column(file: TextFile, role: str, column: str, fields: Fields) -> None:
    kinds = [kind for name, kind in fields if name == column]
    if len(kinds) > 1:
        raise InputFailure(f"{shown(file.path)} has {len(kinds)} columns {column!r}, expected one: rename the others")
    if kinds[0] not in (("string",) if role == "text" else ("string", "integer", "null")):
        expected = "strings" if role == "text" else "strings or whole numbers"
        raise InputFailure(
            f"{shown(file.path)}: column {column!r} is of type {kinds[0]}, expected {expected}: give --{role}-column"
        )


def _no_column(name: str, columns: Columns, found: Iterable[str]) -> str:
    role = columns._fields[columns.index(name)]
    names = ", ".join(f"{column!r:.60}" for column in islice(found, 12)) or "none"
    return f"has no column {name!r}; its columns: {names}: give --{role}-column"


def _namer(file: TextFile, txt_documents: TxtDocuments) -> Callable[[int, int], str]:
    """What a document without an id is called: from its line, and its number among the file's records."""
    if file.kind == "txt" and txt_documents == "file":
        return lambda line, number: file.label
    if file.kind == "json":
        return lambda line, number: f"{file.label}:{number}"
    return lambda line, number: f"{file.label}:{line}"


class _Unfit(Exception):
    """The record is no document: what is wrong with it, to be read after its place."""


def _documents(
    file: TextFile, columns: Columns, records: Records, name: Callable[[int, int], str]
) -> Iterator[Document | Rejected]:
    id_column = None if columns.id == NO_COLUMN else columns.id or "id"
    source_column = columns.source or "source"
    for number, (line, record) in enumerate(records, 1):
        try:
            if isinstance(record, str):
                raise _Unfit(f" {record}")
            text, size = _text(record, columns)
            document = _name(record, id_column, columns) or name(line, number)
            source = _name(record, source_column, columns) or file.source
            group = _name(record, columns.group, columns) or document
        except _Unfit as unfit:
            place = "row" if file.kind in ("parquet", "arrow") else "line"
            yield Rejected(file.label, line, f"{shown(file.path)} {place} {line}{unfit}")
        else:
            yield Document(document, source, group, text, size, line)


def _text(record: Record, columns: Columns) -> tuple[str, int]:
    """The text and its size in bytes."""
    column = columns.text or TEXT
    text = record.get(column)
    if type(text) is not str:
        if column not in record:
            raise _Unfit(f" {_no_column(column, columns, record)}")
        raise _Unfit(f": column {column!r} holds {_type_name(text)}, expected a string")
    if text.isascii():
        size, nul = len(text), "\0" in text
    else:
        data = _encoded(text)
        size, nul = len(data), 0 in data
    if nul:
        raise _Unfit(f" {NUL_FOUND}")
    return text, size


def _name(record: Record, column: str | None, columns: Columns) -> str | None:
    """A name out of a record: a string, or a whole number as a string; None when there is none."""
    value = record.get(column) if column else None
    if type(value) is str:
        if not value.isascii():
            _encoded(value)
        return value
    if value is None:
        if column and column in columns and column not in record:
            raise _Unfit(f" {_no_column(column, columns, record)}")
        return None
    if type(value) is not int:
        raise _Unfit(f": column {column!r} holds {_type_name(value)}, expected a string or a whole number")
    return str(value)


def _encoded(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        found = f"\\u{ord(error.object[error.start]):04x}"
        raise _Unfit(f" holds {found}, half of a surrogate pair, which is no text") from error


def _type_name(value: Any) -> str:
    return "null" if value is None else f"a value of type {type(value).__name__}"


def guess_text_column(file: TextFile) -> str | None:
    """The column that holds the text, from the first good record or the table's types; None for text files.

    "text" where it is, or where there is no good record; else the first of `TEXT_COLUMNS` that holds a string; else the
    only other one that does and is not called as strings about a text are. Raises InputFailure when it stays unclear.
    """
    if file.kind == "txt":
        return None
    strings = _columns_of_strings(file)
    if strings is None or TEXT in strings:
        return TEXT
    known = [name for name in TEXT_COLUMNS if strings.get(name)]
    others = [name for name, holds in strings.items() if holds and name.lower() not in OTHER_COLUMNS]
    if known or len(others) == 1:
        return (known or others)[0]
    names = ", ".join(f"{name!r:.60}" for name in islice(strings, 12)) or "none"
    raise InputFailure(
        f"{shown(file.path)} does not say which column holds the text; its columns: {names}: give --text-column"
    )


def _columns_of_strings(file: TextFile) -> dict[str, bool] | None:
    """For each column whether it holds strings, in CSV other than numbers; None when there is no good record."""
    try:
        if file.kind in ("parquet", "arrow"):
            return {name: kind == "string" for name, kind in table_fields(file.path, file.kind)}
        everything = _records(_as_written(file), lambda fields: [name for name, _ in fields], "file", WHOLE)
        records = (record for _, record in islice(everything, GUESS_RECORDS))
        good = next((record for record in records if isinstance(record, dict) and record), None)
    except InputFailure:
        return None  # as above
    return good and {name: isinstance(value, str) and not _is_number(value) for name, value in good.items()}


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True
