"""k-means over document vectors, with clusters of equal size while it is fitted.

- balanced: every cluster gets N // k or N // k + 1 of the N fitted documents, for any N and k. Equal sizes shape the
  centroids; later documents go to the nearest one, as in cBTM (Gururangan et al. 2023), or stay even by
  `stages.clustering.potentials`
- a few documents are fitted all at once: `greedy`, then only exchanges, so inertia never rises and the loop ends
- of more, all starts run on a sample of `SAMPLE` documents per cluster; the best goes on with all documents, which are
  filled in by potentials and then exchanged, until a round gains less than `SETTLED`
- deterministic for a seed. Only the matrix products of numpy's BLAS and, on another device, torch's choose an order
- memory beside the vectors: 40 bytes a document; three tables of costs in float32, of the sample (1 KiB x k² each, from
  32 clusters on) and then of 16 MiB at most; and the vectors of the sample
"""

from dataclasses import dataclass

import numpy as np
from sklearn.cluster import kmeans_plusplus

from stages.clustering.capacity import exchange, exchange_all, fill, greedy
from stages.clustering.distances import Labels, inertia, means, nearest, own_distances, squared_distances
from stages.clustering.features import Floats
from stages.clustering.potentials import fit_potentials

SAMPLE = 256  # documents per cluster that the starts run on
SMALLEST_SAMPLE = 1 << 13  # a start costs hardly anything with so few
SMALL = 1 << 14  # as many are fitted at once
SWEEPS = 2  # of exchanges in one round: the next round continues them, so more only cost time
ROUGH = 0.02  # by which the potentials may miss equal sizes: the few too many are moved
SETTLED = 3e-4  # of the inertia
ROUNDING = 1e-5  # of the sum of squares: an inertia below it is rounding


class TooFewVectors(ValueError):
    """The vectors differ too little to make so many clusters."""


@dataclass(frozen=True)
class Clustering:
    """Result of a fit: centroids [k, d], the label of each fitted document, and the sum of squared distances."""

    centroids: Floats
    labels: Labels
    inertia: float
    iterations: int


def fit_kmeans(
    vectors: Floats, clusters: int, *, balanced: bool, restarts: int, iterations: int, seed: int, device: str = "cpu"
) -> Clustering:
    """The best of `restarts` runs of k-means, each from its own k-means++ start.

    At most `iterations` rounds in each run on the sample, and at most as many on all documents, which look for their
    nearest centroids on the `device` of torch.

    Raises TooFewVectors when fewer of them differ than there are clusters, ValueError when a value is not finite.
    """
    _check(vectors, clusters)
    if clusters == 1:
        return _single(vectors)
    size = max(SAMPLE * clusters, SMALLEST_SAMPLE)
    at_once = len(vectors) <= max(size, SMALL)
    sample = vectors if at_once else _sample(vectors, size, seed)
    starts = np.random.SeedSequence(seed).generate_state(restarts)
    runs = (_lloyd(sample, clusters, balanced, iterations, int(start)) for start in starts)
    best = min(runs, key=lambda run: run.inertia)
    return best if at_once else _on_all(vectors, best, sample, balanced, iterations, device)


def _check(vectors: Floats, clusters: int) -> None:
    for start in range(0, len(vectors), SMALLEST_SAMPLE):
        if not np.isfinite(vectors[start : start + SMALLEST_SAMPLE]).all():
            raise ValueError("the document vectors hold values that are not finite")
    if (distinct := _distinct(vectors, clusters)) < clusters:
        raise TooFewVectors(f"{distinct} different document vectors cannot make {clusters} clusters")


def _distinct(vectors: Floats, enough: int) -> int:
    """Number of different vectors, or any number from `enough` on: the rest is not looked at then."""
    factors = np.random.default_rng(0).integers(1, 1 << 63, vectors.shape[1], np.uint64)
    seen = np.empty(0, np.uint64)
    for start in range(0, len(vectors), SMALLEST_SAMPLE):
        # A sum of bit patterns times random factors is a hash; sorting whole rows takes minutes where they are equal.
        bits = (vectors[start : start + SMALLEST_SAMPLE].astype(np.float32) + 0).view(np.uint32)  # + 0: no -0
        seen = np.union1d(seen, (bits * factors).sum(1, dtype=np.uint64))
        if len(seen) >= enough:
            break
    return len(seen)


def _single(vectors: Floats) -> Clustering:
    labels = np.zeros(len(vectors), np.int32)
    centroid = means(vectors, labels, 1)
    return Clustering(centroid, labels, inertia(vectors, centroid, labels), 1)


def _sample(vectors: Floats, size: int, seed: int) -> Floats:
    return vectors[np.sort(np.random.default_rng(seed).choice(len(vectors), size, replace=False))]


def _lloyd(vectors: Floats, clusters: int, balanced: bool, iterations: int, seed: int) -> Clustering:
    """A run with all vectors from a k-means++ start, until no label changes."""
    centroids, _ = kmeans_plusplus(vectors, clusters, random_state=seed)
    labels: Labels | None = None
    done = 0
    while done < iterations:
        done += 1
        costs = squared_distances(vectors, centroids)
        if balanced:
            new = exchange(costs, greedy(costs) if labels is None else labels, SWEEPS)
        else:
            new = _without_empty(vectors, centroids, costs.argmin(1).astype(np.int32))
        if labels is not None and np.array_equal(new, labels):
            break
        labels = new
        centroids = means(vectors, labels, clusters)
    assert labels is not None
    return Clustering(centroids, labels, inertia(vectors, centroids, labels), done)


def _on_all(
    vectors: Floats, start: Clustering, sample: Floats, balanced: bool, iterations: int, device: str
) -> Clustering:
    """Go on with all documents until a round gains hardly anything; one that loses is not counted."""
    clusters = len(start.centroids)
    squares = float(np.einsum("nd,nd->n", vectors, vectors).sum(dtype=np.float64))
    centroids, best, done = start.centroids, np.inf, 0
    labels: Labels | None = None
    while done < iterations:
        done += 1
        if not balanced:
            new = _without_empty(vectors, centroids, nearest(vectors, centroids, device=device))
        elif labels is None:
            new = fill(vectors, centroids, fit_potentials(sample, centroids, ROUGH), device)
        else:
            new = exchange_all(vectors, centroids, labels)
        moved = means(vectors, new, clusters)
        # Steiner: the squares about the means are those about zero less those of the means.
        sizes = np.bincount(new, minlength=clusters)
        spread = squares - float(sizes @ (moved.astype(np.float64) ** 2).sum(1))
        gain = best - spread
        if gain > 0:
            centroids, labels, best = moved, new, spread
        if gain <= SETTLED * max(spread, ROUNDING * squares):
            break
    assert labels is not None
    return Clustering(centroids, labels, inertia(vectors, centroids, labels), start.iterations + done)


def _without_empty(vectors: Floats, centroids: Floats, labels: Labels) -> Labels:
    """Give each empty cluster the document that is farthest from its own, out of a cluster that has more."""
    sizes = np.bincount(labels, minlength=len(centroids))
    empty = np.flatnonzero(sizes == 0)
    if len(empty):
        far = own_distances(vectors, centroids, labels)
        for cluster in empty:
            farthest = np.where(sizes[labels] > 1, far, -1).argmax()
            sizes[labels[farthest]] -= 1
            labels[farthest] = cluster
            sizes[cluster] = 1
    return labels
