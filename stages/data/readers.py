"""Corpora as the user has them: files, folders and globs, read one document at a time.

- `.jsonl` and `.ndjson` hold one document a line, `.parquet` one a row, `.txt` and `.md` one a file
- `.gz` and `.zst` go through Arrow's codecs, which report a stream cut short; other readers return what there was
- text is UTF-8 and is kept as it is, line ends included; only a byte order mark at the start of a file is dropped
- JSON may spell half a surrogate pair, which is no text and has no bytes: refused
- line files are streamed; memory is one line, at most `MAX_DOCUMENT` bytes, so that no small archive grows without end
"""

import glob
import io
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from loguru import logger

from schemas.failures import InputFailure

CODECS = {".gz": "gzip", ".zst": "zstd"}
LINE_FILES = (".jsonl", ".ndjson")
TEXT_FILES = (".txt", ".md")
READABLE = ".jsonl, .ndjson, .txt, .md (each also .gz or .zst) and .parquet"
MAX_DOCUMENT = 256 << 20  # bytes
PARQUET_ROWS = 256  # decoded at a time
BYTE_ORDER_MARK = "\ufeff".encode()


class Columns(NamedTuple):
    """Where a record keeps what. A column named here must be there; None takes `id`, `source`, or does without."""

    text: str = "text"
    id: str | None = None
    source: str | None = None
    group: str | None = None


class TextFile(NamedTuple):
    """A file to read. `label` is its name, with as many parent folders as make it unique in the corpus."""

    path: Path
    label: str


class Document(NamedTuple):
    """One text, with its length in UTF-8 bytes. Documents of one group belong in one split."""

    id: str
    source: str
    group: str
    text: str
    size: int


def find_files(inputs: Sequence[str]) -> list[TextFile]:
    """The files that `inputs` (files, folders, globs) name, each once, sorted by label.

    Folders are searched to any depth; in them, hidden files and files of other kinds are left out with a warning.
    Raises InputFailure for what does not exist or cannot be read as text.
    """
    paths: dict[Path, Path] = {}
    for pattern in inputs:
        for path in _expand(pattern):
            for file in _files_in(path) if path.is_dir() else [_fit(path)]:
                paths.setdefault(file.resolve(), file)
    labels = _labels(list(paths.values()))
    return sorted((TextFile(path, label) for path, label in labels.items()), key=lambda file: file.label)


def _expand(pattern: str) -> list[Path]:
    if os.path.lexists(pattern):
        return [Path(pattern)]
    if found := sorted(glob.glob(pattern, recursive=True)):
        return [Path(name) for name in found]
    raise InputFailure(f"no such file or folder: {_shown(pattern)}")


def _files_in(folder: Path) -> list[Path]:
    files, others = [], Counter[str]()
    for path in sorted(folder.rglob("*")):
        if any(part.startswith(".") for part in path.relative_to(folder).parts) or path.is_dir():
            continue
        if _kind(path) and path.is_file():
            files.append(_fit(path))
        else:
            others[path.suffix or path.name] += 1
    if not files:
        raise InputFailure(f"{_shown(folder)} holds no file that can be read; readable are {READABLE}")
    if others:
        kinds = ", ".join(f"{kind} ({count})" for kind, count in sorted(others.items())[:8])
        logger.warning("left out in {}, as of other kinds: {}", _shown(folder), kinds)
    return files


def _fit(path: Path) -> Path:
    """`path`, found to be a file that a reader exists for."""
    if not path.exists():
        raise InputFailure(f"{_shown(path)} is a link to nothing")
    if not path.is_file():
        raise InputFailure(f"{_shown(path)} is not a regular file; write the text to a file first")
    if not _kind(path):
        raise InputFailure(f"{_shown(path)} is of an unknown kind {path.suffix!r}; readable are {READABLE}")
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise InputFailure(f"the file name {_shown(path)} is not UTF-8: rename the file") from error
    return path


def _shown(path: Path | str) -> str:
    """A path on one line, whatever characters it holds."""
    return str(path) if str(path).isprintable() else repr(str(path))


def _kind(path: Path) -> str | None:
    """The suffix that decides how `path` is read, without that of the codec; None when nothing reads it."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".parquet"]:
        return ".parquet"
    if suffixes and suffixes[-1] in CODECS:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in (*LINE_FILES, *TEXT_FILES) else None


def _labels(paths: Sequence[Path]) -> dict[Path, str]:
    labels = {path: path.name for path in paths}
    for depth in itertools.count(2):
        shared = {label for label, count in Counter(labels.values()).items() if count > 1}
        if not shared:
            break
        labels |= {path: "/".join(path.absolute().parts[-depth:]) for path in paths if labels[path] in shared}
    return labels


def read_documents(files: Sequence[TextFile], columns: Columns) -> Iterator[Document]:
    """The documents of `files`, empty ones included. Raises InputFailure naming the file and the line."""
    for file in files:
        kind = _kind(file.path)
        if kind in TEXT_FILES:
            yield _read_text(file)
        else:
            records = _read_parquet(file, columns) if kind == ".parquet" else _read_lines(file)
            for number, record in records:
                yield _document(record, columns, file, number)


def _read_text(file: TextFile) -> Document:
    with _opened(file.path) as stream:
        data = stream.read(MAX_DOCUMENT + 1)
    if len(data) > MAX_DOCUMENT:
        raise InputFailure(f"{_shown(file.path)} is longer than {MAX_DOCUMENT >> 20} MiB: cut it into documents")
    data = data.removeprefix(BYTE_ORDER_MARK)
    return Document(file.label, _stem(file.path), file.label, _decoded(data, file.path, 1), len(data))


def _read_lines(file: TextFile) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with _opened(file.path) as stream:
        for number in itertools.count(1):
            line = stream.readline(MAX_DOCUMENT + 1)
            if not line:
                return
            if len(line) > MAX_DOCUMENT:
                raise InputFailure(f"{_shown(file.path)} line {number} is longer than {MAX_DOCUMENT >> 20} MiB")
            if number == 1:
                line = line.removeprefix(BYTE_ORDER_MARK)
            if not line.isspace() and line:
                yield number, _parsed(line, file.path, number)


def _parsed(line: bytes, path: Path, number: int) -> Mapping[str, Any]:
    try:
        record = json.loads(_decoded(line, path, number))
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise InputFailure(
            f"{_shown(path)} line {number} is not JSON ({reason}); one object a line is expected"
        ) from error
    if not isinstance(record, dict):
        raise InputFailure(f"{_shown(path)} line {number} holds a {type(record).__name__}, expected a JSON object")
    return record


def _read_parquet(file: TextFile, columns: Columns) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with _translated(file.path), pq.ParquetFile(file.path) as table:
        names = table.schema_arrow.names
        wanted = [
            name for name in (columns.text, columns.id or "id", columns.source or "source", columns.group) if name
        ]
        missing = next((name for name in columns if name and name not in names), None)
        if missing:
            raise _no_column(f"{_shown(file.path)}", missing, columns, names)
        number = 0
        for batch in table.iter_batches(PARQUET_ROWS, columns=[name for name in names if name in wanted]):
            for record in batch.to_pylist():
                number += 1
                yield number, record


def _document(record: Mapping[str, Any], columns: Columns, file: TextFile, number: int) -> Document:
    where = f"{_shown(file.path)} {'row' if _kind(file.path) == '.parquet' else 'line'} {number}"
    for name in columns:
        if name and name not in record:
            raise _no_column(where, name, columns, list(record))
    text = record[columns.text]
    if not isinstance(text, str):
        raise InputFailure(f"{where}: column {columns.text!r} holds {_type_name(text)}, expected a string")
    document = _label(record, columns.id or "id", where) or f"{file.label}:{number}"
    source = _label(record, columns.source or "source", where) or _stem(file.path)
    group = (_label(record, columns.group, where) if columns.group else None) or document
    try:
        size = len(text.encode())
        "".join((document, source, group)).encode()
    except UnicodeEncodeError as error:
        found = f"\\u{ord(error.object[error.start]):04x}"
        raise InputFailure(f"{where} holds {found}, half of a surrogate pair, which is no text") from error
    return Document(document, source, group, text, size)


def _label(record: Mapping[str, Any], column: str, where: str) -> str | None:
    """A name out of a record: a string, or a whole number as a string; None when there is none."""
    value = record.get(column)
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise InputFailure(f"{where}: column {column!r} holds {_type_name(value)}, expected a string or a whole number")
    return str(value)


def _type_name(value: Any) -> str:
    return "null" if value is None else f"a value of type {type(value).__name__}"


def _no_column(where: str, name: str, columns: Columns, found: Sequence[str]) -> InputFailure:
    role = columns._fields[columns.index(name)]
    names = ", ".join(repr(column) for column in found[:12]) or "none"
    return InputFailure(f"{where} has no column {name!r}; its columns: {names}: give --{role}-column")


def _stem(path: Path) -> str:
    """The file's name without the suffixes that say how it is read: `law.v2.jsonl.zst` is `law.v2`."""
    stem = Path(path.stem) if path.suffix.lower() in CODECS else path
    return stem.stem


def _decoded(data: bytes, path: Path, first_line: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        found = f"byte 0x{data[error.start]:02x}"
        raise InputFailure(f"{_shown(path)} line {line} is not UTF-8 ({found}): convert the file first") from error


@contextmanager
def _opened(path: Path) -> Iterator[io.BufferedReader]:
    """The file's bytes, decompressed as its suffix says."""
    with _translated(path), pa.input_stream(str(path), compression=CODECS.get(path.suffix.lower())) as raw:
        yield io.BufferedReader(raw, 1 << 20)


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise InputFailure(f"{_shown(path)} cannot be read: {reason}") from error
