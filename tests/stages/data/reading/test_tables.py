import csv
import io
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.failures import InputFailure
from stages.data.reading import streams
from stages.data.reading.tables import Fields, read_arrow, read_csv, read_parquet, table_fields

PATH = Path("a.csv")
CELLS = st.text(st.sampled_from('ab ",\n\r\t;é\u2028😀\x00'), max_size=8)
STRINGS = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]


def everything(fields: Fields) -> list[str]:
    return [name for name, _ in fields]


def csv_rows(data: bytes, delimiter: str = ",", select: Any = everything) -> list[tuple[int, Any]]:
    return list(read_csv(io.BufferedReader(io.BytesIO(data)), PATH, delimiter, select))


@settings(max_examples=200, deadline=None)
@given(
    header=st.lists(CELLS, min_size=2, max_size=4, unique=True),
    rows=st.lists(st.lists(CELLS, min_size=4, max_size=4), max_size=5),
    delimiter=st.sampled_from(",\t"),
    line_end=st.sampled_from(["\n", "\r\n"]),
)
def test_csv_comes_back_as_it_was_written_with_its_lines(
    header: list[str], rows: list[list[str]], delimiter: str, line_end: str
) -> None:
    file = io.StringIO()
    quoting: Any = csv.QUOTE_ALL if line_end == "\n" else csv.QUOTE_MINIMAL  # which leaves "\r" bare before "\n"
    writer = csv.writer(file, delimiter=delimiter, lineterminator=line_end, quoting=quoting)
    writer.writerow(header)
    expected = []
    for row in rows:
        expected.append((file.getvalue().count("\n") + 1, dict(zip(header, row, strict=False))))
        writer.writerow(row[: len(header)])
    for mark in (b"", b"\xef\xbb\xbf"):
        assert csv_rows(mark + file.getvalue().encode(), delimiter) == expected


def test_a_tab_in_what_is_wrong_with_a_row_is_named_not_printed() -> None:
    (*_, (line, fault)) = csv_rows(b'a\tb\n"1"x\t2\n', delimiter="\t")
    assert (line, fault) == (2, "begins a row that is not CSV ('\\t' expected after '\"')")


def test_only_the_columns_wanted_are_in_a_csv_record() -> None:
    assert csv_rows(b"a,b,c\n\n1,2,3\n", select=lambda fields: ["c", "a"]) == [(3, {"c": "3", "a": "1"})]
    assert csv_rows(b"", select=everything) == []
    assert csv_rows(b"\n\n", select=everything) == []
    assert csv_rows(b"a,b", select=everything) == []


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (b"1\n", "begins a row of 1 fields, expected 2 as in the header"),
        (b"1,2,3\n", "begins a row of 3 fields"),
        (b'"1"x,2\n', "begins a row that is not CSV (',' expected after '\"')"),
        (b"1\r2,3\n", "begins a row that is not CSV (a carriage return outside quotes)"),
        (b"caf\xe9,2\n", "is not UTF-8 (byte 0xe9): convert the file first"),
    ],
)
def test_a_bad_row_of_csv_is_told_and_the_next_one_read(row: bytes, expected: str) -> None:
    (line, fault), good = csv_rows(b"a,b\n" + row + b"3,4\n")
    assert (line, fault[: len(expected)]) == (2, expected)
    assert good == (3, {"a": "3", "b": "4"})


def test_a_bad_byte_of_csv_is_named_by_its_own_line() -> None:
    bad, good = csv_rows(b'a,b\n"1\n\n\xff\n\xfe",2\n3,4\n')
    assert bad == (4, "is not UTF-8 (byte 0xff): convert the file first")
    assert good == (6, {"a": "3", "b": "4"})


def test_a_quote_that_is_never_closed_is_told() -> None:
    good, (line, fault) = csv_rows(b'a,b\n1,2\n"3,4\n5,6\n')
    assert good == (2, {"a": "1", "b": "2"})
    assert (line, fault) == (3, "begins a row that is not CSV (a quote is never closed)")


def test_a_row_may_not_be_longer_than_a_document(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_DOCUMENT", 1 << 17)
    field = b"x" * 50_000
    assert csv_rows(b"a,b\n" + field + b"," + field + b"\n")[0][1] == {"a": "x" * 50_000, "b": "x" * 50_000}
    for bad in (b'"' + b"x\n" * (1 << 20), b"x" * (1 << 20) + b"\n", b'"x\n",' * (1 << 20)):
        data = b"a,b\n1,2\n" + bad
        tracemalloc.start()
        try:
            good, (line, fault) = csv_rows(data)
            assert tracemalloc.get_traced_memory()[1] < 4 << 20
        finally:
            tracemalloc.stop()
        assert good == (2, {"a": "1", "b": "2"})
        assert (line, fault) == (
            3,
            "begins a row that is longer than 0.125 MiB: cut it into documents (is a quote never closed?); "
            "the rest of the file is left out",
        )


def test_a_csv_with_another_separator_is_not_taken_for_one_column() -> None:
    for data, delimiter in ((b"id;text\n1;a\n", ","), (b"id\ttext\n1\ta\n", ","), (b"id,text\n1,a\n", "\t")):
        with pytest.raises(
            InputFailure, match=r"a.csv has one column, 'id.*text': it looks separated by '.*', expected"
        ):
            csv_rows(data, delimiter)


def test_a_bad_header_ends_the_csv() -> None:
    assert csv_rows(b'a,"b\n1,2\n') == [(1, "begins a row that is not CSV (a quote is never closed)")]
    assert csv_rows(b"a,\xff\n1,2\n") == [(1, "is not UTF-8 (byte 0xff): convert the file first")]
    with pytest.raises(InputFailure, match="looks like UTF-16"):
        csv_rows("a,b\n1,2\n".encode("utf-16"))


def table(rows: int = 300, kind: Any = STRINGS[0]) -> Any:
    draw = random.Random(0)
    texts = [None if row == 5 else "é\n" * draw.randrange(20) + str(row) for row in range(rows)]
    return pa.table(
        {
            "other": pa.array([[row] for row in range(rows)]),
            "id": pa.array(range(rows), pa.int16()),
            "text": pa.array(texts).cast(kind) if kind != STRINGS[3] else pa.array(texts).dictionary_encode(),
        }
    )


def write_stream(content: Any, path: Path) -> None:
    with pa.ipc.new_stream(path, content.schema) as writer:
        writer.write_table(content, max_chunksize=70)


def write_file(content: Any, path: Path) -> None:
    with pa.ipc.new_file(path, content.schema) as writer:
        writer.write_table(content, max_chunksize=70)


ARROW: dict[str, Callable[[Any, Path], None]] = {
    "stream": write_stream,
    "file": write_file,
    "feather": lambda content, path: feather.write_feather(content, str(path), chunksize=70),
    "feather, zstd": lambda content, path: feather.write_feather(content, str(path), compression="zstd"),
}
PARQUET: dict[str, Callable[[Any, Path], None]] = {
    "parquet": lambda content, path: pq.write_table(content, path),
    "parquet, groups": lambda content, path: pq.write_table(content, path, row_group_size=70, compression="zstd"),
    "parquet, plain": lambda content, path: pq.write_table(content, path, use_dictionary=False, store_schema=False),
}


def rows_of(path: Path, how: str, select: Any = lambda fields: ["text", "id"]) -> list[tuple[int, Any]]:
    return list(read_arrow(path, select) if how in ARROW else read_parquet(path, select, 0, None, 1))


@pytest.mark.parametrize("kind", STRINGS, ids=str)
@pytest.mark.parametrize("how", [*ARROW, *PARQUET])
def test_tables_come_back_row_by_row(tmp_path: Path, how: str, kind: Any) -> None:
    if "parquet, plain" in how and kind == STRINGS[2]:
        kind = STRINGS[0]  # a schema that is not stored has no views
    content = table(kind=kind)
    (ARROW | PARQUET)[how](content, tmp_path / "a")
    wanted = content.select(["text", "id"]).to_pylist()
    assert rows_of(tmp_path / "a", how) == list(enumerate(wanted, 1))
    fields = table_fields(tmp_path / "a", "arrow" if how in ARROW else "parquet")
    assert [name for name, _ in fields] == ["other", "id", "text"]
    assert fields[1:] == [("id", "integer"), ("text", "string")]


@pytest.mark.parametrize("how", [*ARROW, *PARQUET])
def test_a_table_without_rows_has_its_columns_all_the_same(tmp_path: Path, how: str) -> None:
    (ARROW | PARQUET)[how](table().slice(0, 0), tmp_path / "a")
    seen: list[Any] = []

    def seeing(fields: Fields) -> list[str]:
        seen.extend(fields)
        return ["text"]

    assert rows_of(tmp_path / "a", how, seeing) == []
    assert [name for name, _ in seen] == ["other", "id", "text"]


def test_row_groups_are_read_as_asked(tmp_path: Path) -> None:
    pq.write_table(table(), tmp_path / "a", row_group_size=70)
    whole = rows_of(tmp_path / "a", "parquet")
    for first in range(6):
        for stop in (*range(first, 6), None):
            rows = list(read_parquet(tmp_path / "a", lambda fields: ["text", "id"], first, stop, first * 70 + 1))
            assert rows == whole[first * 70 : None if stop is None else stop * 70]


@pytest.mark.parametrize("how", ["stream", "file", "parquet"])
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()], ids=str)
def test_a_row_that_is_no_text_is_told_and_the_next_one_read(tmp_path: Path, how: str, kind: Any) -> None:
    binary = pa.array([b"a", b"caf\xe9", b"c"], pa.large_binary() if kind == pa.large_string() else pa.binary())
    (ARROW | PARQUET)[how](pa.table({"text": pa.Array.from_buffers(kind, 3, binary.buffers())}), tmp_path / "a")
    assert rows_of(tmp_path / "a", how, everything) == [
        (1, {"text": "a"}), (2, "is not UTF-8 (byte 0xe9): convert the file first"), (3, {"text": "c"}),
    ]  # fmt: skip


@pytest.mark.parametrize("how", ["stream", "file", "parquet"])
@pytest.mark.parametrize("kind", [STRINGS[0], STRINGS[3]], ids=str)
def test_a_row_longer_than_a_document_is_left_out(
    tmp_path: Path, how: str, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "MAX_DOCUMENT", 1 << 20)
    (ARROW | PARQUET)[how](pa.table({"text": pa.array(["a", "b" * (2 << 20)]).cast(kind)}), tmp_path / "a")
    assert rows_of(tmp_path / "a", how, everything) == [
        (1, {"text": "a"}), (2, "is longer than 1 MiB: cut it into documents"),
    ]  # fmt: skip


def test_equal_long_strings_are_not_held_side_by_side(tmp_path: Path) -> None:
    text = pa.array(["b" * (1 << 20)] * 60).dictionary_encode()
    write_file(pa.table({"text": text}), tmp_path / "a")
    tracemalloc.start()
    try:
        assert sum(len(row["text"]) for _, row in read_arrow(tmp_path / "a", everything)) == 60 << 20  # type: ignore[index, misc]
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([None]), "null"),
        (pa.array([1.5]), "double"),
        (pa.array([True]), "bool"),
        (pa.array([b"a"]), "binary"),
        (pa.array([["a"]]), "list<element: string>"),
        (pa.array([{"x" * 100: 1}]), "struct<" + "x" * 53),
        (pa.array([{"a\nb": 1}]), "'struct<a\\nb: int64>'"),
        (pa.array([1]).dictionary_encode(), "integer"),
        (pa.array([b"a"]).dictionary_encode(), "binary"),
    ],
)
def test_columns_of_other_types_are_told_by_their_types(tmp_path: Path, column: Any, expected: str) -> None:
    pq.write_table(pa.table({"a": column}), tmp_path / "a")
    write_file(pa.table({"a": column}), tmp_path / "b")
    assert table_fields(tmp_path / "a", "parquet") == [("a", expected)]
    assert table_fields(tmp_path / "b", "arrow") == [("a", expected.replace("element", "item"))]


def failure(path: Path, how: str) -> tuple[int, str]:
    """How many rows are read before the file is refused, and why it is."""
    rows = 0
    with pytest.raises(InputFailure) as found:
        for _ in read_arrow(path, everything) if how in ARROW else read_parquet(path, everything, 0, None, 1):
            rows += 1
    assert "\n" not in str(found.value)
    return rows, str(found.value)


@pytest.mark.parametrize("how", [*ARROW, *PARQUET])
def test_a_table_cut_short_is_refused_wherever_it_is_cut(tmp_path: Path, how: str) -> None:
    (ARROW | PARQUET)[how](table().select(["id", "text"]), tmp_path / "whole")
    data = (tmp_path / "whole").read_bytes()
    for length in sorted({*range(0, len(data), len(data) // 30), *range(len(data) - 20, len(data))}):
        (tmp_path / "a").write_bytes(data[:length])
        failure(tmp_path / "a", how)


def test_a_stream_cut_between_two_batches_is_refused_after_them(tmp_path: Path) -> None:
    write_stream(table(70).select(["id", "text"]), tmp_path / "a")
    data = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(data[:-8])
    assert failure(tmp_path / "a", "stream") == (
        70, f"{tmp_path / 'a'} has no end mark, which an Arrow stream has: it may have been cut short"
    )  # fmt: skip
    (tmp_path / "a").write_bytes(data + data)
    rows, why = failure(tmp_path / "a", "stream")
    assert (rows, why) == (70, f"{tmp_path / 'a'} holds {len(data)} bytes after the end of its Arrow stream")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "cannot be read: it is empty, which no Arrow file is"),
        (b"FEA1 and more", "is Feather of version 1, expected version 2: write it again"),
        (b"ARROW1 nonsense", "cannot be read: "),
        (b"plain text, no arrow", "cannot be read: "),
        (bytes(100), "cannot be read: "),
    ],
)
def test_what_is_no_arrow_is_refused(tmp_path: Path, data: bytes, expected: str) -> None:
    (tmp_path / "a").write_bytes(data)
    assert failure(tmp_path / "a", "file")[1].startswith(f"{tmp_path / 'a'} {expected}")
    with pytest.raises(InputFailure, match="a "):
        table_fields(tmp_path / "a", "arrow")


def test_offsets_that_point_outside_are_found_before_they_are_followed(tmp_path: Path) -> None:
    column = pa.array(["abc", "def"])
    offsets = pa.py_buffer(b"".join(number.to_bytes(4, "little") for number in (0, 1 << 30, 6)))
    wild = pa.Array.from_buffers(pa.string(), 2, [None, offsets, column.buffers()[2]])
    for write in (write_file, write_stream):
        write(pa.table({"text": wild}), tmp_path / "a")
        assert "cannot be read: " in failure(tmp_path / "a", "file")[1]
    indices = pa.DictionaryArray.from_arrays(pa.array([0, 7], pa.int32()), column, safe=False)
    write_file(pa.table({"text": indices}), tmp_path / "a")
    assert "cannot be read: " in failure(tmp_path / "a", "file")[1]


@settings(max_examples=150, deadline=None)
@given(
    how=st.sampled_from([*ARROW, *PARQUET]),
    changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=4),
    cut=st.integers(0, 10**6) | st.none(),
)
def test_any_bytes_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, how: str, changes: list[tuple[int, int]], cut: int | None
) -> None:
    path = tmp_path_factory.mktemp("any") / "a"
    (ARROW | PARQUET)[how](table(20).select(["id", "text"]), path)
    data = bytearray(path.read_bytes())
    for place, byte in changes:
        data[place % len(data)] = byte
    path.write_bytes(data if cut is None else data[: cut % len(data)])
    try:
        for row, record in read_arrow(path, everything) if how in ARROW else read_parquet(path, everything, 0, None, 1):
            assert row > 0
            assert isinstance(record, dict | str)
    except InputFailure as found:
        assert "\n" not in str(found)
