r"""Documents out of plain text: a file, the blocks between blank lines, or the lines.

- yields as the readers of records do: `(line, record or fault)`, the record being `{"text": …}`
- line ends inside a document are kept; one at the end of a block or of a line (`\n` or `\r\n`) belongs to the file
"""

from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

from stages.data.reading import streams
from stages.data.reading.records import NUL_FOUND, Record, Records, not_utf8, too_long
from stages.data.reading.streams import BLOCK, lines, start_of_text

TEXT = "text"


def read_whole(stream: BufferedReader, path: Path) -> Records:
    """Everything as one document. Memory: `MAX_DOCUMENT` bytes, and the text, of up to four bytes a character."""
    data = bytearray(start_of_text(stream.read(streams.MARK), path))
    while piece := stream.read1(BLOCK):
        data += piece
        if len(data) > streams.MAX_DOCUMENT:
            yield 1, too_long()
            return
    yield _decoded(data, 1)


def read_text_lines(stream: BufferedReader, path: Path) -> Records:
    """A document a line, empty ones included. Memory: that of `lines`."""
    for number, line in _lines(stream, path):
        yield (number, too_long()) if line is None else _decoded(_without_line_end(line), number)


def read_blocks(stream: BufferedReader, path: Path) -> Records:
    """A document for each run of lines that are not blank. Memory: `MAX_DOCUMENT` bytes three times."""
    block: list[bytes] = []
    first = size = 0
    for number, line in _lines(stream, path):
        if line is None or (line and not line.isspace()):
            first = first or number
            size = size + len(line) if line else streams.MAX_DOCUMENT + 1
            if size > streams.MAX_DOCUMENT:
                block = []
            else:
                block.append(line or b"")
        elif first:
            yield _block(block, first, size)
            block, first, size = [], 0, 0
    if first:
        yield _block(block, first, size)


def _lines(stream: BufferedReader, path: Path) -> Iterator[tuple[int, bytes | None]]:
    for number, line in lines(stream):
        yield number, start_of_text(line, path) if line and number == 1 else line


def _block(block: list[bytes], first: int, size: int) -> tuple[int, Record | str]:
    if size > streams.MAX_DOCUMENT:
        return first, f"begins a block that {too_long()}"
    return _decoded(_without_line_end(b"".join(block)), first)


def _without_line_end(data: bytes) -> bytes:
    return data.removesuffix(b"\n").removesuffix(b"\r") if data.endswith(b"\n") else data


def _decoded(data: bytes | bytearray, line: int) -> tuple[int, Record | str]:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        return line + data.count(b"\n", 0, error.start), not_utf8(error)
    if (at := data.find(b"\0")) >= 0:
        return line + data.count(b"\n", 0, at), NUL_FOUND
    return line, {TEXT: text}
