import bz2
import csv
import gzip
import io
import json
import lzma
import random
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.failures import InputFailure
from stages.data.reading import streams
from stages.data.reading.readers import Columns, Document, Rejected, Span, guess_text_column, read_documents
from stages.data.reading.sources import Kind, TextFile, find_files

NAMED = {"text": "text {} é\r\n<|endoftext|>", "id": "n{}", "source": "web", "other": "a,b\n"}
RECORDS = [{key: value.format(number) for key, value in NAMED.items()} for number in range(200)]
DOCUMENTS = [(record["id"], record["source"], record["text"]) for record in RECORDS]


def lines(*records: Any) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def separated(delimiter: str) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(NAMED), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(RECORDS)
    return file.getvalue().encode()


def stream() -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, pa.Table.from_pylist(RECORDS).schema) as writer:
        writer.write_table(pa.Table.from_pylist(RECORDS))
    return sink.getvalue()


def written(write: Callable[[Any, Any], None]) -> bytes:
    sink = io.BytesIO()
    write(pa.Table.from_pylist(RECORDS), sink)
    return sink.getvalue()


TEXTS = {
    "a.jsonl": lines(*RECORDS),
    "a.ndjson": b"\xef\xbb\xbf" + lines(*RECORDS),
    "lines.json": lines(*RECORDS),
    "array.json": json.dumps(RECORDS).encode(),
    "pretty.json": json.dumps(RECORDS, indent=2, ensure_ascii=False).encode(),
    "many.json": "".join(json.dumps(record, indent=2) for record in RECORDS).encode(),
    "a.csv": separated(","),
    "a.tsv": separated("\t"),
}
TABLES = {
    "a.parquet": written(pq.write_table),
    "a.feather": written(feather.write_feather),
    "a.arrow": stream(),
}
CODECS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
    ".bz2": lambda data: bz2.compress(data, 1),
    ".xz": lambda data: lzma.compress(data, preset=0),
}


def write(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def read(
    path: Path, how: Literal["file", "block", "line"] = "file", span: Span | None = None, **columns: str
) -> list[Document | Rejected]:
    found = find_files([str(path)])
    return [
        document
        for file in found
        for document in read_documents(file, Columns(**columns), how, Span() if span is None else span)
    ]


def documents(path: Path, **columns: Any) -> list[Document]:
    found = read(path, **columns)
    assert all(isinstance(document, Document) for document in found), found
    return found  # type: ignore[return-value]


def rejection(path: Path, **columns: Any) -> Rejected:
    """The one thing found, which is no document."""
    (found,) = read(path, **columns)
    assert isinstance(found, Rejected)
    assert "\n" not in found.message
    assert str(path) in found.message
    assert found.file == path.name
    return found


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("name", TEXTS)
def test_every_format_of_text_in_every_codec_gives_the_same_documents(tmp_path: Path, name: str, codec: str) -> None:
    found = documents(write(tmp_path, name + codec, CODECS[codec](TEXTS[name])))
    assert [(document.id, document.source, document.text) for document in found] == DOCUMENTS
    assert {document.size - len(document.text) for document in found} == {1}
    assert [document.group for document in found] == [document.id for document in found]


@pytest.mark.parametrize("name", TABLES)
def test_every_format_of_tables_gives_the_same_documents(tmp_path: Path, name: str) -> None:
    found = documents(write(tmp_path, name, TABLES[name]))
    assert [(document.id, document.source, document.text) for document in found] == DOCUMENTS
    assert [document.line for document in found] == list(range(1, 201))


@pytest.mark.parametrize("name", TEXTS | TABLES)
def test_documents_without_names_are_named_by_file_and_place(tmp_path: Path, name: str) -> None:
    found = documents(write(tmp_path, name, (TEXTS | TABLES)[name]), id="-")
    number = range(1, 201) if name in ("array.json", "pretty.json", "many.json") else [doc.line for doc in found]
    assert [document.id for document in found] == [f"{name}:{place}" for place in number]
    assert len({document.id for document in found}) == 200


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("how", ["file", "block", "line"])
def test_text_files_in_every_codec(tmp_path: Path, codec: str, how: Any) -> None:
    path = write(tmp_path, f"notes v1.md{codec}", CODECS[codec](b"one\r\ntwo\n\nthree\n"))
    texts = {"file": ["one\r\ntwo\n\nthree\n"], "block": ["one\r\ntwo", "three"], "line": ["one", "two", "", "three"]}
    ids = {"file": [""], "block": [":1", ":4"], "line": [":1", ":2", ":3", ":4"]}
    starts = {"file": [1], "block": [1, 4], "line": [1, 2, 3, 4]}
    assert read(path, how) == [
        Document(path.name + name, "notes v1", path.name + name, text, len(text), line)
        for text, name, line in zip(texts[how], ids[how], starts[how], strict=True)
    ]


@pytest.mark.parametrize("codec", list(CODECS)[1:])
@pytest.mark.parametrize("name", ["a.jsonl", "array.json", "a.csv", "a.txt"])
def test_documents_well_before_a_cut_are_read_and_the_cut_is_told(tmp_path: Path, name: str, codec: str) -> None:
    draw = random.Random(0)
    records = [{"id": str(number), "text": draw.randbytes(5_000).hex()} for number in range(40)]
    plain = lines(*records) if name != "array.json" else json.dumps(records).encode()
    if name == "a.csv":
        plain = b"id,text\n" + b"".join(f"{record['id']},{record['text']}\n".encode() for record in records)
    data = CODECS[codec](plain)
    whole = documents(write(tmp_path, name + codec, data))
    for cut in (len(data) // 10, len(data) * 2 // 3, len(data) - 1):
        *found, last = read(write(tmp_path, name + codec, data[:cut]))
        assert isinstance(last, Rejected)
        assert last == Rejected(name + codec, None, last.message)
        assert last.message.startswith(f"{tmp_path / name}{codec} cannot be read: ")
        assert found == whole[: len(found)]
        if name != "a.txt":
            assert len(found) >= 0.9 * 40 * cut / len(data) - 12  # bz2 decodes 100 kB at once: ten documents


def test_a_bomb_is_read_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_DOCUMENT", 1 << 20)
    bomb = gzip.compress(b" " * (8 << 20)) * 8
    for name in ("a.jsonl", "a.json", "a.csv", "a.txt"):
        head = {"a.json": b'[{"text": "', "a.csv": b'text,id\n"', "a.jsonl": b'{"text": "'}.get(name, b"")
        path = write(tmp_path, f"{name}.gz", gzip.compress(head) + bomb)
        for how in ("file", "block", "line") if name == "a.txt" else ("file",):
            tracemalloc.start()
            try:
                (found,) = read(path, how, text="text")
                assert tracemalloc.get_traced_memory()[1] < 8 << 20
            finally:
                tracemalloc.stop()
            assert isinstance(found, Rejected)
            assert "is longer than 1 MiB" in found.message


LINES = (
    b'\xef\xbb\xbf{"text": "a"}\n\n{"text": "b"}\r\n{"text": 3}\n  \n{"text": "caf\xe9"}\n[]\n'
    b'{"text": "c", "id": "x"}\n{"text": "\\u00e9"}\n{"text": "last"}'
)


def test_spans_of_lines_give_together_what_the_whole_gives(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", LINES)
    whole = read(path)
    assert [document.line for document in whole] == [1, 3, 4, 6, 7, 8, 9, 10]
    borders = [0, *(place + 1 for place, byte in enumerate(LINES) if byte == 10), len(LINES)]
    for one, first in enumerate(borders):
        for two, second in enumerate(borders[one:], one):
            spans = [Span(0, first, 1), Span(first, second, one + 1), Span(second, None, two + 1)]
            parts = [part for span in spans for part in read(path, span=span, text="text")]
            assert parts == whole


def test_spans_of_row_groups_give_together_what_the_whole_gives(tmp_path: Path) -> None:
    texts = [f"text {number}" if number % 7 else None for number in range(50)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=8)
    whole = read(tmp_path / "a.parquet")
    assert [document.line for document in whole] == list(range(1, 51))
    for cut in range(8):
        spans = [Span(0, cut, 1), Span(cut, None, 8 * cut + 1)]
        assert [part for span in spans for part in read(tmp_path / "a.parquet", span=span)] == whole


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json", "a.csv", "a.txt", "a.arrow"])
def test_other_files_are_read_as_the_whole_only(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="as a whole only"):
        read(write(tmp_path, name, b""), span=Span(1))


def test_columns_name_the_documents(tmp_path: Path) -> None:
    records = [{"t": text, "n": number, "from": "web", "page": "p"} for text, number in (("x", 1), ("é", 2))]
    expected = [Document("1", "web", "p", "x", 1, 1), Document("2", "web", "p", "é", 2, 2)]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    for path in (write(tmp_path, "a.jsonl", lines(*records)), tmp_path / "a.parquet"):
        assert read(path, text="t", id="n", source="from", group="page") == expected


def test_lines_without_id_and_source_fall_back_to_file_and_line(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", b'\n{"text": "x", "id": null, "source": ""}\n  \n{"text": "y"}')
    assert read(path) == [
        Document("a.jsonl:2", "a", "a.jsonl:2", "x", 1, 2),
        Document("a.jsonl:4", "a", "a.jsonl:4", "y", 1, 4),
    ]


def test_empty_documents_are_the_callers_to_count(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", lines({"text": ""}, {"text": " \n"}))
    assert [document.text for document in documents(path)] == ["", " \n"]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'{"text": "caf\xe9"}\n', " is not UTF-8 (byte 0xe9)"),
        (b'{"text": "cut\n', " is not JSON (Unterminated string starting at at column 10); one object a line is"),
        (b"[1]\n", " holds a list, expected a JSON object"),
        (lines({"body": "a", "n": 1}), " has no column 'text'; its columns: 'body', 'n': give --text-column"),
        (lines({}), " has no column 'text'; its columns: none: give --text-column"),
        (lines({"text": 3}), ": column 'text' holds a value of type int, expected a string"),
        (lines({"text": None}), ": column 'text' holds null, expected a string"),
        (lines({"text": ["a"]}), ": column 'text' holds a value of type list"),
        (lines({"text": "a", "id": True}), ": column 'id' holds a value of type bool, expected a string or a whole"),
        (lines({"text": "a", "id": 1.0}), ": column 'id' holds a value of type float"),
        (lines({"text": "a", "source": {}}), ": column 'source' holds a value of type dict"),
        (lines({"text": "a \ud800"}), r" holds \ud800, half of a surrogate pair"),
        (lines({"text": "a", "id": "\udfff"}), r" holds \udfff, half of a surrogate pair"),
        (lines({"text": "a\0"}), " holds a NUL byte, which no text does"),
        (lines({"text": "é\0"}), " holds a NUL byte, which no text does"),
        (b"[" * 100_000 + b"\n", " is not JSON"),
        (b'{"text": "a", "n": ' + b"9" * 5000 + b"}\n", " is not JSON"),
    ],
)
def test_a_bad_line_is_named_and_the_next_one_read(tmp_path: Path, data: bytes, expected: str) -> None:
    path = write(tmp_path, "a.jsonl", lines({"text": "a"}) + data + lines({"text": "b"}))
    first, bad, last = read(path)
    assert isinstance(bad, Rejected)
    assert (bad.file, bad.line) == ("a.jsonl", 2)
    assert bad.message.startswith(f"{path} line 2{expected}")
    assert "\n" not in bad.message
    assert isinstance(first, Document) and isinstance(last, Document)
    assert (first.text, last.text, last.line) == ("a", "b", 3)


@pytest.mark.parametrize(
    "line",
    [
        b'{"text": "a", "other": NaN}',
        b'{"text": "a", "other": [Infinity, -1e999]}',
        b'{"text": "a", "other": "\\ud800"}',
        b'{"text": "b", "text": "a"}',
        b'{"text": "a", "other": 123456789012345678901234567890}',
        b'{"text": "\\u0061"}\r',
    ],
)
def test_what_other_fields_hold_does_not_matter(tmp_path: Path, line: bytes) -> None:
    assert [document.text for document in documents(write(tmp_path, "a.jsonl", line))] == ["a"]


def test_a_column_asked_for_must_be_there(tmp_path: Path) -> None:
    records = [{"text": "a", "lang": "en"}]
    jsonl = write(tmp_path, "a.jsonl", lines(*records))
    table = write(tmp_path, "a.csv", b"text,lang\na,en\na,de\n")
    parquet = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(records * 2), parquet)
    for path, where in ((jsonl, " line 1"), (table, ""), (parquet, "")):
        for role in ("text", "id", "source", "group"):
            message = f"{path}{where} has no column 'site'; its columns: 'text', 'lang': give --{role}-column"
            assert rejection(path, **{"text": "text", role: "site"}).message == message


def test_a_column_that_stands_twice_is_refused_where_it_is_wanted(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", b"text,a,a\nx,1,2\n")
    assert [document.text for document in documents(path)] == ["x"]
    assert "a.csv has 2 columns 'a', expected one" in rejection(path, id="a").message
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 2, names=["text", "text"]), tmp_path / "a.parquet")
    assert "a.parquet has 2 columns 'text', expected one" in rejection(tmp_path / "a.parquet").message


@pytest.mark.parametrize(
    ("name", "column", "expected"),
    [
        ("text", pa.array([1]), "column 'text' is of type integer, expected strings: give --text-column"),
        ("text", pa.array([None]), "column 'text' is of type null, expected strings: give --text-column"),
        ("text", pa.array([b"a"]), "column 'text' is of type binary, expected strings: give --text-column"),
        ("id", pa.array([1.0]), "column 'id' is of type double, expected strings or whole numbers: give --id-column"),
        ("source", pa.array([[1]]), "expected strings or whole numbers: give --source-column"),
    ],
)
def test_a_table_of_other_types_is_refused_as_a_whole(tmp_path: Path, name: str, column: Any, expected: str) -> None:
    pq.write_table(pa.table({"text": pa.array(["a"]), name: column}), tmp_path / "a.parquet")
    found = rejection(tmp_path / "a.parquet", text="text")
    assert expected in found.message
    assert found.line is None


def test_rows_of_tables_are_called_rows(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", None], "id": pa.array([None, None])}), tmp_path / "a.parquet")
    good, bad = read(tmp_path / "a.parquet")
    assert good == Document("a.parquet:1", "a", "a.parquet:1", "a", 1, 1)
    path = tmp_path / "a.parquet"
    assert bad == Rejected("a.parquet", 2, f"{path} row 2: column 'text' holds null, expected a string")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.parquet", "a.arrow", "a.jsonl.gz"])
def test_a_fault_of_the_file_is_one_rejection(tmp_path: Path, name: str) -> None:
    data = '{"text": "a"}'.encode("utf-16")
    found = rejection(write(tmp_path, name, data))
    assert found.line is None
    assert (
        "cannot be read: " if name[2:] in ("parquet", "arrow", "jsonl.gz") else "looks like UTF-16"
    ) in found.message
    file = TextFile(tmp_path / "gone", name, "a", "jsonl", None)
    (gone,) = read_documents(file, Columns())
    assert gone == Rejected(name, None, f"{tmp_path / 'gone'} cannot be read: No such file or directory")


def test_failures_of_code_are_not_taken_for_the_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    path = write(tmp_path, "a.jsonl", lines({"text": "a"}))
    monkeypatch.setattr("stages.data.reading.readers._name", broken)
    with pytest.raises(ZeroDivisionError):
        read(path)


GUESSES = [
    ({"text": "a", "content": "b"}, "text"),
    ({"text": None, "content": "b"}, "text"),
    ({"body": "b", "content": "b"}, "content"),
    ({"content": None, "body": "b"}, "body"),
    ({"content": 7, "markdown": "b", "story": "c"}, "markdown"),
    ({"story": "a", "n": 1, "url": "u", "Title": "t", "lang": "en", "id": "i"}, "story"),
]


@pytest.mark.parametrize(("record", "expected"), GUESSES)
def test_the_text_column_is_guessed(tmp_path: Path, record: dict[str, Any], expected: str) -> None:
    bad = b"\n[]\nrubbish\n{}\n"
    for name, data in (("a.jsonl", bad + lines(record)), ("a.json", json.dumps([1, record], indent=1).encode())):
        (file,) = find_files([str(write(tmp_path, name, data))])
        assert guess_text_column(file) == expected
    pq.write_table(pa.Table.from_pylist([record]), tmp_path / "a.parquet")
    feather.write_feather(pa.Table.from_pylist([record]), str(tmp_path / "a.feather"))
    for name in ("a.parquet", "a.feather"):
        (file,) = find_files([str(tmp_path / name)])
        assert guess_text_column(file) == expected


def test_the_guess_is_what_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", lines({"story": "one", "id": 1}, {"story": "two", "id": 2}))
    assert [document.text for document in documents(path)] == ["one", "two"]


def test_numbers_in_csv_are_no_text(tmp_path: Path) -> None:
    (file,) = find_files([str(write(tmp_path, "a.csv", b"label,review,stars,url\n1,good,4.5,u\n"))])
    assert guess_text_column(file) == "review"


def test_text_files_have_no_columns_to_guess(tmp_path: Path) -> None:
    (file,) = find_files([str(write(tmp_path, "a.txt", b"a"))])
    assert guess_text_column(file) is None


def test_text_it_is_where_no_good_record_shows(tmp_path: Path) -> None:
    for name, data in (("a.jsonl", b""), ("b.jsonl", b"[]\n" * 200 + b'{"story": "a"}'), ("a.csv", b"story\n")):
        (file,) = find_files([str(write(tmp_path, name, data))])
        assert guess_text_column(file) == "text"
    for kind in ("jsonl", "json", "csv", "parquet", "arrow"):
        assert guess_text_column(TextFile(tmp_path / "gone", "a", "a", kind, None)) == "text"


def test_an_unclear_guess_asks_for_the_column(tmp_path: Path) -> None:
    for name, record in (("a.jsonl", {"one": "a", "two": "b", "n": 1}), ("b.jsonl", {"title": "a", "n": 1})):
        path = write(tmp_path, name, lines(record))
        (file,) = find_files([str(path)])
        names = ", ".join(map(repr, record))
        expected = f"{path} does not say which column holds the text; its columns: {names}: give --text-column"
        with pytest.raises(InputFailure) as found:
            guess_text_column(file)
        assert str(found.value) == expected
        assert rejection(path) == Rejected(name, None, expected)


def test_folders_that_datasets_saved_are_read(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=ResourceWarning)
        import datasets  # type: ignore[import-untyped]

        datasets.disable_progress_bars()
        first = datasets.Dataset.from_list(RECORDS)
        second = first.select(range(5, 9))
        first.save_to_disk(tmp_path / "one", num_shards=3)
        datasets.DatasetDict(train=first, test=second).save_to_disk(tmp_path / "both")
    assert [(document.id, document.source, document.text) for document in documents(tmp_path / "one")] == DOCUMENTS
    found = documents(tmp_path / "both")
    assert [(document.id, document.text) for document in found] == [
        (identity, text) for identity, _, text in [*DOCUMENTS[5:9], *DOCUMENTS]
    ]
    (file, *_) = find_files([str(tmp_path / "both")])
    assert file == TextFile(
        tmp_path / "both/test/data-00000-of-00001.arrow", "test/data-00000-of-00001.arrow", "both", "arrow", None
    )


PIECES = st.sampled_from(
    [bytes([byte]) for byte in b'{}[]",\n\r\\ 1\0\xff\xe9']
    + [b'"text"', b": ", b"\n\n", b"\\ud800", b"NaN", b"text", b"id", b"\xef\xbb\xbf", b"\xff\xfe", "é😀".encode()]
    + [b'{"text": "a", "id": 1}', b"text,id\n", b"id\ttext\n"]
)


@settings(max_examples=200, deadline=None)
@given(
    data=st.lists(PIECES, max_size=25).map(b"".join) | st.binary(max_size=80),
    kind=st.sampled_from(["jsonl", "json", "csv", "tsv", "txt", "parquet", "arrow"]),
    codec=st.sampled_from([None, "gz", "zst", "bz2", "xz"]),
    cut=st.integers(1, 30) | st.none(),
    how=st.sampled_from(["file", "block", "line"]),
    columns=st.sampled_from([Columns(), Columns("text"), Columns("text", "-"), Columns("text", "id", "id", "text")]),
    longest=st.sampled_from([10, 50, 1000]),
)
def test_any_bytes_give_documents_or_rejections(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, kind: Kind, codec: str | None, cut: int | None, how: Any,
    columns: Columns, longest: int,
) -> None:  # fmt: skip
    codec = None if kind in ("parquet", "arrow") else codec
    content = CODECS[f".{codec}" if codec else ""](data)
    path = write(tmp_path_factory.mktemp("any"), "a", content[:-cut] if cut else content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "MAX_DOCUMENT", longest)
        found = list(read_documents(TextFile(path, "a", "s", kind, codec), columns, how))
    for document in found:
        if isinstance(document, Document):
            assert document.size == len(document.text.encode()) <= longest
            assert "".join((document.id, document.source, document.group)).encode()
            assert "\0" not in document.text
        else:
            assert document.message.startswith(str(path))
            assert document.message.isprintable()
    assert sum(isinstance(document, Rejected) and document.line is None for document in found) <= 1
