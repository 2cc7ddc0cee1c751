from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.failures import IntegrityFailure, ResourceFailure
from stages.data import token_store
from stages.data.token_store import ShardWriter, TokenStore, keep_rows, read_table, write_table


def random_documents(count: int, vocab_size: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, vocab_size, generator.integers(0, 300)) for _ in range(count)]


def written(folder: Path, documents: list[np.ndarray], vocab_size: int, shards: int = 4) -> list[Path]:
    paths = []
    borders = [len(documents) * shard // shards for shard in range(shards + 1)]
    for shard, (start, stop) in enumerate(pairwise(borders)):
        with ShardWriter(folder / "tokens" / f"train-{shard:05d}.arrow", folder, vocab_size) as writer:
            for number in range(start, stop):
                tokens = documents[number]
                writer.add(f"document {number}", f"source {number % 3}", 4 * len(tokens), tokens)
            ref = writer.finish()
        assert ref is not None
        assert (ref.rows, ref.tokens) == (stop - start, sum(map(len, documents[start:stop])))
        paths.append(ref.check(folder))
    return paths


@pytest.mark.parametrize(("vocab_size", "dtype"), [(8192, np.uint16), (65_536, np.uint16), (65_537, np.uint32)])
def test_documents_come_back_in_order_over_all_shards(tmp_path: Path, vocab_size: int, dtype: type) -> None:
    documents = random_documents(50, vocab_size)
    paths = written(tmp_path, documents, vocab_size)
    store = TokenStore.open(paths)
    assert len(paths) == 4
    assert len(store) == 50
    for number, tokens in enumerate(documents):
        np.testing.assert_array_equal(store.tokens(number), tokens)
        assert store.tokens(number).dtype == dtype
    assert store.lengths.tolist() == [len(tokens) for tokens in documents]
    assert store.lengths.dtype == store.bytes.dtype == np.int64
    assert store.bytes.tolist() == [4 * len(tokens) for tokens in documents]
    assert store.ids == [f"document {number}" for number in range(50)]
    assert store.sources == [f"source {number % 3}" for number in range(50)]


def test_tokens_are_read_only_views_of_the_map(tmp_path: Path) -> None:
    store = TokenStore.open(written(tmp_path, [np.arange(100)], 8192, 1))
    view = store.tokens(0)
    assert not view.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1


def test_many_batches_in_one_shard_read_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_store, "BATCH_DOCUMENTS", 7)
    documents = random_documents(50, 8192)
    paths = written(tmp_path, documents, 8192, shards=1)
    store = TokenStore.open(paths)
    assert len(paths) == 1
    np.testing.assert_array_equal(np.concatenate([store.tokens(i) for i in range(50)]), np.concatenate(documents))


def test_no_documents_make_no_shard_and_an_empty_store(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "train-00000.arrow", tmp_path, 8192) as writer:
        assert writer.finish() is None
    store = TokenStore.open([])
    assert (len(store), store.ids, store.lengths.shape, store.bytes.shape) == (0, [], (0,), (0,))
    assert list(tmp_path.iterdir()) == []


def test_a_shard_left_without_finish_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_store, "BATCH_DOCUMENTS", 1)  # so that the file is begun
    with pytest.raises(KeyError), ShardWriter(tmp_path / "a.arrow", tmp_path, 8192) as writer:
        writer.add("a", "s", 1, [1])
        assert len(list(tmp_path.iterdir())) == 1
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with ShardWriter(tmp_path / "a.arrow", tmp_path, 8192) as writer:
        writer.add("a", "s", 1, [1])
    assert list(tmp_path.iterdir()) == []


def test_rows_kept_are_copied_with_all_they_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_store, "BATCH_DOCUMENTS", 7)
    documents = random_documents(50, 100_000)
    (path,) = written(tmp_path, documents, 100_000, shards=1)
    kept = np.arange(50) % 3 == 1
    kept[:14] = False  # two whole batches
    ref = keep_rows(path, kept, tmp_path / "kept.arrow", tmp_path)
    assert ref is not None
    store = TokenStore.open([ref.check(tmp_path)])
    numbers = np.flatnonzero(kept)
    assert store.ids == [f"document {number}" for number in numbers]
    assert store.bytes.tolist() == [4 * len(documents[number]) for number in numbers]
    for place, number in enumerate(numbers):
        np.testing.assert_array_equal(store.tokens(place), documents[number])
    assert (ref.rows, ref.tokens) == (len(numbers), store.lengths.sum())
    assert keep_rows(path, np.zeros(50, dtype=bool), tmp_path / "none.arrow", tmp_path) is None
    assert not (tmp_path / "none.arrow").exists()


@pytest.mark.parametrize("document", [-1, 50])
def test_a_document_outside_the_store_is_an_index_error(tmp_path: Path, document: int) -> None:
    store = TokenStore.open(written(tmp_path, random_documents(50, 8192), 8192))
    with pytest.raises(IndexError):
        store.tokens(document)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    data = written(tmp_path, random_documents(20, 8192), 8192, 1)[0].read_bytes()
    cut = tmp_path / "cut.arrow"
    for length in range(0, len(data), max(1, len(data) // 100)):
        cut.write_bytes(data[:length])
        with pytest.raises(IntegrityFailure):
            TokenStore.open([cut])


def test_another_table_is_no_token_shard(tmp_path: Path) -> None:
    write_table(tmp_path / "other.arrow", {"id": ["a"], "cluster": np.zeros(1, dtype=np.int32)}, tmp_path)
    with pytest.raises(IntegrityFailure, match="not a token shard"):
        TokenStore.open([tmp_path / "other.arrow"])


def test_equal_documents_give_equal_bytes(tmp_path: Path) -> None:
    documents = random_documents(20, 8192)
    first = [path.read_bytes() for path in written(tmp_path / "a", documents, 8192)]
    assert first == [path.read_bytes() for path in written(tmp_path / "b", documents, 8192)]


def test_a_full_disk_is_a_resource_failure_and_leaves_no_shard(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    original = Path.open
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", lambda path, *mode: original(full if path.suffix == ".tmp" else path, *mode))
        with (
            pytest.raises(ResourceFailure, match="no room"),
            ShardWriter(tmp_path / "train-00000.arrow", tmp_path, 8192) as writer,
        ):
            writer.add("a", "s", 1, np.zeros(1 << 20, dtype=np.uint16))
            writer.finish()
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(st.tuples(st.text(st.characters(exclude_categories=["Cs"])), st.integers(-(2**31), 2**31 - 1))))
def test_tables_come_back_as_written(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, int]]) -> None:
    folder = tmp_path_factory.mktemp("table")
    ids, clusters = [row[0] for row in rows], np.array([row[1] for row in rows], dtype=np.int32)
    ref = write_table(folder / "a.arrow", {"id": ids, "cluster": clusters}, folder)
    table = read_table(ref.check(folder))
    assert ref.rows == len(rows)
    assert table["id"] == ids
    assert table["cluster"].dtype == np.int32
    np.testing.assert_array_equal(table["cluster"], clusters)
