"""The bytes of a text file: decompressed, in bounded memory, with every fault of the file told in one line.

- gzip and zstd go through Arrow's codecs, which report a stream cut short and go on with the next member; Arrow's bzip2
  fails on an empty member, and the standard library's file objects take rubbish, or the padding of an xz file, for the
  end of it: so these two are decoded here, member by member
- decompression is in pieces, so what is held does not depend on how far a small file unfolds
- what a reader is given before a fault ends at most `PIECE` bytes before it
"""

import bz2
import io
import lzma
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from schemas.failures import InputFailure

ARROW_CODECS = {"gz": "gzip", "zst": "zstd"}
MAX_DOCUMENT = 256 << 20  # bytes of a line, a record or a text held at once
PIECE = 1 << 14  # bytes decompressed at a time: less is slower, more loses more before a fault
BLOCK = 1 << 20  # bytes read at a time from files that are not compressed
XZ_MEMORY = 160 << 20  # dictionaries of 128 MiB, as zstd's decoder allows its windows
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
MARK = 4  # bytes of the longest one
FAULTS = (OSError, EOFError, lzma.LZMAError, pa.ArrowException)  # of a file while it is read
OTHER_MARKS = {"UTF-32": (b"\xff\xfe\0\0", b"\0\0\xfe\xff"), "UTF-16": (b"\xff\xfe", b"\xfe\xff")}  # longest first


def shown(path: Path | str) -> str:
    """A path on one line, whatever characters it holds."""
    return str(path) if str(path).isprintable() else repr(str(path))


@contextmanager
def opened(path: Path, codec: str | None) -> Iterator[io.BufferedReader]:
    """The bytes of `path`, decompressed; `codec` is "gz", "zst", "bz2", "xz" or None.

    Memory: a block of the file, and the decoder's (32 KiB for gz, 4 MiB for bz2, 128 MiB at most for zst and xz).
    Raises InputFailure, also while the bytes are read: for a file that cannot be opened, is no such stream, is cut
    short, has bytes after its end, or asks for a larger window.
    """
    with translated(path):
        if codec is None:
            plain: Any = path.open("rb", buffering=BLOCK)
            with plain:
                yield plain
            return
        if path.stat().st_size == 0:
            raise EOFError(f"it is empty, which no .{codec} file is")
        if codec in ARROW_CODECS:
            with pa.input_stream(str(path), compression=ARROW_CODECS[codec]) as stream:
                yield io.BufferedReader(stream, PIECE)
        else:
            with path.open("rb", buffering=0) as file:
                yield io.BufferedReader(_Members(file, codec), PIECE)


@contextmanager
def translated(path: Path, *others: type[Exception]) -> Iterator[None]:
    """Turn `FAULTS` of `path`, and `others` that are its fault here, into an InputFailure of one line."""
    try:
        yield
    except (*FAULTS, *others) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
        raise InputFailure(f"{shown(path)} cannot be read: {' '.join(reason.split())}") from error


class _Members(io.RawIOBase):
    """The data of a bz2 or xz file of one member or several.

    Members of xz, there called streams, may have padding between and after them, NULs, a multiple of four:
    https://tukaani.org/xz/xz-file-format.txt, section 2.2.
    """

    def __init__(self, file: Any, codec: str) -> None:
        self._file = file
        self._padded = codec == "xz"
        self._input = b""  # read and not yet given to the decoder
        self._decoder: bz2.BZ2Decompressor | lzma.LZMADecompressor | None = self._new_decoder()

    def _new_decoder(self) -> bz2.BZ2Decompressor | lzma.LZMADecompressor:
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY) if self._padded else bz2.BZ2Decompressor()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = len(memoryview(buffer))
        while self._decoder or self._next_member():
            if data := self._decode(size):
                buffer[: len(data)] = data
                return len(data)
        return 0

    def _decode(self, size: int) -> bytes:
        assert self._decoder
        if self._decoder.needs_input and not self._input:
            self._input = self._file.read(PIECE)
            if not self._input:
                raise EOFError("Truncated compressed stream")
        data = self._decoder.decompress(self._input, max_length=size)
        self._input = b""
        if self._decoder.eof:
            self._input = self._decoder.unused_data
            self._decoder = None
        return data

    def _next_member(self) -> bool:
        """Skip padding; whether another member begins behind it."""
        padding = 0
        while True:
            rest = self._input.lstrip(b"\0") if self._padded else self._input
            padding += len(self._input) - len(rest)
            self._input = rest or self._file.read(PIECE)
            if rest or not self._input:
                break
        if padding % 4:
            raise lzma.LZMAError(f"{padding} bytes of padding, expected a multiple of four")
        if rest:
            self._decoder = self._new_decoder()
        return bool(rest)


def lines(stream: BinaryIO, first: int = 1, size: int | None = None) -> Iterator[tuple[int, bytes | None]]:
    r"""The lines that begin in the next `size` bytes, with their ends (`\n`) and their numbers from `first` on.

    A line longer than `MAX_DOCUMENT` comes as None: its end is skipped in pieces. Memory: twice `MAX_DOCUMENT`.
    """
    number = first
    left = -1 if size is None else size
    while left and (line := stream.readline(MAX_DOCUMENT + 1)):
        taken = len(line)
        if taken > MAX_DOCUMENT:
            piece = line
            line = b""  # let go of it
            while not piece.endswith(b"\n") and (piece := stream.readline(BLOCK)):
                taken += len(piece)
            yield number, None
        else:
            yield number, line
        number += 1
        left = max(left - taken, 0) if size is not None else left


def start_of_text(data: bytes, path: Path) -> bytes:
    """The first bytes of a text without a byte order mark. Raises InputFailure for that of UTF-16 or UTF-32."""
    for name, marks in OTHER_MARKS.items():
        if data.startswith(marks):
            raise InputFailure(f"{shown(path)} looks like {name}, expected UTF-8: convert it, as with iconv")
    return data.removeprefix(BYTE_ORDER_MARK)
