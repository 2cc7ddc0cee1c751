"""A cluster for every document, in chunks by several threads.

- the chunks depend on the documents alone, and what is added up is added in their order: the number of threads changes
  no bit
- memory: `CHUNK_TOKENS` tokens and `CHUNK_DISTANCES` distances per thread, twice; 16 bytes per document stay
"""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from stages.clustering.distances import Labels, squared_distances
from stages.clustering.features import Floats

CHUNK_TOKENS = 1 << 20
CHUNK_DOCUMENTS = 1 << 12
CHUNK_DISTANCES = 1 << 22

Numbers = NDArray[np.int64]
Vectors = Callable[[Numbers], Floats]  # the vectors [n, d] of the documents with these numbers
R = TypeVar("R")


@dataclass(frozen=True)
class Documents:
    """A split. `vectors` are to cluster by, `token_vectors` to route by: the same unless the user gave some."""

    ids: Sequence[str]
    sources: Sequence[str]
    lengths: Numbers
    vectors: Vectors
    token_vectors: Vectors


@dataclass(frozen=True)
class Assignment:
    """For every document its cluster, the nearest other one (-1 with one cluster), and how far it is from both.

    `distances`: squared, to the own centroid. `margins`: by how much the other is farther, where there are potentials
    less those; of documents that say nothing (their vector is zero) infinite.
    """

    labels: Labels
    second: Labels
    distances: Floats
    margins: Floats


def assign(
    vectors: Vectors,
    lengths: Numbers,
    centroids: Floats,
    workers: int | None = None,
    labels: Labels | None = None,
    potentials: Floats | None = None,
) -> Assignment:
    """Assign documents with so many tokens each to the nearest centroid, the first of equals; or to their `labels`.

    With `potentials` [k], which are taken off the squared distances, to that with the least difference.
    """

    def compute(numbers: Numbers) -> tuple[Labels, Labels, Floats, Floats]:
        return _two(vectors(numbers), centroids, potentials, None if labels is None else labels[numbers])

    none = _two(np.zeros((0, centroids.shape[1]), np.float32), centroids, None, None)
    columns = zip(none, *in_chunks(compute, lengths, len(centroids), workers), strict=True)
    return Assignment(*(np.concatenate(pieces) for pieces in columns))


def _two(
    vectors: Floats, centroids: Floats, potentials: Floats | None, labels: Labels | None
) -> tuple[Labels, Labels, Floats, Floats]:
    """Labels, nearest others, distances and margins of some documents."""
    distances = squared_distances(vectors, centroids)
    costs = distances if potentials is None else distances - potentials
    rows = np.arange(len(vectors))
    own = costs.argmin(1).astype(np.int32) if labels is None else labels
    to_own, least = distances[rows, own], costs[rows, own]
    if len(centroids) == 1:
        return own, np.full_like(own, -1), to_own, np.full_like(to_own, np.inf)
    costs[rows, own] = np.inf
    other = costs.argmin(1).astype(np.int32)
    margins = np.where(vectors.any(axis=1), costs[rows, other] - least, np.float32(np.inf))
    return own, other, to_own, margins


def assign_by_name(ids: Sequence[str], clusters: int, seed: int) -> Labels:
    """A random partition that stays as it is when documents come and go: a hash of seed and id."""
    digests = (hashlib.sha256(f"{seed}:{name}".encode()).digest() for name in ids)
    return np.fromiter((int.from_bytes(digest[:8]) % clusters for digest in digests), np.int32, len(ids))


def overlapping(assignment: Assignment, share: float) -> Labels:
    """The second cluster of the given share of the documents, those with the smallest margins; -1 for the others."""
    second = np.full_like(assignment.labels, -1)
    order = np.argsort(assignment.margins, kind="stable")[: round(share * len(second))]
    order = order[np.isfinite(assignment.margins[order])]
    second[order] = assignment.second[order]
    return second


def members(labels: Labels, second: Labels | None, clusters: int) -> list[Numbers]:
    """Numbers of the documents of each cluster, ascending; those it shares among them where `second` says so."""
    numbers = np.arange(len(labels))
    if second is not None:
        shared = np.flatnonzero(second >= 0)
        labels, numbers = np.append(labels, second[shared]), np.append(numbers, shared)
    order = np.lexsort((numbers, labels))
    return np.split(numbers[order], np.cumsum(np.bincount(labels, minlength=clusters))[:-1])


def cluster_means(
    vectors: Vectors, lengths: Numbers, labels: Labels, clusters: int, workers: int | None = None
) -> Floats:
    """The mean vector [clusters, d] of the documents of each cluster; zeros for an empty one."""

    def sums(numbers: Numbers) -> NDArray[np.float64]:
        here = len(numbers)
        member = sparse.csr_matrix((np.ones(here), (labels[numbers], np.arange(here))), (clusters, here))
        return member @ vectors(numbers).astype(np.float64)

    total = sum(in_chunks(sums, lengths, clusters, workers))
    sizes = np.bincount(labels, minlength=clusters)
    return np.asarray(total / np.maximum(sizes, 1)[:, None], np.float32)


def in_chunks(
    compute: Callable[[Numbers], R], lengths: Numbers, clusters: int = 1, workers: int | None = None
) -> Iterator[R]:
    """What `compute` says of the documents' numbers, chunk by chunk in order; a few chunks are computed at once."""
    count = workers or _cores()
    with ThreadPoolExecutor(count) as threads:
        begun: deque[Future[R]] = deque()
        for numbers in _chunks(lengths, max(1, min(CHUNK_DOCUMENTS, CHUNK_DISTANCES // clusters))):
            begun.append(threads.submit(compute, numbers))
            if len(begun) > 2 * count:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _chunks(lengths: Numbers, most: int) -> Iterator[Numbers]:
    """Consecutive numbers, `most` and `CHUNK_TOKENS` tokens at a time; a longer document comes alone."""
    ends = np.cumsum(lengths)
    start, tokens = 0, 0
    while start < len(lengths):
        full = int(np.searchsorted(ends, tokens + CHUNK_TOKENS, side="right"))
        stop = min(start + most, max(start + 1, full))
        yield np.arange(start, stop)
        start, tokens = stop, int(ends[stop - 1])
