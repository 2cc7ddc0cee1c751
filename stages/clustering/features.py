"""Documents as vectors: tf-idf over token ids, truncated SVD, unit length. All of it is one table, a row per token.

- the vector of a document is the normalised sum of its tokens' rows. Projection is linear and the norm is taken last,
  so this equals count -> idf -> norm -> SVD -> norm: the first norm only scales what the last one undoes
- hence the vector of a growing text is a running sum, O(dimensions) per token (the reference implementation
  of cBTM decodes and vectorises the whole prefix again at every position)
- it needs no words: any tokenizer, any language, code
- for fitting, rows are normalised first, or the longest documents would choose the directions
- applying it is an embedding bag of torch: nine times as fast as a sparse product of counts and table. One thread sums
  a document, in the order of its tokens, so the number of threads changes no bit
- memory: the counts of the sample, 8 bytes per distinct token of a document, three and a half times that while they
  become tf-idf; then documents x dimensions in float32
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from sklearn.preprocessing import normalize
from sklearn.utils.extmath import randomized_svd

Floats = NDArray[np.float32]
Tokens = NDArray[np.uint16] | NDArray[np.uint32] | NDArray[np.int64]

BATCH_TOKENS = 1 << 22  # tokens summed at once: 16 MiB of indices


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
    """Unit vectors [documents, dimensions]; zeros for a document without a token that counts.

    Raises IndexError for a token outside the vocabulary.
    """
    table = torch.from_numpy(token_vectors)
    sums = [np.zeros((0, token_vectors.shape[1]), np.float32)]
    for batch in _batches(documents):
        tokens = np.concatenate(batch).astype(np.int32)
        _check_range(tokens, len(token_vectors))
        borders = np.cumsum([0, *map(len, batch)], dtype=np.int32)
        bags = torch.nn.functional.embedding_bag(
            torch.from_numpy(tokens), table, torch.from_numpy(borders), mode="sum", include_last_offset=True
        )
        sums.append(bags.numpy())
    return normalised(np.concatenate(sums))


def normalised(sums: Floats) -> Floats:
    """Rows scaled to unit length; a row of zeros stays."""
    length = np.linalg.norm(sums, axis=-1, keepdims=True)
    return np.divide(sums, np.where(length > 0, length, 1), dtype=np.float32)


def count_tokens(documents: Iterable[Tokens], vocabulary: int) -> sparse.csr_matrix:
    """Counts [documents, vocabulary] in float32. Raises IndexError for a token outside the vocabulary."""
    kinds, numbers, borders = [np.empty(0, np.int32)], [np.empty(0, np.float32)], [0]
    for tokens in documents:
        found, often = np.unique(tokens, return_counts=True)
        kinds.append(found.astype(np.int32))
        numbers.append(often.astype(np.float32))
        borders.append(borders[-1] + len(found))
    indices = np.concatenate(kinds)
    _check_range(indices, vocabulary)
    return sparse.csr_matrix((np.concatenate(numbers), indices, borders), (len(borders) - 1, vocabulary))


def _batches(documents: Iterable[Tokens]) -> Iterator[list[Tokens]]:
    batch: list[Tokens] = []
    size = 0
    for tokens in documents:
        batch.append(tokens)
        size += len(tokens)
        if size >= BATCH_TOKENS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _check_range(tokens: NDArray[np.int32], vocabulary: int) -> None:
    if len(tokens) and (tokens.max() >= vocabulary or tokens.min() < 0):
        raise IndexError(f"token {tokens.max()} is outside the vocabulary of {vocabulary}")
