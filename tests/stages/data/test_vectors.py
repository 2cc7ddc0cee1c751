"""Vectors of every kind of file against the array they were written from; a fault is one line with the first ids."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from schemas.failures import InputFailure
from stages.data.vectors import GivenVectors, vector_inputs

IDS = [f"d{number}" for number in range(10)]
VECTORS = np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32)
KINDS = ("arrow", "stream", "fixed", "parquet", "npy", "safetensors", "metadata")


def table(ids: Sequence[Any], vectors: Any, kind: pa.DataType | None = None) -> pa.Table:
    kind = kind or pa.list_(pa.float32())
    return pa.table({"id": pa.array(ids), "vector": pa.array([list(row) for row in vectors], kind), "other": ids})


def write(folder: Path, kind: str, ids: Sequence[str] = IDS, vectors: np.ndarray = VECTORS) -> Path:
    if kind in ("arrow", "stream", "fixed"):
        content = table(ids, vectors, pa.list_(pa.float64(), vectors.shape[1]) if kind == "fixed" else None)
        path = folder / "vectors.arrow"
        opened = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
        with path.open("wb") as file, opened(file, content.schema) as writer:
            writer.write_table(content, max_chunksize=3)
        return path
    if kind == "parquet":
        pq.write_table(table(ids, vectors), folder / "vectors.parquet", row_group_size=4)
        return folder / "vectors.parquet"
    path = folder / f"vectors.{'npy' if kind == 'npy' else 'safetensors'}"
    if kind == "npy":
        np.save(path, vectors)
    else:
        metadata = {"ids": json.dumps(ids)} if kind == "metadata" else None
        safetensors.torch.save_file({"vectors": torch.from_numpy(np.array(vectors))}, path, metadata)
    if kind != "metadata":
        path.with_name(f"{path.name}.ids").write_text("".join(f"{name}\n" for name in ids))
    return path


def fault(path: Path, documents: Sequence[str] = IDS) -> str:
    with pytest.raises(InputFailure) as refused:
        GivenVectors.open(path).places(documents)
    message = str(refused.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_vectors_of_the_documents_asked_for(tmp_path: Path, kind: str) -> None:
    given = GivenVectors.open(write(tmp_path, kind))
    assert (given.dimensions, list(given.ids)) == (4, IDS)
    documents = [IDS[number] for number in (7, 0, 9, 3, 4, 1, 8, 2, 6, 5)]
    read = given.reader(given.places(documents))
    np.testing.assert_array_equal(read(np.arange(10)), VECTORS[[7, 0, 9, 3, 4, 1, 8, 2, 6, 5]])
    assert read(np.array([2, 2])).dtype == np.float32
    np.testing.assert_array_equal(read(np.array([2, 2])), VECTORS[[9, 9]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_floats_are_read_as_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    vectors = torch.from_numpy(VECTORS).to(dtype)
    safetensors.torch.save_file({"vectors": vectors}, tmp_path / "v.safetensors", {"ids": json.dumps(IDS)})
    given = GivenVectors.open(tmp_path / "v.safetensors")
    np.testing.assert_array_equal(given.take(np.arange(10)), vectors.float().numpy())


def test_ids_may_be_whole_numbers_and_lines_may_end_as_on_windows(tmp_path: Path) -> None:
    pq.write_table(table(list(range(10)), VECTORS), tmp_path / "v.parquet")
    assert GivenVectors.open(tmp_path / "v.parquet").ids == [str(number) for number in range(10)]
    path = write(tmp_path, "npy")
    path.with_name("vectors.npy.ids").write_bytes("\r\n".join(IDS).encode())
    assert GivenVectors.open(path).ids == IDS


@pytest.mark.parametrize("kind", KINDS)
def test_missing_and_further_ids_are_counted_and_named(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind)
    assert fault(path, [*IDS, "e0", "e1", "e2", "e3"]).endswith(
        "has no vector for 4 of 14 documents of the run: e0, e1, e2, …"
    )
    assert fault(path, IDS[:8]).endswith("has 2 vectors of no document of the run: d8, d9")


def test_ids_that_stand_twice_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, "npy", [*IDS[:8], "d0", "d3"])
    assert fault(path).endswith("has 2 ids more than once: d0, d3")
    assert fault(write(tmp_path, "npy"), [*IDS, "d5"]) == "the run has 1 ids more than once: d5"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_values_no_distance_can_be_told_from_are_named(tmp_path: Path, kind: str, value: float) -> None:
    vectors = VECTORS.copy()
    vectors[[2, 5], 1] = value
    assert "2 vectors hold NaN, infinity or too large a value: d2, d5" in fault(write(tmp_path, kind, IDS, vectors))


def test_vectors_of_unequal_length_are_named(tmp_path: Path) -> None:
    rows: list[list[float] | None] = [list(row) for row in VECTORS]
    rows[3], rows[8] = [1.0], [1.0, 2.0]
    pq.write_table(table(IDS, rows), tmp_path / "v.parquet")
    assert "vectors of unequal length, 1 where the first has 4: d3, d8" in fault(tmp_path / "v.parquet")
    rows[3] = None
    content = pa.table({"id": IDS, "vector": pa.array(rows, pa.list_(pa.float32()))})
    pq.write_table(content, tmp_path / "v.parquet")
    assert "null where the first has 4: d3" in fault(tmp_path / "v.parquet")


def test_null_values_and_null_ids_are_refused(tmp_path: Path) -> None:
    rows = [[1.0, None], [2.0, 3.0]]
    pq.write_table(pa.table({"id": ["a", "b"], "vector": rows}), tmp_path / "v.parquet")
    assert "1 values inside vectors are null" in fault(tmp_path / "v.parquet")
    pq.write_table(pa.table({"id": ["a", None], "vector": [[1.0], [2.0]]}), tmp_path / "v.parquet")
    assert "has 1 vectors without an id" in fault(tmp_path / "v.parquet")


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"name": IDS, "vector": list(VECTORS)}, "has no column id; its columns: name, vector"),
        ({"x": IDS}, "has no column id and no vector; its columns: x"),
        ({"id": IDS, "vector": IDS}, "column vector holds string, expected lists of floats"),
        ({"id": IDS, "vector": [[1, 2]] * 10}, "column vector holds list<item: int64>, expected lists of floats"),
        ({"id": [], "vector": pa.array([], pa.list_(pa.float32()))}, "holds no vectors"),
        ({"id": IDS, "vector": pa.array([[]] * 10, pa.list_(pa.float32()))}, "holds no vectors"),
    ],
)
def test_a_table_of_something_else_says_what_it_is(tmp_path: Path, columns: dict[str, Any], expected: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "v.parquet")
    message = fault(tmp_path / "v.parquet")
    assert expected in message.replace("element", "item")


def test_arrays_that_are_no_vectors_say_what_they_are(tmp_path: Path) -> None:
    path = write(tmp_path, "npy")
    np.save(path, VECTORS[0])
    assert "holds float32 of shape [4], expected floats [N, d]" in fault(path)
    np.save(path, np.arange(20).reshape(10, 2))
    assert "holds int64 of shape [10, 2], expected floats [N, d]" in fault(path)
    np.save(path, np.array([{}], dtype=object))
    assert "cannot be read" in fault(path)
    np.save(path, VECTORS[:7])
    assert fault(path).endswith("has 7 vectors and 10 ids")
    path.with_name("vectors.npy.ids").unlink()
    assert "needs the ids of its 7 vectors, one a line, in" in fault(path)


def test_tensors_that_are_no_vectors_say_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    safetensors.torch.save_file({"x": torch.zeros(2, 2)}, path)
    assert "has no tensor vectors; its tensors: x" in fault(path)
    safetensors.torch.save_file({"vectors": torch.zeros(2, 2, dtype=torch.int8)}, path)
    assert "holds torch.int8, expected floats" in fault(path)
    for ids in ('{"a": 1}', "[1, 2]"):
        safetensors.torch.save_file({"vectors": torch.zeros(2, 2)}, path, {"ids": ids})
        assert "its metadata `ids` is no JSON list of strings" in fault(path)


@pytest.mark.parametrize("suffix", [".arrow", ".parquet", ".npy", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"not vectors at all", b"\x93NUMPY"])
def test_files_that_are_something_else_are_one_line(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"v{suffix}"
    path.write_bytes(content)
    assert "cannot be read" in fault(path)


@pytest.mark.parametrize("kind", KINDS)
def test_files_cut_short_are_one_line(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert fault(path)


def test_files_that_are_not_there_or_of_another_kind_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputFailure, match=r"v\.npy cannot be read: No such file"):
        vector_inputs(tmp_path / "v.npy")
    with pytest.raises(InputFailure, match=r"of an unknown kind '\.csv'; vectors are read from \.arrow, \.parquet"):
        vector_inputs(tmp_path / "v.csv")


def test_inputs_are_named_alike_whatever_the_files_are_called(tmp_path: Path) -> None:
    path = write(tmp_path, "npy")
    before = vector_inputs(path)
    assert [ref.name for ref in before] == ["vectors", "vectors.ids"]
    path.with_name("vectors.npy.ids").rename(tmp_path / "other.npy.ids")
    assert vector_inputs(path.rename(tmp_path / "other.npy")) == before
    (tmp_path / "other.npy.ids").write_text("\n".join(reversed(IDS)))
    after = vector_inputs(tmp_path / "other.npy")
    assert after[0] == before[0] and after[1] != before[1]
    assert [ref.name for ref in vector_inputs(write(tmp_path, "parquet"))] == ["vectors"]


def test_ids_of_any_characters_stay_on_one_line(tmp_path: Path) -> None:
    assert "'a\\nb'" in fault(write(tmp_path, "arrow"), [*IDS, "a\nb"])


def test_offsets_that_point_out_of_the_file_are_one_line(tmp_path: Path) -> None:
    path = write(tmp_path, "arrow", ["a", "b"], VECTORS[:2])
    before, after = (np.array([0, 4, end], np.int32).tobytes() for end in (8, 1 << 30))
    assert path.read_bytes().count(before) == 1
    path.write_bytes(path.read_bytes().replace(before, after))
    assert "cannot be read" in fault(path)
