import gzip
import hashlib
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.failures import InputFailure
from schemas.tokenize_text import SurveyedFile
from stages.data import parts as parts_module
from stages.data.parts import Part, check_unchanged, is_as_surveyed, part_bytes, parts_of, survey
from stages.data.reading.readers import Columns, Document, read_documents
from stages.data.reading.sources import TextFile, find_files


def lines(folder: Path, name: str, count: int, length: int = 20) -> Path:
    path = folder / name
    path.write_text(
        "".join(json.dumps({"text": f"{name} {number:05d}".ljust(length)}) + "\n" for number in range(count))
    )
    os.utime(path, (1, 1))  # long at rest
    return path


def looked_at(folder: Path, size: int) -> tuple[list[TextFile], list[SurveyedFile], list[Part]]:
    files = find_files([str(folder)])
    surveyed = survey([file.path for file in files], size, folder / ".cache.json")
    return files, surveyed, parts_of(files, surveyed, size)


def read(files: list[TextFile], part: Part) -> list[Document]:
    found = []
    for piece in part.pieces:
        for record in read_documents(files[piece.file], Columns("text"), "file", piece.span):
            assert isinstance(record, Document)
            found.append(record)
    return found


def test_parts_together_are_the_corpus_whatever_their_size(tmp_path: Path) -> None:
    lines(tmp_path, "a.jsonl", 100)
    lines(tmp_path, "b.jsonl", 1)
    (tmp_path / "c.txt").write_text("one document")
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(lines(tmp_path, "x.jsonl", 50).read_bytes()))
    table = pa.table({"text": [f"row {number}" for number in range(60)]})
    pq.write_table(table, tmp_path / "e.parquet", row_group_size=7)
    files, _, (whole,) = looked_at(tmp_path, 1 << 20)
    expected = read(files, whole)
    assert len(expected) == 100 + 1 + 1 + 50 + 50 + 60
    for size in (40, 333, 1000, 5000):
        files, _, parts = looked_at(tmp_path, size)
        assert [part.number for part in parts] == list(range(len(parts)))
        assert [document for part in parts for document in read(files, part)] == expected
    assert len(looked_at(tmp_path, 333)[2]) > 15


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(0, 40), max_size=12), size=st.integers(1, 60), end=st.booleans())
def test_cuts_are_where_lines_begin(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], size: int, end: bool
) -> None:
    data = b"\n".join(b"x" * length for length in lengths) + (b"\n" if end else b"")
    path = tmp_path_factory.mktemp("cuts") / "a.jsonl"
    path.write_bytes(data)
    original = parts_module.CHUNK
    try:
        for chunk in (1, 7, original):
            parts_module.CHUNK = chunk
            (found,) = survey([path], size, path.parent / "cache.json")
            begins = [(at + 1, data[: at + 1].count(b"\n") + 1) for at, byte in enumerate(data) if byte == 10]
            begins = [begin for begin in begins if begin[0] < len(data)]
            expected, wanted = [], size
            for offset, line in begins:
                if offset >= wanted:
                    expected.append((offset, line))
                    wanted = offset // size * size + size
            assert list(found.cuts) == expected
    finally:
        parts_module.CHUNK = original


def test_small_files_share_a_part(tmp_path: Path) -> None:
    for number in range(20):
        lines(tmp_path, f"{number:02d}.jsonl", 3)
    files, _, parts = looked_at(tmp_path, 1000)
    assert 1 < len(parts) < 5
    assert sorted(piece.file for part in parts for piece in part.pieces) == list(range(len(files)))


def test_the_size_of_a_part_follows_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines(tmp_path, "a.jsonl", 1000)
    (file,) = find_files([str(tmp_path)])
    assert part_bytes([file], None) == 32 << 20
    assert part_bytes([file], 5000) == 5000
    monkeypatch.setattr(parts_module, "SMALLEST", 10)
    assert part_bytes([file], None) == file.path.stat().st_size // 1024
    monkeypatch.setattr(parts_module, "LARGEST", 15)
    assert part_bytes([file], None) == 15


def test_the_digest_is_that_of_the_bytes(tmp_path: Path) -> None:
    path = lines(tmp_path, "a.jsonl", 100)
    _, (found,), _ = looked_at(tmp_path, 50)
    assert found.digest == f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def test_a_file_at_rest_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = lines(tmp_path, "a.jsonl", 100)
    first = looked_at(tmp_path, 500)[1]
    with monkeypatch.context() as patch:
        patch.setattr(parts_module, "sha256", None)
        assert looked_at(tmp_path, 500)[1] == first
    path.write_text(path.read_text().replace("a", "b"))
    assert looked_at(tmp_path, 500)[1] != first
    (tmp_path / ".cache.json").write_text("{")
    assert len(looked_at(tmp_path, 500)[1]) == 1


def test_a_file_changed_just_now_is_not_trusted_to_the_cache(tmp_path: Path) -> None:
    lines(tmp_path, "a.jsonl", 10).touch()
    looked_at(tmp_path, 500)
    assert not (tmp_path / ".cache.json").exists()


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    path = lines(tmp_path, "a.jsonl", 10)
    _, (found,), _ = looked_at(tmp_path, 500)
    check_unchanged(found)
    with path.open("a") as file:
        file.write("\n")
    assert not is_as_surveyed(found)
    with pytest.raises(InputFailure, match=r"a\.jsonl was changed while it was read: run again when it is at rest"):
        check_unchanged(found)
    path.unlink()
    with pytest.raises(InputFailure, match="cannot be read: No such file"):
        check_unchanged(found)


def test_a_broken_parquet_file_is_left_to_the_reader(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    _, _, parts = looked_at(tmp_path, 100)
    assert len(parts) == 1
