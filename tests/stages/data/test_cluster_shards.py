from pathlib import Path

import numpy as np

from stages.data.cluster_shards import write_cluster
from stages.data.token_store import ShardWriter, TokenStore


def test_the_documents_chosen_come_back_in_order_with_all_that_is_known(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    with ShardWriter(tmp_path / "tokens" / "train-00000.arrow", tmp_path, 300) as writer:
        for number in range(20):
            writer.add(f"d{number}", f"s{number % 3}", 7 * number, generator.integers(0, 300, number))
        shard = writer.finish()
    assert shard
    whole = TokenStore.open([shard.check(tmp_path)])
    chosen = np.array([1, 4, 5, 19])
    refs = write_cluster(whole, chosen, tmp_path / "clusters" / "007", "train", tmp_path, 300)
    assert [ref.path for ref in refs] == ["clusters/007/train-00000.arrow"]
    assert (refs[0].rows, refs[0].tokens) == (4, whole.lengths[chosen].sum())
    store = TokenStore.open([ref.check(tmp_path) for ref in refs])
    assert store.ids == ["d1", "d4", "d5", "d19"] and store.sources == ["s1", "s1", "s2", "s1"]
    assert store.bytes.tolist() == [7, 28, 35, 133]
    for place, number in enumerate(chosen):
        np.testing.assert_array_equal(store.tokens(place), whole.tokens(int(number)))
    assert write_cluster(whole, chosen[:0], tmp_path / "clusters" / "008", "train", tmp_path, 300) == []
