"""Documents as vectors: tf-idf over token ids, truncated SVD, unit length. All of it is one table, a row per token.

- the vector of a document is the normalised sum of its tokens' rows. Projection is linear and the norm is taken last,
  so this equals count -> idf -> norm -> SVD -> norm: the first norm only scales what the last one undoes
- hence the vector of a growing text is a running sum, O(dimensions) per token (the reference implementation
  of cBTM decodes and vectorises the whole prefix again at every position)
- it needs no words: any tokenizer, any language, code
- for fitting, rows are normalised first, or the longest documents would choose the directions
- memory: the counts of the sample, 8 bytes per distinct token of a document; then documents x dimensions in float32
"""

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn.preprocessing import normalize
from sklearn.utils.extmath import randomized_svd

Floats = NDArray[np.float32]
Tokens = NDArray[np.uint16] | NDArray[np.uint32] | NDArray[np.int64]

BATCH_TOKENS = 1 << 22  # tokens counted at once: 48 MB of indices and ones


def inverse_document_frequency(counts: sparse.csr_matrix) -> Floats:
    """ln((1 + n) / (1 + df)) of every token [vocabulary], for counts [n documents, vocabulary]; 0 for one never seen.

    The 1 that sklearn adds to it is left out: with it commas and articles steer short texts. A token of all documents
    weighs nothing then, so no list of stop words and no cut-off is needed, in any language.
    """
    documents, vocabulary = counts.shape
    frequency = np.bincount(counts.indices, minlength=vocabulary)
    return np.where(frequency > 0, np.log((1 + documents) / (1 + frequency)), 0).astype(np.float32)


def weighted_rows(counts: sparse.csr_matrix, idf: Floats) -> sparse.csr_matrix:
    """tf-idf [documents, vocabulary], every row of unit length (or zero)."""
    return normalize(counts.multiply(idf).tocsr(), copy=False)


def fit_token_vectors(weighted: sparse.csr_matrix, idf: Floats, dimensions: int, seed: int) -> Floats:
    """The table [vocabulary, dimensions]: row w is idf[w] times row w of the right singular vectors of `weighted`.

    There are fewer dimensions when the sample has fewer documents or fewer tokens that weigh anything.
    """
    kept = np.flatnonzero(idf)
    rank = min(dimensions, weighted.shape[0], len(kept))
    table = np.zeros((len(idf), max(rank, 1)), np.float32)
    if rank:
        _, _, components = randomized_svd(weighted[:, kept], rank, n_iter=5, random_state=seed)
        table[kept] = components.T * idf[kept, None]
    return table


def document_vectors(documents: Iterable[Tokens], token_vectors: Floats) -> Floats:
    """Unit vectors [documents, dimensions]; zeros for a document without a token that counts."""
    parts = [counts @ token_vectors for counts in _count_batches(documents, len(token_vectors))]
    return normalised(np.concatenate(parts)) if parts else np.zeros((0, token_vectors.shape[1]), np.float32)


def normalised(sums: Floats) -> Floats:
    """Rows scaled to unit length; a row of zeros stays."""
    length = np.linalg.norm(sums, axis=-1, keepdims=True)
    return np.divide(sums, np.where(length > 0, length, 1), dtype=np.float32)


def count_tokens(documents: Iterable[Tokens], vocabulary: int) -> sparse.csr_matrix:
    """Counts [documents, vocabulary] in float32. Raises IndexError for a token outside the vocabulary."""
    parts = list(_count_batches(documents, vocabulary))
    return sparse.vstack(parts, format="csr") if parts else sparse.csr_matrix((0, vocabulary), dtype=np.float32)


def _count_batches(documents: Iterable[Tokens], vocabulary: int) -> Iterator[sparse.csr_matrix]:
    batch: list[Tokens] = []
    size = 0
    for tokens in documents:
        batch.append(tokens)
        size += len(tokens)
        if size >= BATCH_TOKENS:
            yield _counts(batch, vocabulary)
            batch, size = [], 0
    if batch:
        yield _counts(batch, vocabulary)


def _counts(documents: list[Tokens], vocabulary: int) -> sparse.csr_matrix:
    indices = np.concatenate(documents).astype(np.int32)
    if len(indices) and (indices.max() >= vocabulary or indices.min() < 0):
        raise IndexError(f"token {indices.max()} is outside the vocabulary of {vocabulary}")
    borders = np.cumsum([0, *map(len, documents)])
    counts = sparse.csr_matrix((np.ones(len(indices), np.float32), indices, borders), (len(documents), vocabulary))
    counts.sum_duplicates()
    return counts
