"""Clusters in clusters: every cluster of a level is cut further, with equal sizes at each level.

- the leaves are numbered in the order of the branches: with 4x3, leaves 3, 4 and 5 make up the second of the four
- equal parts of equal parts are equal: leaf sizes differ by no more than the number of levels
"""

from collections.abc import Sequence
from math import prod

import numpy as np

from stages.clustering.distances import inertia, means
from stages.clustering.features import Floats
from stages.clustering.kmeans import Clustering, fit_kmeans


def fit_tree(
    vectors: Floats, branches: Sequence[int], restarts: int, iterations: int, seed: int, device: str = "cpu"
) -> Clustering:
    """Centroids [leaves, d] and the leaf of each vector; `iterations` of the result are those of all fits together.

    Raises TooFewVectors when a node holds fewer different vectors than it has branches.
    """
    labels = np.zeros(len(vectors), np.int32)
    rounds = 0
    for level, count in enumerate(branches):
        parents, labels = labels, np.empty_like(labels)
        for node in range(prod(branches[:level])):
            members = np.flatnonzero(parents == node)
            fit = fit_kmeans(
                vectors[members],
                count,
                balanced=True,
                restarts=restarts,
                iterations=iterations,
                seed=seed,
                device=device,
            )
            labels[members] = node * count + fit.labels
            rounds += fit.iterations
    centroids = means(vectors, labels, prod(branches))
    return Clustering(centroids, labels, inertia(vectors, centroids, labels), rounds)
