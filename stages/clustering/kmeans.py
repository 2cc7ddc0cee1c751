"""k-means over document vectors, with clusters of equal size while it is fitted.

- balanced: every cluster gets N // k or N // k + 1 of the N fitted documents, for any N and k. Equal sizes shape the
  centroids only; later documents go to the nearest one, as in cBTM (Gururangan et al. 2023)
- the bounded assignment is greedy by regret (who loses most by not getting its first choice goes first), then improved
  by exchanges between pairs of clusters. Later rounds only exchange, so inertia never rises and the loop ends
- the bounded assignment is not optimal, but within a few per mille of the exact one at a small part of its time
- deterministic for a seed. Memory: documents x clusters in float32 beside the vectors
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import kmeans_plusplus

Floats = NDArray[np.float32]
Labels = NDArray[np.int32]

SWEEPS = 2  # of exchanges in one round: the next round continues them, so more only cost time
NOISE = 1e-6  # a gain below the rounding of float32 is none, or the exchanges would never end


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
    vectors: Floats, clusters: int, *, balanced: bool, restarts: int, iterations: int, seed: int
) -> Clustering:
    """The best of `restarts` runs of k-means, each from its own k-means++ start.

    Raises TooFewVectors when fewer of them differ than there are clusters, ValueError when a value is not finite.
    """
    if not np.isfinite(vectors).all():
        raise ValueError("the document vectors hold values that are not finite")
    if clusters == 1 and len(vectors):
        return _single(vectors)
    distinct = len(np.unique(vectors, axis=0))
    if distinct < clusters:
        raise TooFewVectors(f"{distinct} different document vectors cannot make {clusters} clusters")
    starts = np.random.SeedSequence(seed).generate_state(restarts)
    runs = [_lloyd(vectors, clusters, balanced, iterations, int(start)) for start in starts]
    return min(runs, key=lambda run: run.inertia)


def nearest(vectors: Floats, centroids: Floats) -> Labels:
    """The nearest centroid of each vector; the first of equals."""
    return squared_distances(vectors, centroids).argmin(1).astype(np.int32)


def squared_distances(vectors: Floats, centroids: Floats) -> Floats:
    """||x - c||² [..., k] of vectors [..., d] and centroids [k, d], never below zero."""
    squares = (vectors**2).sum(-1, keepdims=True) + (centroids**2).sum(-1)
    return np.maximum(squares - 2 * (vectors @ centroids.T), 0)


def balanced_assignment(costs: Floats) -> Labels:
    """Labels of N documents for costs [N, k] such that every cluster gets N // k or N // k + 1 of them."""
    return _exchange(costs, _greedy(costs), sweeps=10)


def _single(vectors: Floats) -> Clustering:
    labels = np.zeros(len(vectors), np.int32)
    centroid = means(vectors, labels, 1)
    return Clustering(centroid, labels, inertia(vectors, centroid, labels), 1)


def _lloyd(vectors: Floats, clusters: int, balanced: bool, iterations: int, seed: int) -> Clustering:
    centroids, _ = kmeans_plusplus(vectors, clusters, random_state=seed)
    labels: Labels | None = None
    done = 0
    while done < iterations:
        done += 1
        costs = squared_distances(vectors, centroids)
        if balanced:
            new = _exchange(costs, _greedy(costs) if labels is None else labels, SWEEPS)
        else:
            new = _without_empty(costs, costs.argmin(1).astype(np.int32))
        if labels is not None and np.array_equal(new, labels):
            break
        labels = new
        centroids = means(vectors, labels, clusters)
    assert labels is not None
    return Clustering(centroids, labels, inertia(vectors, centroids, labels), done)


def inertia(vectors: Floats, centroids: Floats, labels: Labels) -> float:
    """Sum of the squared distances of vectors to the centroids of their labels, added up in float64."""
    return float(((vectors - centroids[labels]) ** 2).sum(dtype=np.float64))


def means(vectors: Floats, labels: Labels, clusters: int) -> Floats:
    """The mean vector [k, d] of each cluster; zeros for an empty one."""
    sums = np.stack([vectors[labels == cluster].sum(0, dtype=np.float64) for cluster in range(clusters)])
    sizes = np.bincount(labels, minlength=clusters)
    return (sums / np.maximum(sizes, 1)[:, None]).astype(np.float32)


def _greedy(costs: Floats) -> Labels:
    """All ask for their cheapest open cluster; a cluster asked by too many keeps those with the most to lose."""
    documents, clusters = costs.shape
    labels = np.full(documents, -1, np.int32)
    room = np.full(clusters, documents // clusters)
    waiting = np.arange(documents)
    while len(open_clusters := np.flatnonzero(room)):
        offers = costs[np.ix_(waiting, open_clusters)]
        choice = offers.argmin(1)
        two = np.partition(offers, 1, 1)[:, :2] if len(open_clusters) > 1 else np.repeat(offers, 2, 1)
        by_regret = np.argsort(two[:, 0] - two[:, 1], kind="stable")
        for position, cluster in enumerate(open_clusters):
            taken = by_regret[choice[by_regret] == position][: room[cluster]]
            labels[waiting[taken]] = cluster
            room[cluster] -= len(taken)
        waiting = waiting[labels[waiting] < 0]
    if len(waiting):  # fewer than k are left over, one more for as many clusters: small enough to be exact
        row, column = linear_sum_assignment(costs[waiting])
        labels[waiting[row]] = column
    return labels


def _exchange(costs: Floats, labels: Labels, sweeps: int) -> Labels:
    """Exchange documents between pairs of clusters while that is cheaper; sizes stay within one of each other."""
    by_cluster = np.asfortranarray(costs)  # a column is one cluster's costs: contiguous, as it is read below
    clusters = costs.shape[1]
    members = [np.flatnonzero(labels == cluster) for cluster in range(clusters)]
    for _ in range(sweeps):
        changed = False
        for a in range(clusters):
            for b in range(a + 1, clusters):
                changed |= _exchange_pair(by_cluster, members, a, b)
        if not changed:
            break
    labels = np.empty(len(costs), np.int32)
    for cluster, documents in enumerate(members):
        labels[documents] = cluster
    return labels


def _exchange_pair(costs: Floats, members: list[NDArray[np.int64]], a: int, b: int) -> bool:
    """Exchange the documents of a that gain most in b for those of b that gain most in a. True when any moved."""
    gain_a, gain_b = (costs[members[x], x] - costs[members[x], y] for x, y in ((a, b), (b, a)))
    # The smaller cluster has a vacancy, which gains nothing by moving and takes a place in the order like a document.
    vacancy = len(members[a]) - len(members[b])
    best_a, best_b = (
        gain_a.max(initial=0 if vacancy < 0 else -np.inf),
        gain_b.max(initial=0 if vacancy > 0 else -np.inf),
    )
    if best_a + best_b <= NOISE:
        return False
    first, gain_a = _candidates(gain_a, -best_b, vacancy < 0)
    second, gain_b = _candidates(gain_b, -best_a, vacancy > 0)
    pairs = min(len(first), len(second))
    count = int((gain_a[:pairs] + gain_b[:pairs] > NOISE).sum())
    out_a, out_b = (chosen[:count][chosen[:count] >= 0] for chosen in (first, second))
    to_b, to_a = members[a][out_a], members[b][out_b]
    members[a] = np.append(np.delete(members[a], out_a), to_a)
    members[b] = np.append(np.delete(members[b], out_b), to_b)
    return True


def _candidates(gain: Floats, above: float, vacancy: bool) -> tuple[NDArray[np.int64], Floats]:
    """Positions with a gain above the threshold, largest first, and their gains; -1 stands for the vacancy."""
    positions = np.flatnonzero(gain > above)
    gain = gain[positions]
    if vacancy:
        positions, gain = np.append(positions, -1), np.append(gain, np.float32(0))
    order = np.argsort(-gain, kind="stable")
    return positions[order], gain[order]


def _without_empty(costs: Floats, labels: Labels) -> Labels:
    """Give each empty cluster the document that is farthest from its own, out of a cluster that has more."""
    sizes = np.bincount(labels, minlength=costs.shape[1])
    for cluster in np.flatnonzero(sizes == 0):
        own = np.where(sizes[labels] > 1, costs[np.arange(len(labels)), labels], -1)
        farthest = own.argmax()
        sizes[labels[farthest]] -= 1
        labels[farthest] = cluster
        sizes[cluster] = 1
    return labels
