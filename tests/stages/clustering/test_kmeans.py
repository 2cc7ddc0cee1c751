"""k-means against sklearn's, and the bounded assignment against the exact one."""

from itertools import pairwise

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans

from stages.clustering.kmeans import TooFewVectors, balanced_assignment, fit_kmeans, means, nearest, squared_distances


def blobs(sizes, seed=0, noise=0.1, width=6):
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(len(sizes), width))
    truth = np.repeat(np.arange(len(sizes)), sizes)
    return (centers[truth] + noise * rng.normal(size=(len(truth), width))).astype(np.float32), truth


def exact_cost(costs):
    """The cheapest assignment with N // k or N // k + 1 rows a column: columns repeated, the spare places optional."""
    documents, clusters = costs.shape
    places = documents // clusters + 1
    wide = np.repeat(costs, places, axis=1).astype(np.float64)
    spare = np.full((clusters - documents % clusters, wide.shape[1]), 1e6)
    spare[:, places - 1 :: places] = 0  # one place of a cluster at most may stay empty
    full = np.vstack([wide, spare])
    rows, columns = linear_sum_assignment(full)
    return full[rows, columns].sum()


def test_squared_distances_are_squared_once():
    x, c = np.array([[3.0, 0.0]], np.float32), np.array([[0.0, 4.0], [3.0, 0.0]], np.float32)
    np.testing.assert_allclose(squared_distances(x, c), [[25, 0]], atol=1e-5)


@pytest.mark.parametrize(("documents", "clusters"), [(40, 4), (41, 4), (43, 4), (7, 7), (5, 7), (101, 10), (9, 1)])
def test_every_cluster_gets_its_share_of_any_number(documents, clusters):
    costs = np.random.default_rng(0).random((documents, clusters)).astype(np.float32)
    costs[:, 0] *= 0.1  # everybody wants the first
    labels = balanced_assignment(costs)
    sizes = np.bincount(labels, minlength=clusters)
    assert set(sizes) <= {documents // clusters, -(-documents // clusters)}


@pytest.mark.parametrize(("documents", "clusters", "seed"), [(60, 3, 0), (100, 7, 1), (203, 8, 2), (300, 12, 3)])
def test_assignment_is_within_one_percent_of_the_exact_one(documents, clusters, seed):
    vectors, _ = blobs([documents], seed, noise=1)
    costs = squared_distances(vectors, vectors[:clusters] * 1.5)
    labels = balanced_assignment(costs)
    assert exact_cost(costs) <= costs[np.arange(documents), labels].sum() * (1 + 1e-5)
    assert costs[np.arange(documents), labels].sum() <= exact_cost(costs) * 1.01


def test_separate_groups_of_equal_size_are_found():
    vectors, truth = blobs([30, 30, 30, 30])
    fit = fit_kmeans(vectors, 4, balanced=True, restarts=3, iterations=50, seed=0)
    assert len(set(zip(fit.labels, truth, strict=True))) == 4
    np.testing.assert_array_equal(nearest(vectors, fit.centroids), fit.labels)


def test_balanced_fit_is_even_where_the_groups_are_not():
    vectors, _ = blobs([150, 30, 10, 11])
    fit = fit_kmeans(vectors, 4, balanced=True, restarts=2, iterations=50, seed=0)
    assert sorted(np.bincount(fit.labels)) == [50, 50, 50, 51]
    np.testing.assert_allclose(fit.centroids, means(vectors, fit.labels, 4), rtol=1e-6)


@pytest.mark.parametrize("clusters", [2, 5, 9])
def test_unbalanced_fit_is_as_tight_as_sklearns(clusters):
    vectors, _ = blobs([100, 60, 40, 20, 10], noise=0.6)
    ours = fit_kmeans(vectors, clusters, balanced=False, restarts=10, iterations=300, seed=0)
    reference = KMeans(clusters, n_init=10, random_state=0).fit(vectors)
    assert ours.inertia <= reference.inertia_ * 1.02
    np.testing.assert_array_equal(nearest(vectors, ours.centroids), ours.labels)


def test_balance_costs_inertia_but_never_gains_it():
    vectors, _ = blobs([100, 60, 40], noise=0.6)
    even, free = (fit_kmeans(vectors, 3, balanced=flag, restarts=5, iterations=99, seed=0) for flag in (True, False))
    assert free.inertia <= even.inertia


def test_inertia_never_rises_from_round_to_round():
    vectors, _ = blobs([90, 70, 40, 13], noise=0.8)
    fits = [fit_kmeans(vectors, 5, balanced=True, restarts=1, iterations=n, seed=3) for n in range(1, 15)]
    inertias = [fit.inertia for fit in fits]
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in pairwise(inertias))
    assert inertias[-1] < inertias[0]


def test_more_restarts_are_never_worse():
    vectors, _ = blobs([40] * 6, noise=0.7)
    one, many = (fit_kmeans(vectors, 6, balanced=True, restarts=n, iterations=50, seed=0) for n in (1, 6))
    assert many.inertia <= one.inertia


def test_equal_seeds_give_equal_bytes_and_others_other_starts():
    vectors, _ = blobs([200], noise=1)
    first, again, other = (
        fit_kmeans(vectors, 5, balanced=True, restarts=1, iterations=3, seed=seed) for seed in (1, 1, 2)
    )
    assert first.centroids.tobytes() == again.centroids.tobytes()
    assert first.centroids.tobytes() != other.centroids.tobytes()


def test_no_cluster_stays_empty_without_balance():
    # Two far points take both starts; the third cluster begins in the crowd, where all points but a few are equal.
    vectors = np.array([[0, 0]] * 50 + [[0.001, 0], [9, 9], [9, 9.001]], np.float32)
    fit = fit_kmeans(vectors, 4, balanced=False, restarts=1, iterations=20, seed=0)
    assert np.bincount(fit.labels, minlength=4).min() >= 1


def test_one_cluster_is_the_mean():
    vectors, _ = blobs([20])
    fit = fit_kmeans(vectors, 1, balanced=True, restarts=1, iterations=5, seed=0)
    np.testing.assert_allclose(fit.centroids[0], vectors.mean(0), rtol=1e-5)
    assert fit.inertia == pytest.approx(((vectors - vectors.mean(0)) ** 2).sum(), rel=1e-5)


def test_too_few_different_vectors_are_refused():
    vectors = np.repeat(np.eye(3, dtype=np.float32), 10, axis=0)
    with pytest.raises(TooFewVectors, match="3 different document vectors cannot make 4 clusters"):
        fit_kmeans(vectors, 4, balanced=True, restarts=1, iterations=5, seed=0)


def test_values_that_are_not_finite_are_refused():
    vectors = np.array([[0, 1], [np.nan, 0]], np.float32)
    with pytest.raises(ValueError, match="not finite"):
        fit_kmeans(vectors, 2, balanced=True, restarts=1, iterations=5, seed=0)
