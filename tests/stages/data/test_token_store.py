from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.failures import IntegrityFailure, ResourceFailure
from stages.data import token_store
from stages.data.token_store import ShardWriter, TokenStore, read_table, write_table


def random_documents(count: int, vocab_size: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, vocab_size, generator.integers(0, 300)) for _ in range(count)]


def written(folder: Path, documents: list[np.ndarray], vocab_size: int, shard_tokens: int = 1000) -> list[Path]:
    writer = ShardWriter(folder / "tokens", "train", folder, vocab_size, shard_tokens)
    for number, tokens in enumerate(documents):
        writer.add(f"document {number}", f"source {number % 3}", 4 * len(tokens), tokens)
    return [ref.check(folder) for ref in writer.finish()]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(8192, np.uint16), (65_536, np.uint16), (65_537, np.uint32)])
def test_documents_come_back_in_order_over_all_shards(tmp_path: Path, vocab_size: int, dtype: type) -> None:
    documents = random_documents(50, vocab_size)
    paths = written(tmp_path, documents, vocab_size)
    store = TokenStore.open(paths)
    assert len(paths) > 3
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
    store = TokenStore.open(written(tmp_path, [np.arange(100)], 8192))
    view = store.tokens(0)
    assert not view.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1


def test_a_shard_ends_with_the_document_that_fills_it(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "valid", tmp_path, 8192, shard_tokens=100)
    for number, length in enumerate([60, 60, 100, 5]):
        writer.add(str(number), "s", length, np.zeros(length, dtype=np.uint16))
    refs = writer.finish()
    assert [ref.path for ref in refs] == ["valid-00000.arrow", "valid-00001.arrow", "valid-00002.arrow"]
    assert [(ref.rows, ref.tokens) for ref in refs] == [(2, 120), (1, 100), (1, 5)]


def test_many_batches_in_one_shard_read_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_store, "BATCH_DOCUMENTS", 7)
    documents = random_documents(50, 8192)
    paths = written(tmp_path, documents, 8192, shard_tokens=1 << 20)
    store = TokenStore.open(paths)
    assert len(paths) == 1
    np.testing.assert_array_equal(np.concatenate([store.tokens(i) for i in range(50)]), np.concatenate(documents))


def test_no_documents_make_no_shards_and_an_empty_store(tmp_path: Path) -> None:
    assert ShardWriter(tmp_path, "train", tmp_path, 8192).finish() == []
    store = TokenStore.open([])
    assert (len(store), store.ids, store.lengths.shape, store.bytes.shape) == (0, [], (0,), (0,))


@pytest.mark.parametrize("document", [-1, 50])
def test_a_document_outside_the_store_is_an_index_error(tmp_path: Path, document: int) -> None:
    store = TokenStore.open(written(tmp_path, random_documents(50, 8192), 8192))
    with pytest.raises(IndexError):
        store.tokens(document)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    data = written(tmp_path, random_documents(20, 8192), 8192, 1 << 20)[0].read_bytes()
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
    writer = ShardWriter(tmp_path, "train", tmp_path, 8192)
    writer.add("a", "s", 1, np.zeros(1 << 20, dtype=np.uint16))
    original = Path.open
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", lambda path, *mode: original(full if path.suffix == ".tmp" else path, *mode))
        with pytest.raises(ResourceFailure, match="no room"):
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
