import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.failures import InputFailure
from stages.data import readers
from stages.data.readers import Columns, Document, find_files, read_documents


def lines(*records: Any) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


DOCUMENTS = [{"text": f"text {number} é\r\n<|endoftext|>"} for number in range(500)]
PLAIN = lines(*DOCUMENTS)
GZIP = gzip.compress(PLAIN)
ZSTD = pa.compress(PLAIN, codec="zstd", asbytes=True)


def write(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def read(*inputs: Path | str, **columns: str) -> list[Document]:
    return list(read_documents(find_files([str(path) for path in inputs]), Columns(**columns)))


def refusal(*inputs: Path | str, **columns: str) -> str:
    with pytest.raises(InputFailure) as failure:
        read(*inputs, **columns)
    assert "\n" not in str(failure.value)
    return str(failure.value)


@pytest.mark.parametrize(
    ("name", "data"),
    [("a.jsonl", PLAIN), ("a.ndjson", PLAIN), ("a.JSONL", PLAIN), ("a.jsonl.gz", GZIP), ("a.jsonl.zst", ZSTD)],
)
def test_line_files_give_one_document_a_line(tmp_path: Path, name: str, data: bytes) -> None:
    documents = read(write(tmp_path, name, data))
    assert [document.text for document in documents] == [record["text"] for record in DOCUMENTS]
    assert documents[2] == Document(f"{name}:3", "a", f"{name}:3", DOCUMENTS[2]["text"], 24)


@pytest.mark.parametrize(("name", "data"), [("a.jsonl.gz", GZIP + GZIP), ("a.jsonl.zst", ZSTD + ZSTD)])
def test_compressed_files_of_several_members_are_read_to_the_end(tmp_path: Path, name: str, data: bytes) -> None:
    assert len(read(write(tmp_path, name, data))) == 2 * len(DOCUMENTS)


@pytest.mark.parametrize(("name", "data"), [("a.jsonl.gz", GZIP), ("a.jsonl.zst", ZSTD), ("a.txt.gz", GZIP)])
def test_a_truncated_compressed_file_is_refused_wherever_it_is_cut(tmp_path: Path, name: str, data: bytes) -> None:
    for length in [*range(1, len(data), len(data) // 20), len(data) - 1]:
        assert "cannot be read: " in refusal(write(tmp_path, name, data[:length]))


@pytest.mark.parametrize("data", [PLAIN, b"\x00\x01", GZIP + b"rubbish"])
def test_a_file_that_is_not_compressed_as_its_name_says_is_refused(tmp_path: Path, data: bytes) -> None:
    assert "cannot be read: " in refusal(write(tmp_path, "a.jsonl.gz", data))
    assert "cannot be read: " in refusal(write(tmp_path, "a.jsonl.zst", data))


def test_text_files_are_one_document_with_every_byte(tmp_path: Path) -> None:
    text = "  one\r\n\ntwo\u2028three\x00\n"
    path = write(tmp_path, "notes v1.md", text.encode())
    assert read(path) == [Document("notes v1.md", "notes v1", "notes v1.md", text, len(text.encode()))]
    assert read(write(tmp_path, "b.v2.txt.gz", gzip.compress(b"x"))) == [
        Document("b.v2.txt.gz", "b.v2", "b.v2.txt.gz", "x", 1)
    ]


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_byte_order_mark_is_dropped_at_the_start_only(tmp_path: Path, name: str) -> None:
    mark = "\ufeff"
    body = lines({"text": mark + "x"}) if name == "a.jsonl" else (mark + "x").encode()
    assert read(write(tmp_path, name, mark.encode() + body))[0].text == mark + "x"


def test_parquet_gives_one_document_a_row(tmp_path: Path) -> None:
    table = pa.table({"body": ["a", "é"], "id": [7, 8], "source": ["x", None], "other": [[1], [2]]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", text="body") == [
        Document("7", "x", "7", "a", 1),
        Document("8", "a", "8", "é", 2),
    ]


def test_columns_name_the_documents(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "a.jsonl",
        lines({"t": "x", "n": 1, "from": "web", "page": "p"}, {"t": "y", "n": 2, "from": "web", "page": "p"}),
    )
    documents = read(path, text="t", id="n", source="from", group="page")
    assert documents == [Document("1", "web", "p", "x", 1), Document("2", "web", "p", "y", 1)]


def test_lines_without_id_and_source_fall_back_to_file_and_line(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", b'\n{"text": "x", "id": null, "source": ""}\n  \n{"text": "y"}')
    assert [(document.id, document.source) for document in read(path)] == [("a.jsonl:2", "a"), ("a.jsonl:4", "a")]


def test_empty_documents_are_the_callers_to_count(tmp_path: Path) -> None:
    assert [document.text for document in read(write(tmp_path, "a.jsonl", lines({"text": ""}, {"text": " \n"})))] == [
        "",
        " \n",
    ]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (lines({"text": "a"}) + b'{"text": "caf\xe9"}\n', "line 2 is not UTF-8 (byte 0xe9)"),
        (lines({"text": "a"}) + b'{"text": "cut', "line 2 is not JSON (Unterminated string starting at at column 10)"),
        (b"[1]\n", "line 1 holds a list, expected a JSON object"),
        (lines({"body": "a", "n": 1}), "line 1 has no column 'text'; its columns: 'body', 'n': give --text-column"),
        (lines({"text": 3}), "line 1: column 'text' holds a value of type int, expected a string"),
        (lines({"text": None}), "line 1: column 'text' holds null, expected a string"),
        (lines({"text": ["a"]}), "line 1: column 'text' holds a value of type list"),
        (lines({"text": "a", "id": True}), "line 1: column 'id' holds a value of type bool"),
        (lines({"text": "a", "source": {}}), "line 1: column 'source' holds a value of type dict"),
        (lines({"text": "a \ud800"}), r"line 1 holds \ud800, half of a surrogate pair"),
        (lines({"text": "a", "id": "\udfff"}), r"line 1 holds \udfff, half of a surrogate pair"),
        (b"[" * 100_000, "line 1 is not JSON"),
        (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "line 1 is not JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, data: bytes, expected: str) -> None:
    path = write(tmp_path, "a.jsonl", data)
    assert refusal(path).startswith(f"{path} {expected}")


def test_a_bad_byte_of_a_text_file_is_named_by_its_line(tmp_path: Path) -> None:
    assert "a.txt line 3 is not UTF-8 (byte 0xff)" in refusal(write(tmp_path, "a.txt", b"one\ntwo\n\xff"))


def test_a_column_asked_for_must_be_there(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", lines({"text": "a", "lang": "en"}))
    assert "no column 'site'; its columns: 'text', 'lang': give --source-column" in refusal(path, source="site")
    assert "give --group-column" in refusal(path, group="site")
    assert "give --id-column" in refusal(path, id="site")


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array(["a", None]), "row 2: column 'text' holds null"),
        (pa.array([1]), "row 1: column 'text' holds a value of type int"),
        (pa.array([["a"]]), "row 1: column 'text' holds a value of type list"),
        (pa.array([b"a"]), "row 1: column 'text' holds a value of type bytes"),
        (pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xe9"]).buffers()), "cannot be read: 'utf-8' codec"),
    ],
)
def test_bad_parquet_rows_are_named(tmp_path: Path, column: pa.Array, expected: str) -> None:
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert expected in refusal(tmp_path / "a.parquet")


def test_broken_parquet_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["a"] * 100}), tmp_path / "a.parquet")
    assert "a.parquet has no column 'text'; its columns: 'body'" in refusal(tmp_path / "a.parquet")
    data = (tmp_path / "a.parquet").read_bytes()
    assert "cannot be read" in refusal(write(tmp_path, "cut.parquet", data[:-20]))
    assert "cannot be read" in refusal(write(tmp_path, "not.parquet", b"PAR1 nonsense"))


def test_small_archives_may_not_grow_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_DOCUMENT", 1 << 20)
    bomb = gzip.compress(b"a" * (2 << 20))
    assert "longer than 1 MiB" in refusal(write(tmp_path, "a.txt.gz", bomb))
    assert "line 1 is longer than 1 MiB" in refusal(write(tmp_path, "a.jsonl.gz", bomb))


def test_folders_are_searched_to_any_depth_in_a_fixed_order(tmp_path: Path) -> None:
    for name in ("b/x.txt", "a/deep/y.md", "a/z.jsonl"):
        write(tmp_path, name, b"{}")
    for name in (".hidden.txt", ".git/x.txt", "a/picture.png"):
        write(tmp_path, name, b"")
    assert [file.label for file in find_files([str(tmp_path)])] == ["x.txt", "y.md", "z.jsonl"]


def test_globs_and_repeated_names_give_each_file_once(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "c.md"):
        write(tmp_path, name, b"x")
    inputs = [str(tmp_path / "*.txt"), str(tmp_path / "a.txt"), str(tmp_path), str(tmp_path / ".." / tmp_path.name)]
    assert [file.label for file in find_files(inputs)] == ["a.txt", "b.txt", "c.md"]


def test_a_name_with_brackets_is_not_a_glob(tmp_path: Path) -> None:
    path = write(tmp_path, "a[1] é\n.txt", b"x")
    assert [file.path for file in find_files([str(path)])] == [path]


def test_equal_names_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for name in ("one/x/a.txt", "two/x/a.txt", "two/b.txt"):
        write(tmp_path, name, b"x")
    labels = ["b.txt", "one/x/a.txt", "two/x/a.txt"]
    assert [file.label for file in find_files([str(tmp_path / "two"), str(tmp_path / "one")])] == labels
    assert [document.id for document in read(tmp_path)] == labels


def test_what_cannot_be_found_or_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "dead.txt").symlink_to("nowhere")
    assert refusal(tmp_path / "none.txt").startswith("no such file or folder: ")
    assert refusal(tmp_path / "none*").startswith("no such file or folder: ")
    assert "holds no file that can be read; readable are .jsonl" in refusal(tmp_path / "empty")
    assert "not a regular file" in refusal(tmp_path / "pipe.txt")
    assert "is a link to nothing" in refusal(tmp_path / "dead.txt")
    assert "unknown kind '.pdf'; readable are .jsonl" in refusal(write(tmp_path, "a.pdf", b"x"))
    assert "unknown kind '.gz'" in refusal(write(tmp_path, "a.gz", b"x"))
    assert "is not UTF-8: rename the file" in refusal(write(tmp_path, os.fsdecode(b"\xff.txt"), b"x"))
