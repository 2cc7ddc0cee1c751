import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from loguru import logger

from schemas.failures import InputFailure
from stages.data.reading import sources
from stages.data.reading.sources import TextFile, find_files, spool


@pytest.fixture
def log() -> Iterator[list[str]]:
    """What is logged while the test runs."""
    messages: list[str] = []
    handler = logger.add(lambda message: messages.append(str(message)), format="{level}: {message}")
    yield messages
    logger.remove(handler)


def write(folder: Path, name: str, data: bytes = b"x") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def labels(*inputs: Path | str) -> list[str]:
    return [file.label for file in find_files([str(path) for path in inputs])]


def refusal(*inputs: Path | str) -> str:
    with pytest.raises(InputFailure) as failure:
        find_files([str(path) for path in inputs])
    assert "\n" not in str(failure.value)
    return str(failure.value)


@pytest.mark.parametrize(
    ("name", "source", "kind", "codec"),
    [
        ("law.v2.jsonl.zst", "law.v2", "jsonl", "zst"),
        ("a.ndjson", "a", "jsonl", None),
        ("a.JSONL.GZ", "a", "jsonl", "gz"),
        ("a.json", "a", "json", None),
        ("a.json.gz", "a", "json", "gz"),
        ("a.csv.bz2", "a", "csv", "bz2"),
        ("a.tsv.xz", "a", "tsv", "xz"),
        ("a b.txt", "a b", "txt", None),
        ("read.me.md.xz", "read.me", "txt", "xz"),
        ("a.csv.parquet", "a.csv", "parquet", None),
        ("a.arrow", "a", "arrow", None),
        ("a.feather", "a", "arrow", None),
    ],
)
def test_the_suffixes_say_how_a_file_is_read(
    tmp_path: Path, name: str, source: str, kind: Any, codec: str | None
) -> None:
    path = write(tmp_path, name)
    assert find_files([str(path)]) == [TextFile(path, name, source, kind, codec)]


@pytest.mark.parametrize(
    "name", ["a.pdf", "a.gz", "jsonl", "a.parquet.gz", "a.arrow.zst", "a.jsonl.lz4", "a.gz.jsonl.exe"]
)
def test_other_suffixes_are_refused_with_those_that_can_be_read(tmp_path: Path, name: str) -> None:
    message = refusal(write(tmp_path, name))
    assert f"{name} is of an unknown kind" in message
    for suffix in sources.SUFFIXES:
        assert f".{suffix.split('.')[-1]}" in message


def test_folders_are_searched_to_any_depth_in_a_fixed_order(tmp_path: Path, log: list[str]) -> None:
    for name in ("b/x.txt", "a/deep/y.md", "a/z.jsonl", ".hidden.txt", ".git/x.txt", "a/picture.png"):
        write(tmp_path, name)
    assert labels(tmp_path) == ["x.txt", "y.md", "z.jsonl"]
    assert log == [f"WARNING: left out in {tmp_path}, as of other kinds: .png (1)\n"]


def test_links_to_folders_inside_a_folder_are_left_out_aloud(tmp_path: Path, log: list[str]) -> None:
    write(tmp_path, "corpus/a.txt")
    write(tmp_path, "elsewhere/b.txt")
    (tmp_path / "corpus/more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "corpus/round").symlink_to(tmp_path / "corpus")
    assert labels(tmp_path / "corpus") == ["a.txt"]
    assert "links to folders (2)" in log[0]
    assert labels(tmp_path / "corpus/more") == ["b.txt"]


def test_globs_and_repeated_names_give_each_file_once(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "c.md"):
        write(tmp_path, name)
    inputs = [tmp_path / "*.txt", tmp_path / "a.txt", tmp_path, tmp_path / ".." / tmp_path.name]
    assert labels(*inputs) == ["a.txt", "b.txt", "c.md"]
    assert find_files(list(map(str, inputs))) == find_files(list(map(str, reversed(inputs))))


def test_a_name_with_brackets_is_not_a_glob(tmp_path: Path) -> None:
    path = write(tmp_path, "a[1] é\n.txt")
    assert [file.path for file in find_files([str(path)])] == [path]


def test_equal_names_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for name in ("one/x/a.txt", "two/x/a.txt", "two/b.txt"):
        write(tmp_path, name)
    assert labels(tmp_path / "two", tmp_path / "one") == ["b.txt", "one/x/a.txt", "two/x/a.txt"]


def test_what_cannot_be_found_or_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "dead.txt").symlink_to("nowhere")
    (tmp_path / "round.txt").symlink_to("round.txt")
    assert refusal(tmp_path / "none.txt").startswith("no such file or folder: ")
    assert refusal(tmp_path / "none*").startswith("no such file or folder: ")
    assert refusal("a\0.txt").startswith("no such file or folder: 'a\\x00.txt'")
    assert "holds no file that can be read; readable are .jsonl" in refusal(tmp_path / "empty")
    assert "not a regular file" in refusal(tmp_path / "pipe.txt")
    assert "is a link to nothing" in refusal(tmp_path / "dead.txt")
    assert "is a link to nothing" in refusal(tmp_path / "round.txt")
    assert "is not UTF-8: rename the file" in refusal(write(tmp_path, os.fsdecode(b"\xff.txt")))
    assert "is not UTF-8: rename the file" in refusal(write(tmp_path / os.fsdecode(b"\xff"), "a.txt"))


def save_dataset(folder: Path, shards: int = 1, state: Any = None) -> Path:
    """What `save_to_disk` leaves, without the package."""
    names = [f"data-{shard:05d}-of-{shards:05d}.arrow" for shard in range(shards)]
    for name in names:
        write(folder, name, b"arrow")
    state = state if state is not None else {"_data_files": [{"filename": name} for name in names]}
    write(folder, "state.json", json.dumps(state).encode())
    write(folder, "dataset_info.json", b"{}")
    return folder


def test_a_saved_dataset_is_the_files_its_list_names(tmp_path: Path) -> None:
    folder = save_dataset(tmp_path / "corpus/books", shards=2)
    write(folder, "cache-1234.arrow")
    write(folder, "notes.txt")
    write(tmp_path / "corpus", "a.txt")
    for given in (folder, os.path.relpath(folder)):
        found = find_files([str(given)])
        assert [(file.label, file.source, file.kind) for file in found] == [
            ("data-00000-of-00002.arrow", "books", "arrow"),
            ("data-00001-of-00002.arrow", "books", "arrow"),
        ]
    inside = find_files([str(tmp_path / "corpus")])
    assert [(file.label, file.source) for file in inside] == [
        ("a.txt", "a"), ("data-00000-of-00002.arrow", "books"), ("data-00001-of-00002.arrow", "books"),
    ]  # fmt: skip


def test_all_splits_of_a_saved_dataset_dict_are_read_aloud(tmp_path: Path, log: list[str]) -> None:
    folder = tmp_path / "books"
    for split in ("train", "test", "unlisted"):
        save_dataset(folder / split)
    write(folder, "dataset_dict.json", b'{"splits": ["train", "test"]}')
    found = find_files([str(tmp_path)])
    assert [(file.label, file.source) for file in found] == [
        ("test/data-00000-of-00001.arrow", "books"), ("train/data-00000-of-00001.arrow", "books"),
    ]  # fmt: skip
    assert log == [f"INFO: {folder} is a DatasetDict; all its splits are read: train, test\n"]


def test_the_source_does_not_depend_on_the_order_of_the_inputs(tmp_path: Path) -> None:
    folder = save_dataset(tmp_path / "books")
    inputs = [str(folder / "*.arrow"), str(folder)]
    assert [file.source for file in find_files(inputs)] == ["books"]
    assert find_files(inputs) == find_files(inputs[::-1])


@pytest.mark.parametrize("name", ["dataset_info.json", "state.json", "dataset_dict.json"])
def test_descriptions_of_datasets_are_never_text(tmp_path: Path, name: str, log: list[str]) -> None:
    path = write(tmp_path, name, b"{}")
    write(tmp_path, "a.arrow")
    assert "describes a dataset and holds no text: give its folder" in refusal(path)
    if name != "dataset_dict.json":
        assert labels(tmp_path) == ["a.arrow"]
        assert ".json (1)" in log[0]


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ({"_data_files": [{"filename": "../a.arrow"}]}, "state.json lists '../a.arrow', expected names in its folder"),
        ({"_data_files": [{"filename": "/etc/a.arrow"}]}, "state.json lists '/etc/a.arrow'"),
        ({"_data_files": [{"filename": ".."}]}, "state.json lists '..'"),
        ({"_data_files": [{"filename": "a\0.arrow"}]}, r"state.json lists 'a\x00.arrow'"),
        ({"_data_files": [{"filename": 7}]}, "state.json lists 7"),
        ({"_data_files": [{}]}, "state.json lists None"),
        ({"_data_files": 7}, "state.json lists None"),
        ({}, "state.json lists None"),
        ([], "state.json lists None"),
        ({"_data_files": []}, "holds no file that can be read"),
        ({"_data_files": [{"filename": "gone.arrow"}]}, "gone.arrow is missing; state.json lists it"),
        ({"_data_files": [{"filename": "\ud800.arrow"}]}, "is missing; state.json lists it"),
        ({"_data_files": [{"filename": "a.exe"}]}, "a.exe is of an unknown kind"),
        ({"_data_files": [], "_indices_data_files": [{"filename": "indices.arrow"}]}, "is a selection of its rows"),
    ],
)
def test_the_list_of_a_dataset_is_not_trusted(tmp_path: Path, state: Any, expected: str) -> None:
    folder = save_dataset(tmp_path / "books", state=state)
    write(tmp_path, "a.arrow")
    write(folder, "a.exe")
    assert expected in refusal(folder)


@pytest.mark.parametrize("data", [b"{", b"\xff", b"[" * 100_000, b"1" * 5000, b" " * (sources.MAX_LISTING + 1)])
def test_a_list_that_is_no_json_is_refused(tmp_path: Path, data: bytes) -> None:
    folder = save_dataset(tmp_path / "books")
    write(folder, "state.json", data)
    assert f"{folder / 'state.json'} is not JSON as datasets writes it" in refusal(tmp_path)


@pytest.mark.parametrize("splits", ['["../x"]', '"train"', "null", '["gone"]'])
def test_the_splits_of_a_dataset_dict_are_not_trusted(tmp_path: Path, splits: str) -> None:
    save_dataset(tmp_path / "books/train")
    write(tmp_path, "books/dataset_dict.json", f'{{"splits": {splits}}}'.encode())
    assert "gone/state.json cannot be read: No such file" in (found := refusal(tmp_path)) or "lists" in found


def test_standard_input_is_kept_in_a_file(tmp_path: Path) -> None:
    data = os.urandom(3 << 20)
    path = spool(io.BytesIO(data), tmp_path / "new", "jsonl")
    assert path == tmp_path / "new/stdin.jsonl"
    assert path.read_bytes() == data
    assert spool(io.BytesIO(b"x"), tmp_path, ".CSV.gz") == tmp_path / "stdin.csv.gz"
    assert labels(tmp_path) == ["stdin.csv.gz", "stdin.jsonl"]


class Failing(io.RawIOBase):
    """Gives a little, then breaks; nothing at all when it may not be read."""

    def __init__(self, chunks: list[bytes]) -> None:
        self.chunks = chunks

    def read(self, size: int = -1) -> bytes:
        if not self.chunks:
            raise OSError(5, "Input/output error")
        return self.chunks.pop()


@pytest.mark.parametrize("suffix", ["pdf", "", ".", "x.jsonl", "../a.jsonl", "gz", "jsonl.gz.gz", "jsonl\0"])
def test_an_unknown_suffix_is_refused_before_anything_is_read(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(InputFailure, match=r"standard input cannot be read as .*; readable are \.jsonl"):
        spool(Failing([]), tmp_path, suffix)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("stream", "expected"),
    [(io.BytesIO(), "standard input is empty"), (Failing([b"a"]), "standard input cannot be read: Input/output error")],
)
def test_no_file_is_left_of_an_input_that_is_empty_or_breaks(tmp_path: Path, stream: Any, expected: str) -> None:
    with pytest.raises(InputFailure, match=expected):
        spool(stream, tmp_path, "jsonl")
    assert not list(tmp_path.iterdir())
