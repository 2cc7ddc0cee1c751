import io
import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.data.reading import records, streams
from stages.data.reading.records import is_json_lines, read_json, read_json_lines

NAN = float("nan")
PATH = Path("a.json")
KEYS = st.sampled_from(["text", "id", 'q"', "\\", "é"])
STRINGS = st.text(st.sampled_from('ab "\\{}[],:\né\u2028😀\x00'), max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | STRINGS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.lists(st.dictionaries(KEYS, VALUES, max_size=4), max_size=6)
SPACES = st.text(st.sampled_from(" \n\r\t"), max_size=4)


@pytest.fixture(params=[1, 2, 7, 50, 1 << 20])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Read on by so many bytes, so that an element is cut everywhere."""
    set_blocks(monkeypatch, request.param)
    return request.param


def set_blocks(patch: pytest.MonkeyPatch, size: int) -> None:
    patch.setattr(streams, "BLOCK", size)
    patch.setattr(streams, "PIECE", min(size, 3))


def elements(data: bytes) -> list[tuple[int, Any]]:
    return list(read_json(io.BufferedReader(io.BytesIO(data)), PATH))


def json_lines(data: bytes, first: int = 1) -> list[tuple[int, Any]]:
    return list(read_json_lines(io.BufferedReader(io.BytesIO(data)), PATH, first))


@settings(max_examples=120, deadline=None)
@given(
    objects=OBJECTS,
    layout=st.sampled_from(["array", "one after another"]),
    indent=st.sampled_from([None, 0, 2]),
    ascii_only=st.booleans(),
    spaces=st.lists(SPACES, min_size=20, max_size=20),
    size=st.integers(1, 30),
)
def test_elements_come_back_with_their_lines_however_they_are_laid_out(
    objects: list[Any], layout: str, indent: int | None, ascii_only: bool, spaces: list[str], size: int
) -> None:
    space: Iterator[str] = iter(spaces)
    text, expected = next(space) + ("[" if layout == "array" else ""), []
    for number, value in enumerate(objects):
        text += ("," if number and layout == "array" else "") + next(space)
        expected.append((text.count("\n") + 1, value))
        text += json.dumps(value, indent=indent, ensure_ascii=ascii_only) + next(space)
    text += "]" if layout == "array" else ""
    with pytest.MonkeyPatch.context() as patch:
        set_blocks(patch, size)
        assert elements(text.encode()) == expected
        assert elements(b"\xef\xbb\xbf" + text.encode()) == expected


@settings(max_examples=120, deadline=None)
@given(value=VALUES, indent=st.sampled_from([None, 2]), cut=st.integers(0, 200), size=st.integers(1, 30))
def test_a_file_cut_inside_an_element_gives_the_elements_before_and_says_so(
    value: Any, indent: int | None, cut: int, size: int
) -> None:
    last = json.dumps({"text": value}, indent=indent)
    text = '[{"n": 1},\n' + last[: cut % len(last)]
    with pytest.MonkeyPatch.context() as patch:
        set_blocks(patch, size)
        good, (line, fault) = elements(text.encode())
    assert good == (1, {"n": 1})
    assert line == 2
    assert (
        "(was the file cut short?)" in fault if cut % len(last) else "the end of the file (was it cut short?)" in fault
    )


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", []),
        (b" \n", []),
        (b"[]", []),
        (b"[ ]\n", []),
        (b"{}", [(1, {})]),
        (b'[1,\n"a",null, {}, true, -1.5e3, [{}]]', [
            (1, "holds a int, expected a JSON object"), (2, "holds a str, expected a JSON object"),
            (2, "holds null, expected a JSON object"), (2, {}), (2, "holds a bool, expected a JSON object"),
            (2, "holds a float, expected a JSON object"), (2, "holds a list, expected a JSON object"),
        ]),
        (b'1 {}', [(1, "holds a int, expected a JSON object"), (1, {})]),
        (b'[{"a": NaN}, {"a": "\\ud800"}]', [(1, {"a": pytest.approx(NAN, nan_ok=True)}), (1, {"a": "\ud800"})]),
        (b'{"a": 1, "a": 2}{"a": 3}', [(1, {"a": 2}), (1, {"a": 3})]),
    ],
)  # fmt: skip
def test_all_values_are_elements(blocks: int, data: bytes, expected: list[Any]) -> None:
    assert elements(data) == expected


@pytest.mark.parametrize(
    ("data", "line", "expected"),
    [
        (b"]", 2, "holds ']', expected a JSON object"),
        (b"{", 2, "begins an element without an end"),
        (b'{"a": }', 2, "is not JSON (Expecting value at column 7)"),
        (b'{"a": 1,\n\n"b": 01}', 4, "is not JSON (Expecting ',' delimiter at column 7)"),
        (b'{"a": "\n"}', 2, "is not JSON (Invalid control character at at column 8)"),
        (b'{"a": "caf\xe9"}', 2, "is not UTF-8 (byte 0xe9): convert the file first"),
        (b'{"a":\n"caf\xe9"}', 3, "is not UTF-8 (byte 0xe9)"),
        (b"nul", 2, "is not JSON (Expecting value at column 1)"),
        (b"\x00", 2, "is not JSON"),
        (b"\xe9", 2, "is not UTF-8 (byte 0xe9)"),
        (b"{" * 10_000 + b"}" * 10_000, 2, "is not JSON"),
        (b'{"a": ' * 10_000 + b"1" + b"}" * 10_000, 2, "is not JSON (maximum recursion depth"),
        (b"9" * 5000, 2, "is not JSON (Exceeds the limit"),
        (b'{"a": [}', 2, "begins an element without an end"),
        (b'{"a": ]}', 2, "is not JSON"),
    ],
)
def test_a_broken_element_ends_the_file(blocks: int, data: bytes, line: int, expected: str) -> None:
    for before, after in ((b"[{}, \n", b", {}]"), (b"{}\n", b" {}")):
        if "without an end" in expected:
            after = b""
        good, (found, fault) = elements(before + data + after)
        assert good == (1, {})
        assert fault.startswith(expected)
        assert fault.endswith("; the rest of the file is left out")
        assert found == line


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"[{}", "holds the end of the file (was it cut short?), expected a comma or the end of the array"),
        (b"[{},", "holds the end of the file (was it cut short?), expected a JSON object"),
        (b"[{} {}]", "holds '{', expected a comma or the end of the array"),
        (b"[{},]", "holds ']', expected a JSON object"),
        (b"[{}]\n{}", "holds '{' after the end of the array"),
        (b"[{}}", "holds '}', expected a comma or the end of the array"),
        (b"{},{}", "holds ',', expected a JSON object"),
        (b"{}]", "holds ']', expected a JSON object"),
    ],
)
def test_a_broken_array_is_told(blocks: int, data: bytes, expected: str) -> None:
    good, (line, fault) = elements(data)
    assert good == (1, {})
    assert fault == f"{expected}; the rest of the file is left out"
    assert line == data.count(b"\n") + 1


def test_an_element_may_not_be_longer_than_a_document(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_DOCUMENT", 1 << 20)
    monkeypatch.setattr(streams, "BLOCK", 1 << 16)
    text = json.dumps({"text": "a" * ((1 << 20) - 100)}).encode()
    assert [type(found) for _, found in elements(text + b" " + text)] == [dict, dict]
    data = b'[{},\n{"text": "' + b"a" * (8 << 20)
    tracemalloc.start()
    try:
        _, (line, fault) = elements(data)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert (line, fault) == (
        2,
        "begins an element that is longer than 1 MiB: cut it into documents; the rest of the file is left out",
    )
    for nested in (b"[" * (8 << 20), b"[[" + b"1," * (4 << 20), b"1" * (8 << 20)):
        assert "begins an element that is longer than 1 MiB" in elements(b"[{},\n" + nested)[1][1]


def test_a_long_element_is_passed_over_a_few_times_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "BLOCK", 256)
    searched = 0
    string_end = records._string_end

    def counting(data: bytearray, start: int) -> int:
        nonlocal searched
        searched += len(data) - start
        return string_end(data, start)

    monkeypatch.setattr(records, "_string_end", counting)
    data = json.dumps({"a": "x" * (1 << 20)}).encode()
    assert elements(data)[0][1] == json.loads(data)
    assert searched < 4 * len(data)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'{"text": "a"}', True),
        (b'{"text": "a"}\n{"text": "b"}\n', True),
        (b'\xef\xbb\xbf \n\n  {"text": NaN}  \n', True),
        (b'{"text": "a"}\nrubbish', True),
        (b'{"text": "' + b"a" * 100 + b'"}\n', True),
        (b"", False),
        (b"\n", False),
        (b'{\n"text": "a"}', False),
        (b'{"text": "a"} {"text": "b"}\n', False),
        (b'{"text": "caf\xe9"}\n', False),
        (b'[{"text": "a"}]\n', False),
        (b"1\n{}\n", False),
        (b"\xff\xfe{\x00}\x00", False),
    ],
)
def test_json_lines_are_known_by_their_first_line(data: bytes, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (4, 1 << 20):
        monkeypatch.setattr(streams, "BLOCK", size)
        assert is_json_lines(io.BufferedReader(io.BytesIO(data))) is expected


def test_lines_give_one_record_each_whatever_the_others_hold() -> None:
    data = b'\xef\xbb\xbf{"text": "a"}\n\n[1]\n  \r\n{"n": NaN, "text": "b"}\r\n{"text": "caf\xe9"}\n{"a": 1, "a": 2}'
    assert [(line, str(found)) for line, found in json_lines(data)] == [
        (1, "{'text': 'a'}"),
        (3, "holds a list, expected a JSON object"),
        (5, "{'n': nan, 'text': 'b'}"),
        (6, "is not UTF-8 (byte 0xe9): convert the file first"),
        (7, "{'a': 2}"),
    ]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'{"text": "cut', "is not JSON (Unterminated string starting at at column 10); one object a line is expected"),
        (b"\xef\xbb\xbf{}", "is not JSON (Unexpected UTF-8 BOM"),
        (b"{\x00}", "is not JSON (Expecting property name"),
        (b'"\\ud800"', "holds a str, expected a JSON object"),
        (b"null", "holds null, expected a JSON object"),
        (b"[" * 100_000, "is not JSON (maximum recursion depth exceeded"),
        (b'{"n": ' + b"9" * 5000 + b"}", "is not JSON (Exceeds the limit"),
        (b"{} {}", "is not JSON (Extra data at column 4)"),
    ],
)
def test_a_bad_line_is_told_and_the_next_one_read(data: bytes, expected: str) -> None:
    (line, fault), good = json_lines(data + b"\n{}", first=7)
    assert line == 7
    assert fault.startswith(expected)
    assert good == (8, {})


def test_a_line_longer_than_a_document_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_DOCUMENT", 16)
    data = b'{"a": 1}\n{"a": "' + b"a" * 100 + b'"}\n{"a": 2}\n'
    assert json_lines(data) == [
        (1, {"a": 1}), (2, "is longer than 1.52588e-05 MiB: cut it into documents"), (3, {"a": 2}),
    ]  # fmt: skip
