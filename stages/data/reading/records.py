r"""Records out of JSON text, each with the line where it starts, or with what is wrong with it.

- a reader yields `(line, record)`; a fault is a string instead, to be read after "<path> line <line>"
- orjson parses; what it refuses goes to the slower `json`, which takes NaN and halves of surrogate pairs, or says why
- an element of a JSON file ends where its brackets, counted outside strings, are closed: found in one pass, and then
  parsed once; to parse what there is until it parses would cost a pass for each time the buffer is filled
- after a fault in the structure (a bracket, a quote) nobody knows where the next element begins: the file ends there
"""

import json
import re
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

import orjson

from stages.data.reading import streams
from stages.data.reading.streams import FAULTS, lines, start_of_text

Record = dict[str, Any]
Records = Iterator[tuple[int, Record | str]]

NUL_FOUND = "holds a NUL byte, which no text does: is the file binary, or UTF-16?"
QUOTE, BACKSLASH = b'"\\'
OPENING = b"{["
SPACE = re.compile(rb"[ \t\r\n]*")
STRUCTURE = re.compile(rb'["{}\[\]]')
SCALAR = re.compile(rb'[^ \t\r\n",{}\[\]]*')


class _Broken(Exception):
    """No JSON: the line, and what is wrong there."""


def read_json_lines(stream: BufferedReader, path: Path, first: int = 1, size: int | None = None) -> Records:
    """One object a line; blank lines are left out. `first` and `size` as in `lines`.

    Memory: that of `lines`, and the parsed object, about 30 times a line that holds nothing but brackets.
    """
    for number, line in lines(stream, first, size):
        if line is None:
            yield number, too_long()
            continue
        if number == 1:
            line = start_of_text(line, path)
        try:
            record = orjson.loads(line)
        except ValueError:
            if not line or line.isspace():
                continue
            try:
                record = _reparsed(line.rstrip(b"\r\n"), number, "; one object a line is expected")
            except _Broken as broken:
                yield broken.args
                continue
        yield number, record if type(record) is dict else _no_object(record)


def too_long() -> str:
    """What is wrong with a line, a record or a text of more than `MAX_DOCUMENT` bytes."""
    return f"is longer than {streams.MAX_DOCUMENT / (1 << 20):g} MiB: cut it into documents"


def _reparsed(data: bytes | bytearray, line: int, hint: str = "") -> Any:
    """The value that `json` finds in data that begins at `line`. Raises _Broken."""
    try:
        return json.loads(data.decode())
    except UnicodeDecodeError as error:
        raise _Broken(line + data.count(b"\n", 0, error.start), not_utf8(error)) from error
    except json.JSONDecodeError as error:
        fault = f"is not JSON ({error.msg} at column {error.colno}){hint}"
        raise _Broken(line + error.lineno - 1, fault) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a thousand brackets
        raise _Broken(line, f"is not JSON ({error}){hint}") from error


def not_utf8(error: UnicodeDecodeError) -> str:
    """What is wrong with bytes that are no text."""
    return f"is not UTF-8 (byte 0x{error.object[error.start]:02x}): convert the file first"


def _no_object(value: Any) -> str:
    return f"holds {'null' if value is None else f'a {type(value).__name__}'}, expected a JSON object"


def is_json_lines(stream: BufferedReader) -> bool:
    """Whether the first line that is not blank is a whole object: JSON lines, though the file may be called `.json`.

    Memory: one line, if it begins with a bracket.
    """
    while (line := stream.readline(streams.BLOCK).removeprefix(streams.BYTE_ORDER_MARK)).isspace():
        pass
    if not line.lstrip().startswith(b"{"):
        return False
    if not line.endswith(b"\n"):
        line += stream.readline(streams.MAX_DOCUMENT)
    try:
        return isinstance(_reparsed(line, 1), dict)
    except _Broken:
        return False


def read_json(stream: BufferedReader, path: Path) -> Records:
    """The elements of an array, or values one after another; what is no object is a fault.

    Memory: an element, of `MAX_DOCUMENT` bytes at most, twice, and parsed (see `read_json_lines`).
    """
    text = _Text(stream, path)
    try:
        if text.next_byte() == b"[":
            yield from _elements_of_array(text)
        else:
            while text.next_byte():
                yield _element(text)
    except _Broken as broken:
        line, fault = broken.args
        yield line, f"{fault}; the rest of the file is left out"


def _elements_of_array(text: "_Text") -> Records:
    text.take(1)
    if text.next_byte() != b"]":
        yield _element(text)
    while text.next_byte() == b",":
        text.take(1)
        text.next_byte()
        yield _element(text)
    if (found := text.next_byte()) != b"]":
        raise _Broken(text.line, f"holds {_named(found)}, expected a comma or the end of the array")
    text.take(1)
    if found := text.next_byte():
        raise _Broken(text.line, f"holds {_named(found)} after the end of the array")


def _element(text: "_Text") -> tuple[int, Record | str]:
    line = text.line
    data = text.take(text.element_size())
    try:
        record = orjson.loads(data)
    except ValueError:
        record = _reparsed(data, line)
    return line, record if type(record) is dict else _no_object(record)


def _named(byte: bytes | bytearray) -> str:
    return repr(byte.decode("latin-1")) if byte else "the end of the file (was it cut short?)"


class _Text:
    """The part of a JSON text that is held; reading goes on at `_at`, in line `line`."""

    def __init__(self, stream: BufferedReader, path: Path) -> None:
        self.line = 1
        self._stream = stream
        self._fault: Exception | None = None
        self._data = bytearray(start_of_text(stream.read(streams.MARK), path))
        self._at = 0

    def _grow(self) -> bool:
        """Let go of what was taken and read on, doubling what is left; False at the end of the text.

        Doubling: a string whose end is not held is searched again from its start. A fault of the file is raised only
        when everything before it has been taken.
        """
        if self._fault:
            raise self._fault
        del self._data[: self._at]
        self._at = 0
        held = len(self._data)
        if held > streams.MAX_DOCUMENT:
            raise _Broken(self.line, f"begins an element that {too_long()}")
        wanted = held + max(streams.BLOCK, min(held, streams.MAX_DOCUMENT - held))
        try:
            while len(self._data) < wanted and (piece := self._stream.read1(streams.PIECE)):
                self._data += piece
        except FAULTS as fault:
            self._fault = fault
        return len(self._data) > held or self._fault is not None

    def next_byte(self) -> bytearray:
        """The next byte that is no white space, not taken yet; empty at the end of the text."""
        while True:
            self.take(SPACE.match(self._data, self._at).end() - self._at)  # type: ignore[union-attr]
            if self._at < len(self._data) or not self._grow():
                return self._data[self._at : self._at + 1]

    def take(self, size: int) -> bytearray:
        """The next `size` bytes, which are held."""
        data = self._data[self._at : self._at + size]
        self.line += data.count(b"\n")
        self._at += size
        return data

    def element_size(self) -> int:
        """Bytes of the value that begins here. Raises _Broken when none does, or when it has no end."""
        if self._data.startswith((b"{", b"[", b'"'), self._at):
            return self._closed_size()
        while True:
            size = SCALAR.match(self._data, self._at).end() - self._at  # type: ignore[union-attr]
            if self._at + size < len(self._data) or not self._grow():
                break
        if not size:
            raise _Broken(self.line, f"holds {_named(self.next_byte())}, expected a JSON object")
        return size

    def _closed_size(self) -> int:
        """Bytes up to where the bracket or the quote that stands here is closed."""
        size = depth = 0
        while True:
            end, depth, closed = _scan(self._data, self._at + size, depth)
            size = end - self._at
            if closed:
                return size
            if not self._grow():
                raise _Broken(self.line, "begins an element without an end (was the file cut short?)")


def _scan(data: bytearray, at: int, depth: int) -> tuple[int, int, bool]:
    """Go on from `at`, `depth` brackets deep, until they are closed or the data ends: (at, depth, closed)."""
    while found := STRUCTURE.search(data, at):
        at = found.start()
        mark = data[at]
        if mark == QUOTE:
            if not (end := _string_end(data, at)):
                return at, depth, False
            at = end
        else:
            depth += 1 if mark in OPENING else -1
            at += 1
        if not depth:
            return at, depth, True
    return len(data), depth, False


def _string_end(data: bytearray, start: int) -> int:
    """Where the string that starts at `start` ends; 0 when its end is not held."""
    end = data.find(QUOTE, start + 1)
    while end > 0 and data[end - 1] == BACKSLASH:
        back = end - 1
        while data[back - 1] == BACKSLASH:
            back -= 1
        if (end - back) % 2 == 0:
            break
        end = data.find(QUOTE, end + 1)
    return end + 1
