import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.failures import InputFailure
from stages.data.reading import streams
from stages.data.reading.texts import read_blocks, read_text_lines, read_whole

PATH = Path("a.txt")
Reader = Callable[..., Any]


def read(reader: Reader, data: bytes) -> list[tuple[int, Any]]:
    """Texts, or faults, with their lines."""
    found = reader(io.BufferedReader(io.BytesIO(data)), PATH)
    return [(line, record["text"] if isinstance(record, dict) else (record,)) for line, record in found]


def test_a_whole_file_is_one_document_with_every_character() -> None:
    text = "  one\r\n\ntwo\u2028three\n"
    assert read(read_whole, text.encode()) == [(1, text)]
    assert read(read_whole, b"\xef\xbb\xbf\xef\xbb\xbfx") == [(1, "\ufeffx")]
    assert read(read_whole, b"") == [(1, "")]


def test_every_line_is_a_document() -> None:
    data = b"\xef\xbb\xbfone\r\n\n two \x0b\n\r\r\nfour\r"
    assert read(read_text_lines, data) == [(1, "one"), (2, ""), (3, " two \x0b"), (4, "\r"), (5, "four\r")]
    assert read(read_text_lines, b"a\n") == [(1, "a")]
    assert read(read_text_lines, b"") == []


def test_blocks_stand_between_blank_lines() -> None:
    data = b"\xef\xbb\xbf\n\n  one\r\n two\n \t\r\n\n\nthree\r\n\r\nfour\n\nfive"
    assert read(read_blocks, data) == [(3, "  one\r\n two"), (8, "three"), (10, "four"), (12, "five")]
    assert read(read_blocks, b"") == []
    assert read(read_blocks, b" \n\n") == []


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.sampled_from("ab\n\r \té\u2028")))
def test_blocks_are_what_a_pattern_finds(text: str) -> None:
    found = re.finditer(r"(?:^[^\n]*[^ \t\r\n][^\n]*(?:\n|\Z))+", text, re.MULTILINE)
    expected = [(text.count("\n", 0, block.start()) + 1, re.sub(r"\r?\n\Z", "", block.group())) for block in found]
    assert read(read_blocks, text.encode()) == expected


@pytest.mark.parametrize("reader", [read_blocks, read_text_lines])
@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (b"\xff", "is not UTF-8 (byte 0xff): convert the file first"),
        (b"a\xc3", "is not UTF-8 (byte 0xc3): convert the file first"),
        (b"a\x00b", "holds a NUL byte, which no text does: is the file binary, or UTF-16?"),
    ],
)
def test_what_is_no_text_is_told_and_the_next_document_read(reader: Reader, bad: bytes, expected: str) -> None:
    found = [document for document in read(reader, b"one\n\n" + bad + b"\n\nfive\n") if document[1]]
    assert found == [(1, "one"), (3, (expected,)), (5, "five")]


@pytest.mark.parametrize("reader", [read_blocks, read_whole])
@pytest.mark.parametrize(("bad", "expected"), [(b"\xff", "is not UTF-8 (byte 0xff)"), (b"\x00", "holds a NUL byte")])
def test_a_bad_byte_is_named_by_its_line(reader: Reader, bad: bytes, expected: str) -> None:
    ((line, (fault,)),) = read(reader, b"one\ntwo\n" + bad + b"\n" + bad)
    assert line == 3
    assert fault.startswith(expected)


@pytest.mark.parametrize("reader", [read_whole, read_blocks, read_text_lines])
def test_utf_16_is_refused(reader: Reader) -> None:
    with pytest.raises(InputFailure, match=r"a\.txt looks like UTF-16"):
        read(reader, "text\n".encode("utf-16"))


@pytest.mark.parametrize("reader", [read_blocks, read_text_lines])
@pytest.mark.parametrize(("block", "first"), [(b"a" * 9, 3), (b"a" * 9 + b"\nbb", 3)])
def test_a_document_that_is_too_long_is_left_out(
    reader: Reader, block: bytes, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "MAX_DOCUMENT", 8)
    found = read(reader, b"one\n\n" + block + b"\n\nlast")
    assert found[0] == (1, "one")
    assert found[-1][1] == "last"
    assert [(line, "is longer than" in text[0]) for line, text in found if isinstance(text, tuple)] == [(first, True)]


def test_a_block_of_many_lines_may_not_be_longer_than_a_document(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_DOCUMENT", 8)
    assert read(read_blocks, b"aaa\nbbb\n\ncc\n") == [(1, "aaa\nbbb"), (4, "cc")]
    (line, (fault,)), last = read(read_blocks, b"aaa\nbbb\nc\nd\n\ncc\n")
    assert line == 1
    assert fault.startswith("begins a block that is longer than")
    assert last == (6, "cc")


def test_a_file_that_is_too_long_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_DOCUMENT", 8)
    assert read(read_whole, b"12345678") == [(1, "12345678")]
    ((line, (fault,)),) = read(read_whole, b"123456789")
    assert (line, fault[:14]) == (1, "is longer than")
