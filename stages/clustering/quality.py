"""How good a clustering is: balance, agreement with known sources or another clustering, terms it stands out by.

- purity and mutual information look at sources only here, never while fitting: clusters are found without labels
- purity grows with the number of clusters; the normalised mutual information does so far less
"""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from stages.clustering.distances import Labels
from stages.clustering.features import Floats


def balance(sizes: Sequence[int] | NDArray[np.int64] | NDArray[np.float64]) -> float:
    """Largest cluster over the mean: 1 is even, k is all in one. 1 when all are empty."""
    largest, mean = np.max(sizes), np.mean(sizes)
    return float(largest / mean) if mean else 1.0


def numbered(names: Sequence[str]) -> NDArray[np.int64]:
    """A number for each name, equal for equal ones: 8 bytes, where an array of the names would be all as long as the
    longest."""
    numbers: dict[str, int] = {}
    return np.fromiter((numbers.setdefault(name, len(numbers)) for name in names), np.int64, len(names))


def purity(labels: Labels, sources: Sequence[str], weights: NDArray[np.int64] | None = None) -> float:
    """Share of documents (or of their `weights`, such as tokens) that come from the main source of their cluster."""
    amounts = np.ones(len(labels)) if weights is None else weights
    table = sparse.coo_matrix((amounts, (numbered(sources), labels))).tocsc()
    return float(table.max(axis=0).sum() / table.sum())


def mutual_information(labels: Labels, sources: Sequence[str]) -> float:
    """Mutual information of cluster and source over the mean of their entropies: 0 unrelated, 1 the same partition."""
    return float(normalized_mutual_info_score(numbered(sources), labels))


def stability(labelings: Sequence[Labels]) -> float:
    """Mean adjusted Rand index of all pairs of labelings: 1 the same partitions, 0 as alike as random ones."""
    return float(np.mean([adjusted_rand_score(a, b) for a, b in combinations(labelings, 2)]))


def contrast(weighted: sparse.csr_matrix, labels: Labels, clusters: int) -> Floats:
    """Mean tf-idf of each cluster less that of all documents [clusters, vocabulary], for rows of tf-idf."""
    documents = len(labels)
    member = sparse.csr_matrix((np.ones(documents, np.float32), (labels, np.arange(documents))), (clusters, documents))
    sizes = np.maximum(np.bincount(labels, minlength=clusters), 1)[:, None]
    inside = (member @ weighted).toarray() / sizes
    return (inside - np.asarray(weighted.mean(axis=0))).astype(np.float32)
