"""Documents of a store copied into token shards of their own, so that an expert needs no others."""

from pathlib import Path

import numpy as np

from schemas.files import FileRef
from stages.data.token_store import ShardWriter, TokenStore


def write_cluster(
    store: TokenStore, documents: np.ndarray, folder: Path, split: str, run_dir: Path, vocab_size: int
) -> list[FileRef]:
    """Write the documents with these numbers, in this order, to `folder/<split>-00000.arrow`: one shard, or none.

    Memory: one batch of a shard, whatever the cluster's size.
    """
    with ShardWriter(folder / f"{split}-00000.arrow", run_dir, vocab_size) as writer:
        for number in documents.tolist():
            writer.add(store.ids[number], store.sources[number], int(store.bytes[number]), store.tokens(number))
        shard = writer.finish()
    return [shard] if shard else []
