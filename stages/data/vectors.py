"""The user's own vectors of the documents, found again by the documents' ids.

- `.arrow` (file or stream) and `.parquet` hold columns `id` and `vector`, a list of floats; `.npy` holds [N, d] and
  `.safetensors` a tensor `vectors` [N, d], with the ids in the text file `FILE.ids`, one a line, or, of safetensors, as
  a JSON list in the metadata under `ids`
- never by order alone: the documents of a run stand in another order than in the text, the held-out ones last
- every document has one vector, every vector a document: anything else is more likely a wrong file than meant
- values are taken as they are, as float32; only parquet is copied into memory, the others are mapped
- memory: id and place of every vector, about 200 bytes
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import safetensors
from numpy.typing import NDArray

from schemas.failures import InputFailure
from schemas.files import digest_of
from schemas.manifest import InputRef

READABLE = ".arrow, .parquet, .npy and .safetensors"
WITH_IDS_BESIDE = (".npy", ".safetensors")
SHOWN = 3  # ids named in a message
CHECKED = 1 << 13  # vectors looked at together

Floats = NDArray[np.float32]


class GivenVectors:
    """Vectors of one width by place in their file; `ids` names them."""

    def __init__(self, path: Path, ids: Sequence[str], parts: Sequence[np.ndarray]) -> None:
        self.path = path
        self.ids = ids
        self._parts = list(parts)
        self._starts = np.cumsum([0, *map(len, self._parts)])
        self.dimensions = self._parts[0].shape[1]

    @classmethod
    def open(cls, path: Path) -> "GivenVectors":
        """Map the file. Raises InputFailure when it is of another kind, has no vectors, or they are not all usable."""
        with _translated(path):
            ids, parts = _READERS[_kind(path)](path)
        if not ids or not parts[0].shape[1]:
            raise InputFailure(f"{path} holds no vectors")
        vectors = cls(path, ids, parts)
        vectors._refuse_unusable()
        return vectors

    def take(self, places: NDArray[np.int64]) -> Floats:
        """The vectors [n, d] at `places`, in that order."""
        found = np.empty((len(places), self.dimensions), np.float32)
        part_of = np.searchsorted(self._starts, places, side="right") - 1
        with np.errstate(over="ignore"):  # too large for float32: refused when the file was opened
            for part in np.unique(part_of):
                here = part_of == part
                found[here] = self._parts[part][places[here] - self._starts[part]]
        return found

    def reader(self, places: NDArray[np.int64]) -> Callable[[NDArray[np.int64]], Floats]:
        """Reads the vectors of documents by their numbers, where `places` says for each where it stands."""
        return lambda numbers: self.take(places[numbers])

    def _refuse_unusable(self) -> None:
        bad: list[int] = []
        for start in range(0, len(self.ids), CHECKED):
            vectors = self.take(np.arange(start, min(start + CHECKED, len(self.ids))))
            with np.errstate(over="ignore"):
                bad += (start + np.flatnonzero(~np.isfinite((vectors**2).sum(1)))).tolist()
        if bad:
            found = _named([self.ids[place] for place in bad])
            raise InputFailure(f"{self.path}: {len(bad)} vectors hold NaN, infinity or too large a value: {found}")

    def places(self, documents: Sequence[str]) -> NDArray[np.int64]:
        """Where the vector of each document stands. Raises InputFailure unless ids and documents are the same."""
        place_of = _unique(self.ids, str(self.path))
        known = _unique(documents, "the run")
        if missing := [document for document in documents if document not in place_of]:
            raise InputFailure(
                f"{self.path} has no vector for {len(missing)} of {len(documents)} documents of the run: "
                f"{_named(missing)}"
            )
        if extra := [name for name in self.ids if name not in known]:
            raise InputFailure(f"{self.path} has {len(extra)} vectors of no document of the run: {_named(extra)}")
        return np.array([place_of[document] for document in documents], np.int64)


def vector_inputs(path: Path) -> list[InputRef]:
    """The files at `path` as inputs of a stage, whatever they are called. Raises InputFailure."""
    files = {"vectors": path}
    if _kind(path) in WITH_IDS_BESIDE and _beside(path).exists():
        files["vectors.ids"] = _beside(path)
    try:
        return [InputRef(name=name, digest=digest_of(file)) for name, file in files.items()]
    except OSError as error:
        raise InputFailure(f"{path} cannot be read: {error.strerror}") from error


def _kind(path: Path) -> str:
    kind = path.suffix.lower()
    if kind not in _READERS:
        raise InputFailure(f"{path} is of an unknown kind {path.suffix!r}; vectors are read from {READABLE}")
    return kind


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.ids")


def _unique(names: Sequence[str], where: str) -> dict[str, int]:
    place_of = {name: place for place, name in enumerate(names)}
    if len(place_of) < len(names):
        twice = [name for place, name in enumerate(names) if place_of[name] != place]
        raise InputFailure(f"{where} has {len(twice)} ids more than once: {_named(list(dict.fromkeys(twice)))}")
    return place_of


def _named(ids: Sequence[str]) -> str:
    """The first few ids, on one line."""
    shown = [name if name.isprintable() and len(name) <= 80 else repr(name[:80]) for name in ids[:SHOWN]]
    return ", ".join(shown) + (", …" if len(ids) > SHOWN else "")


def _read_arrow(path: Path) -> tuple[list[str], list[np.ndarray]]:
    source = pa.memory_map(str(path))
    try:
        file = pa.ipc.open_file(source)
        batches = [file.get_batch(number) for number in range(file.num_record_batches)]
        schema = file.schema
    except pa.ArrowInvalid:
        stream = pa.ipc.open_stream(pa.memory_map(str(path)))
        batches, schema = list(stream), stream.schema
    return _columns(path, schema, batches, copied=False)


def _read_parquet(path: Path) -> tuple[list[str], list[np.ndarray]]:
    with pq.ParquetFile(path) as file:
        wanted = [name for name in ("id", "vector") if name in file.schema_arrow.names]
        return _columns(path, file.schema_arrow, file.iter_batches(CHECKED, columns=wanted), copied=True)


def _columns(
    path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch], copied: bool
) -> tuple[list[str], list[np.ndarray]]:
    missing = {"id", "vector"} - set(schema.names)
    if missing:
        names = ", ".join(schema.names) or "none"
        raise InputFailure(f"{path} has no column {' and no '.join(sorted(missing))}; its columns: {names}")
    kind = schema.field("vector").type
    listed = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not listed or not pa.types.is_floating(kind.value_type):
        raise InputFailure(f"{path}: column vector holds {kind}, expected lists of floats")
    ids: list[str] = []
    parts: list[np.ndarray] = []
    for batch in batches:
        if batch.num_rows:
            batch.validate(full=True)  # Arrow trusts the offsets in a file, which may point anywhere
            ids += _ids_of(path, batch.column("id"))
            rows = _rows(path, batch.column("vector"), ids[-batch.num_rows :], parts[0].shape[1] if parts else None)
            parts.append(rows.astype(np.float32) if copied else rows)
    return ids, parts or [np.zeros((0, 0))]


def _ids_of(path: Path, column: pa.Array) -> list[str]:
    if column.null_count:
        raise InputFailure(f"{path} has {column.null_count} vectors without an id")
    return pc.cast(column, pa.string()).to_pylist()


def _rows(path: Path, column: pa.Array, ids: Sequence[str], width: int | None) -> np.ndarray:
    """The lists as rows [n, d] that view the file; all must be as long as the first."""
    lengths = np.array(pc.fill_null(pc.list_value_length(column), -1))
    expected = int(lengths[0]) if width is None else width
    odd = np.flatnonzero(lengths != expected).tolist()
    if odd:
        found = "null" if lengths[odd[0]] < 0 else f"{lengths[odd[0]]}"
        raise InputFailure(
            f"{path}: vectors of unequal length, {found} where the first has {expected}: "
            f"{_named([ids[row] for row in odd])}"
        )
    values = column.flatten()
    if values.null_count:
        raise InputFailure(f"{path}: {values.null_count} values inside vectors are null")
    return values.to_numpy(zero_copy_only=False).reshape(len(column), expected)


def _read_npy(path: Path) -> tuple[list[str], list[np.ndarray]]:
    vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    return _with_ids(path, vectors, None)


def _read_safetensors(path: Path) -> tuple[list[str], list[np.ndarray]]:
    with safetensors.safe_open(path, "pt") as file:
        names = list(file.keys())
        if "vectors" not in names:
            raise InputFailure(f"{path} has no tensor vectors; its tensors: {', '.join(names[:8]) or 'none'}")
        tensor = file.get_tensor("vectors")
        ids = (file.metadata() or {}).get("ids")
    if not tensor.is_floating_point():
        raise InputFailure(f"{path}: the tensor vectors holds {tensor.dtype}, expected floats")
    vectors = tensor.numpy() if tensor.dtype.itemsize > 2 else tensor.float().numpy()  # numpy has no bfloat16
    return _with_ids(path, vectors, None if ids is None else _json_ids(path, ids))


def _with_ids(path: Path, vectors: np.ndarray, ids: list[str] | None) -> tuple[list[str], list[np.ndarray]]:
    if vectors.ndim != 2 or not np.issubdtype(vectors.dtype, np.floating):
        raise InputFailure(f"{path} holds {vectors.dtype} of shape {list(vectors.shape)}, expected floats [N, d]")
    if ids is None:
        if not _beside(path).is_file():
            raise InputFailure(f"{path} needs the ids of its {len(vectors)} vectors, one a line, in {_beside(path)}")
        ids = _beside(path).read_text(encoding="utf-8").split("\n")
        ids = ids[:-1] if not ids[-1] else ids
    if len(ids) != len(vectors):
        raise InputFailure(f"{path} has {len(vectors)} vectors and {len(ids)} ids")
    return ids, [vectors]


def _json_ids(path: Path, text: str) -> list[str]:
    ids = json.loads(text)
    if not isinstance(ids, list) or not all(isinstance(name, str) for name in ids):
        raise InputFailure(f"{path}: its metadata `ids` is no JSON list of strings")
    return ids


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, EOFError, pa.ArrowException, safetensors.SafetensorError) as error:
        raise InputFailure(f"{path} cannot be read: {' '.join(str(error).split())}") from error


_READERS: dict[str, Any] = {
    ".arrow": _read_arrow,
    ".parquet": _read_parquet,
    ".npy": _read_npy,
    ".safetensors": _read_safetensors,
}
