"""Documents of a store copied into token shards of their own, so that an expert needs no others."""

from pathlib import Path

import numpy as np

from schemas.files import FileRef
from stages.data.token_store import ShardWriter, TokenStore


def write_cluster(
    store: TokenStore, documents: np.ndarray, folder: Path, split: str, run_dir: Path, vocab_size: int
) -> list[FileRef]:
    """Write the documents with these numbers, in this order, to `folder/<split>-00000.arrow`, ….

    Memory: one shard under construction. No documents, no shards.
    """
    writer = ShardWriter(folder, split, run_dir, vocab_size)
    for number in documents.tolist():
        writer.add(store.ids[number], store.sources[number], int(store.bytes[number]), store.tokens(number))
    return writer.finish()
