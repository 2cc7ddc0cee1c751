"""Assignment to clusters of equal size: of a table of costs, or of vectors by chunks.

- `greedy`, then `exchange`, take costs [N, k]: who loses most by not getting its first choice goes first; then pairs of
  clusters exchange documents. An exchange never raises the cost, so a loop over it ends. Not optimal, but within a few
  per mille of the exact assignment at a small part of its time
- `fill` takes vectors: each goes to its nearest centroid by potentials, which leaves the sizes a few per cent off; the
  documents that are too many, those with the least to lose, move to clusters with room. Memory: chunks of scores, and
  24 bytes per document that moves
- `exchange_all` exchanges between vectors, a block of them at a time. Memory: two tables of `TABLE` costs
"""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from stages.clustering.distances import Labels, nearest, relative_costs, score_chunks
from stages.clustering.features import Floats

Rows = NDArray[np.int64]

TABLE = 1 << 22  # costs of a block: 16 MiB
NOISE = 1e-6  # a gain below the rounding of float32 is none, or the exchanges would never end


def greedy(costs: Floats) -> Labels:
    """N // k or N // k + 1 each: documents ask for the cheapest open cluster, which keeps those with most to lose."""
    documents, clusters = costs.shape
    labels = np.full(documents, -1, np.int32)
    room = np.full(clusters, documents // clusters)
    waiting = np.arange(documents)
    while len(open_clusters := np.flatnonzero(room)):
        choice, regret = _first_choice(costs[np.ix_(waiting, open_clusters)])
        waiting = _take(labels, waiting, open_clusters, choice, regret, room)
    return _one_each(labels, waiting, costs[waiting])


def exchange(costs: Floats, labels: Labels, sweeps: int, *, fixed: bool = False) -> Labels:
    """Exchange documents between pairs of clusters while that is cheaper; sizes stay within one of each other.

    With `fixed` they stay what they are, whatever they are.
    """
    ends = np.cumsum(np.bincount(labels, minlength=costs.shape[1]))[:-1]
    members = np.split(np.argsort(labels, kind="stable"), ends)
    while sweeps and _sweep(costs, members, fixed):
        sweeps -= 1
    labels = np.empty(len(costs), np.int32)
    for cluster, documents in enumerate(members):
        labels[documents] = cluster
    return labels


def exchange_all(vectors: Floats, centroids: Floats, labels: Labels) -> Labels:
    """One sweep of exchanges for any number of documents, in blocks of every n-th one. Sizes stay as they are."""
    labels = labels.copy()
    blocks = -(-len(vectors) * len(centroids) // TABLE)
    for first in range(blocks):
        costs = relative_costs(vectors[first::blocks], centroids)
        labels[first::blocks] = exchange(costs, labels[first::blocks], sweeps=1, fixed=True)
    return labels


def fill(vectors: Floats, centroids: Floats, potentials: Floats, device: str = "cpu") -> Labels:
    """N // k or N // k + 1 each, nearly all at the nearest centroid by potentials."""
    labels = nearest(vectors, centroids, potentials, device)
    room = np.full(len(centroids), len(vectors) // len(centroids))
    waiting = _released(vectors, centroids, potentials, labels, room)
    room -= np.bincount(np.delete(labels, waiting), minlength=len(room))
    while len(open_clusters := np.flatnonzero(room)):
        choice, regret = np.empty(len(waiting), np.int64), np.empty(len(waiting), np.float32)
        for rows, scores in score_chunks(vectors, centroids[open_clusters], potentials[open_clusters], waiting):
            choice[rows], regret[rows] = _first_choice(-scores)
        waiting = _take(labels, waiting, open_clusters, choice, regret, room)
    left = [-scores for _, scores in score_chunks(vectors, centroids, potentials, waiting)]
    return _one_each(labels, waiting, np.concatenate(left)) if left else labels


def _first_choice(costs: Floats) -> tuple[Rows, Floats]:
    """The cheapest column of each row, and what the second cheapest costs more: 0 where there is but one."""
    choice = costs.argmin(1)
    if costs.shape[1] == 1:
        return choice, np.zeros(len(costs), np.float32)
    two = np.partition(costs, 1, 1)
    return choice, two[:, 1] - two[:, 0]


def _take(labels: Labels, waiting: Rows, clusters: Rows, choice: Rows, regret: Floats, room: Rows) -> Rows:
    """Give those that ask for a cluster, by choice, its room, most regret first; who goes on waiting."""
    by_regret = np.argsort(-regret, kind="stable")
    stays = np.ones(len(waiting), bool)
    for position, cluster in enumerate(clusters):
        taken = by_regret[choice[by_regret] == position][: room[cluster]]
        labels[waiting[taken]] = cluster
        stays[taken] = False
        room[cluster] -= len(taken)
    return waiting[stays]


def _one_each(labels: Labels, waiting: Rows, costs: Floats) -> Labels:
    """Label the waiting, fewer than there are clusters, with one cluster each, for the least sum of costs [waiting, k].

    So few that the exact assignment costs nothing.
    """
    row, column = linear_sum_assignment(costs)
    labels[waiting[row]] = column
    return labels


def _released(vectors: Floats, centroids: Floats, potentials: Floats, labels: Labels, room: Rows) -> Rows:
    """Rows that must leave: of each cluster that holds too much, those that lose least in the best one with room."""
    held = np.bincount(labels, minlength=len(centroids))
    leaving = [np.empty(0, np.int64)]
    for cluster in np.flatnonzero(held > room):
        mine = np.flatnonzero(labels == cluster)
        choices = np.append(cluster, np.flatnonzero(held < room))
        regret = np.empty(len(mine), np.float32)
        for part, scores in score_chunks(vectors, centroids[choices], potentials[choices], mine):
            regret[part] = scores[:, 0] - scores[:, 1:].max(1, initial=-np.inf)
        leaving.append(mine[np.argsort(-regret, kind="stable")[room[cluster] :]])
    return np.sort(np.concatenate(leaving))


def _sweep(costs: Floats, members: list[Rows], fixed: bool) -> bool:
    """Let each pair of clusters exchange once, but for those that have nothing to gain. True when any did."""
    gains = _largest_gains(costs, members)
    sizes = np.array([0 if fixed else len(documents) for documents in members])
    any_did = False
    for a in range(len(members)):
        b = a
        while (b := _next_partner(gains, sizes, a, b + 1)) < len(members):
            came = _exchange_pair(costs, members, a, b, fixed)
            for cluster, documents in zip((a, b), came, strict=True):
                if len(documents):
                    any_did = True
                    # Those who left are not taken out: what stands there is the largest gain or above it.
                    own = costs[documents]
                    np.maximum(gains[cluster], (own[:, [cluster]] - own).max(0), out=gains[cluster])
            if not fixed:
                sizes[[a, b]] = len(members[a]), len(members[b])
    return any_did


def _next_partner(gains: Floats, sizes: Rows, a: int, start: int) -> int:
    """The first cluster from `start` on with which an exchange may gain anything, or the number of clusters."""
    to_others, from_others, others = gains[a, start:], gains[start:, a], sizes[start:]
    # A vacancy gains nothing by moving: see _exchange_pair.
    to_others = np.where(sizes[a] < others, np.maximum(to_others, 0), to_others)
    from_others = np.where(others < sizes[a], np.maximum(from_others, 0), from_others)
    promising = to_others + from_others > NOISE
    return start + int(promising.argmax()) if promising.any() else len(gains)


def _largest_gains(costs: Floats, members: list[Rows]) -> Floats:
    """What the document [a, b] gains that gains most by going from a to b."""
    gains = np.full((len(members), len(members)), -np.inf, np.float32)
    for cluster, documents in enumerate(members):
        if len(documents):
            own = costs[documents]
            gains[cluster] = (own[:, [cluster]] - own).max(0)
    return gains


def _exchange_pair(costs: Floats, members: list[Rows], a: int, b: int, fixed: bool) -> tuple[Rows, Rows]:
    """Exchange the documents of a that gain most in b for those of b that gain most in a. Who came to a, who to b."""
    gain_a, gain_b = (costs[members[x], x] - costs[members[x], y] for x, y in ((a, b), (b, a)))
    # The smaller cluster has a vacancy, which gains nothing by moving and takes a place in the order like a document.
    vacancy = 0 if fixed else len(members[a]) - len(members[b])
    best_a, best_b = (
        gain_a.max(initial=0 if vacancy < 0 else -np.inf),
        gain_b.max(initial=0 if vacancy > 0 else -np.inf),
    )
    if best_a + best_b <= NOISE:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    first, gain_a = _candidates(gain_a, -best_b, vacancy < 0)
    second, gain_b = _candidates(gain_b, -best_a, vacancy > 0)
    pairs = min(len(first), len(second))
    count = int((gain_a[:pairs] + gain_b[:pairs] > NOISE).sum())
    out_a, out_b = (chosen[:count][chosen[:count] >= 0] for chosen in (first, second))
    to_b, to_a = members[a][out_a], members[b][out_b]
    members[a] = np.append(np.delete(members[a], out_a), to_a)
    members[b] = np.append(np.delete(members[b], out_b), to_b)
    return to_a, to_b


def _candidates(gain: Floats, above: float, vacancy: bool) -> tuple[Rows, Floats]:
    """Positions with a gain above the threshold, largest first, and their gains; -1 stands for the vacancy."""
    positions = np.flatnonzero(gain > above)
    gain = gain[positions]
    if vacancy:
        positions, gain = np.append(positions, -1), np.append(gain, np.float32(0))
    order = np.argsort(-gain, kind="stable")
    return positions[order], gain[order]
