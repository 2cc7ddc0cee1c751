"""Potentials: one number per cluster that, taken off its distances, keeps the clusters even on documents not yet seen.

    cluster of x = argmin_c ||x - c||² - b_c

- b are the dual prices of the transport from documents to clusters of equal size. A cluster that too many want has a
  low one. At the optimum the fitted documents fall into even parts, and so do others of the same distribution, up to
  the chance of both samples: about sqrt(2 k ln(k) / N) for the largest of k clusters
- the dual is smoothed, mean_i temperature ln sum_c exp((score_ic + b_c) / temperature) - mean_c b_c, convex and twice
  differentiable, and minimised by Newton's method [k, k] while the temperature falls by thirds, until the hard sizes
  agree. The minimum of one temperature is a good start for the next; a low one at once would hardly move, because gaps
  between clusters have no documents that could tell the slope
- no cluster starves: each has its share of the fitted documents, unless vectors are equal, which no price can divide
- cooled down on `FEW` vectors per cluster, finished on `MANY`: the time does not grow with the number of documents.
  Memory: chunks of scores, [k, k] in float64, 8 bytes per document
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stages.clustering.distances import score_chunks
from stages.clustering.features import Floats

Rows = NDArray[np.int64]
Sums = NDArray[np.float64]

FEW = 512  # vectors per cluster on which the temperature falls
MANY = 4096  # vectors per cluster that have the last word: their shares are off by 1.6 %
CHANCE = 0.25  # standard deviations of a share that are not worth a pass
COOLING = 3
LEVELS = 12  # the last temperature is 3^-11 = 6e-6 of the first
PATIENCE = 3  # levels
NEWTON_STEPS = 12  # at one temperature at most; the first takes about 6, each next one 2
LONGEST_STEP = 8  # temperatures; further away the quadratic model says nothing
RIDGE = 1e-4  # of the mean curvature: a cluster without neighbours has none
FAINTEST = -30  # exponent of the weakest membership: denormal numbers below would take ten times as long
FLAT = 1e-9  # over the temperature, for where no cluster has neighbours


def fit_potentials(vectors: Floats, centroids: Floats, tolerance: float = 0.005) -> Floats:
    """Potentials [k] of mean zero such that every centroid is the nearest of equally many vectors [n, d].

    Stops when no cluster is off by more than `tolerance` times its share, or by a quarter of what chance does to a
    share of so few documents, or when cooling does not help any more.
    """
    clusters, documents = len(centroids), len(vectors)
    if clusters == 1 or not documents:
        return np.zeros(clusters, np.float32)
    few, many = (_sample(documents, clusters * size) for size in (FEW, MANY))
    dual = _Dual(vectors, centroids, few)
    best = _cooled(dual, _Point(np.zeros(clusters), _first_temperature(dual), np.inf), tolerance)
    if len(few) < len(many):
        # Two levels warmer, or the few vectors near a border of the sample say nothing about the others there.
        warm = _Point(best.potentials, best.temperature * COOLING**2, np.inf)
        best = _cooled(_Dual(vectors, centroids, many), warm, tolerance)
    return best.potentials.astype(np.float32)


def _sample(documents: int, size: int) -> Rows:
    if documents <= size:
        return np.arange(documents)
    return np.sort(np.random.default_rng(0).choice(documents, size, replace=False))


@dataclass(frozen=True)
class _Point:
    """Potentials found at a temperature, and how far the hard sizes are from the shares: the largest ratio less 1."""

    potentials: Sums
    temperature: float
    error: float


@dataclass(frozen=True)
class _Slope:
    """The dual at one point: value, gradient [k], curvature [k, k], and shares [k] by the nearest centroid.

    Gradient and shares are times k: in parts of an equal share.
    """

    value: float
    gradient: Sums
    curvature: Sums
    shares: Sums


@dataclass(frozen=True)
class _Dual:
    """The smoothed dual of some rows of the vectors."""

    vectors: Floats
    centroids: Floats
    rows: Rows

    def at(self, potentials: Sums, temperature: float) -> _Slope:
        """Value, gradient and curvature, in one pass over the rows."""
        clusters = len(self.centroids)
        value, soft, hard = 0.0, np.zeros(clusters), np.zeros(clusters)
        overlap = np.zeros((clusters, clusters))
        for _, scores in score_chunks(self.vectors, self.centroids, potentials.astype(np.float32), self.rows):
            first = scores.argmax(1)
            best = scores[np.arange(len(scores)), first]
            scores -= best[:, None]
            scores *= np.float32(1 / temperature)
            np.maximum(scores, FAINTEST, out=scores)
            np.exp(scores, out=scores)
            sums = scores.sum(1)
            value += float((best + temperature * np.log(sums)).sum(dtype=np.float64))
            hard += np.bincount(first, minlength=clusters)
            scores /= sums[:, None]
            soft += scores.sum(0)
            overlap += scores.T @ scores
        count = len(self.rows)
        curvature = (np.diag(soft) - overlap) / (count * temperature)
        shares = clusters / count * np.stack([soft, hard])
        return _Slope(value / count - float(potentials.mean()), shares[0] - 1, curvature, shares[1])


def _first_temperature(dual: _Dual) -> float:
    """The mean margin by which the nearest centroid is nearer than the second."""
    margins = 0.0
    for _, scores in score_chunks(dual.vectors, dual.centroids, None, dual.rows):
        two = np.partition(scores, -2, 1)[:, -2:]
        margins += float((two[:, 1] - two[:, 0]).sum(dtype=np.float64))
    return margins / len(dual.rows) or 1.0


def _cooled(dual: _Dual, start: _Point, tolerance: float) -> _Point:
    """The best of the minima of falling temperatures.

    Done at the first that is within the tolerance, or when several levels in a row have hardly helped.
    """
    tolerance = max(tolerance, CHANCE * float(len(dual.centroids) / len(dual.rows)) ** 0.5)
    point = best = start
    helped = 0
    for level in range(LEVELS):
        point = _minimised(dual, point.potentials, start.temperature / COOLING**level, tolerance)
        if point.error < 0.9 * best.error:
            helped = level
        best = min(best, point, key=lambda found: found.error)
        if best.error <= tolerance or level - helped >= PATIENCE:
            break
    return best


def _minimised(dual: _Dual, potentials: Sums, temperature: float, tolerance: float) -> _Point:
    """Newton's method at one temperature: steps of bounded length, halved when they do not lower the value."""
    best = _Point(potentials, temperature, np.inf)
    base, value = potentials, np.inf
    for _ in range(NEWTON_STEPS):
        slope = dual.at(potentials, temperature)
        error = float(np.abs(slope.shares - 1).max())
        if error < best.error:
            best = _Point(potentials, temperature, error)
        # Near enough to the minimum when what is left to go is little beside what the temperature blurs.
        if best.error <= tolerance or np.abs(slope.gradient).max() <= max(tolerance / 2, error / 5):
            break
        if slope.value > value + 1e-6 * abs(value):
            potentials = (base + potentials) / 2
            continue
        base, value = potentials, slope.value
        potentials = base + _step(slope, temperature)
    return best


def _step(slope: _Slope, temperature: float) -> Sums:
    """Newton's step, bounded along each eigenvector of the curvature for itself.

    A group of clusters that is far from the others must go far against hardly any curvature; a bound on the whole step
    would let it hold up the rest.
    """
    curvature, directions = np.linalg.eigh(slope.curvature)
    least = RIDGE * curvature.mean() + FLAT / temperature
    lengths = -(directions.T @ slope.gradient) / len(curvature) / np.maximum(curvature, least)
    longest = LONGEST_STEP * temperature / np.abs(directions).max(0)
    step = directions @ np.clip(lengths, -longest, longest)
    return np.asarray(step - step.mean(), np.float64)
