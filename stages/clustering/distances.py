"""Squared distances between vectors and centroids, and what is read off them: the nearest one, means, inertia.

- many vectors are scored in chunks: `CHUNK` scores (1 MiB) are all that exists of the N x k distances at any time
- a score is 2 x·c - ||c||² + potential, which leaves ||x||² out: it is the same for all centroids
- a potential [k] makes a cluster more wanted, argmin ||x - c||² - b_c: see `stages.clustering.potentials`
- on another device of torch (`cuda`) the nearest centroids are found there, in chunks of `DEVICE_CHUNK` scores
  (256 MiB); the rest stays in numpy
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from stages.clustering.features import Floats

Labels = NDArray[np.int32]

CHUNK = 1 << 18
DEVICE_CHUNK = 1 << 26
SUM_ROWS = 1 << 14  # in float64 at once


def squared_distances(vectors: Floats, centroids: Floats) -> Floats:
    """||x - c||² [..., k] of vectors [..., d] and centroids [k, d], never below zero."""
    squares = (vectors**2).sum(-1, keepdims=True) + (centroids**2).sum(-1)
    products = vectors @ centroids.T
    products *= 2
    squares -= products
    return np.maximum(squares, 0, out=squares)


def relative_costs(vectors: Floats, centroids: Floats) -> Floats:
    """||x - c||² - ||x||² [N, k], which orders the centroids of each vector like the distance."""
    doubled, offsets = _affine(centroids, None)
    costs = vectors @ -doubled
    costs -= offsets
    return costs


def nearest(vectors: Floats, centroids: Floats, potentials: Floats | None = None, device: str = "cpu") -> Labels:
    """argmin_c ||x - c||² - potentials[c] of each vector; the first of equals.

    On another `device` than the processor the last bits of the distances differ, so a vector between two centroids may
    get the other one.
    """
    if device != "cpu":
        return _nearest_on(torch.device(device), vectors, centroids, potentials)
    labels = np.empty(len(vectors), np.int32)
    for rows, scores in score_chunks(vectors, centroids, potentials):
        labels[rows] = scores.argmax(1)
    return labels


def score_chunks(
    vectors: Floats, centroids: Floats, potentials: Floats | None = None, chosen: NDArray[np.int64] | None = None
) -> Iterator[tuple[slice, Floats]]:
    """2 x·c - ||c||² + potential [rows, k] of all vectors or the chosen ones, after the slice of them it is about.

    The caller may write into the scores.
    """
    doubled, offsets = _affine(centroids, potentials)
    step = max(CHUNK // len(centroids), 1)
    total = len(vectors) if chosen is None else len(chosen)
    for start in range(0, total, step):
        rows = slice(start, min(start + step, total))
        scores = vectors[rows if chosen is None else chosen[rows]] @ doubled
        scores += offsets
        yield rows, scores


def own_distances(vectors: Floats, centroids: Floats, labels: Labels) -> Floats:
    """||x - c||² of each vector and the centroid of its label [N]."""
    found = np.empty(len(vectors), np.float32)
    for rows in _parts(vectors):
        found[rows] = ((vectors[rows] - centroids[labels[rows]]) ** 2).sum(1)
    return found


def inertia(vectors: Floats, centroids: Floats, labels: Labels) -> float:
    """Sum of the squared distances of vectors to the centroids of their labels, added up in float64."""
    return sum(
        float(((vectors[rows] - centroids[labels[rows]]) ** 2).sum(dtype=np.float64)) for rows in _parts(vectors)
    )


def means(vectors: Floats, labels: Labels, clusters: int) -> Floats:
    """The mean vector [k, d] of each cluster; zeros for an empty one."""
    sums = np.zeros((clusters, vectors.shape[1]))
    for rows in _parts(vectors):
        own = labels[rows]
        member = sparse.csc_matrix((np.ones(len(own)), own, np.arange(len(own) + 1)), (clusters, len(own)))
        sums += member @ vectors[rows].astype(np.float64)
    sizes = np.bincount(labels, minlength=clusters)
    return (sums / np.maximum(sizes, 1)[:, None]).astype(np.float32)


def _parts(vectors: Floats) -> Iterator[slice]:
    return (slice(start, start + SUM_ROWS) for start in range(0, len(vectors), SUM_ROWS))


def _affine(centroids: Floats, potentials: Floats | None) -> tuple[Floats, Floats]:
    """2 c' [d, k] and potential - ||c||² [k]: a score is x @ the first + the second."""
    offsets = -(centroids.astype(np.float64) ** 2).sum(1)
    if potentials is not None:
        offsets += potentials
    return 2 * centroids.T, offsets.astype(np.float32)


def _nearest_on(device: torch.device, vectors: Floats, centroids: Floats, potentials: Floats | None) -> Labels:
    doubled, offsets = (torch.from_numpy(part).to(device) for part in _affine(centroids, potentials))
    step = max(DEVICE_CHUNK // len(centroids), 1)
    chunks = (torch.from_numpy(vectors[start : start + step]) for start in range(0, len(vectors), step))
    found = [torch.addmm(offsets, chunk.to(device), doubled).argmax(1).int().cpu().numpy() for chunk in chunks]
    return np.concatenate(found) if found else np.zeros(0, np.int32)
