"""Bounded assignment: sizes hold for any numbers, and the cost is near that of the exact assignment."""

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from stages.clustering.capacity import exchange, exchange_all, fill, greedy
from stages.clustering.distances import inertia, means, nearest, squared_distances
from stages.clustering.potentials import fit_potentials


def assigned(costs):
    return exchange(costs, greedy(costs), sweeps=10)


def cost_of(costs, labels):
    return costs[np.arange(len(costs)), labels].sum()


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


def crowd(documents, clusters=5, seed=0):
    """Vectors of which half are near the first centroid."""
    rng = np.random.default_rng(seed)
    centroids = rng.normal(size=(clusters, 4)).astype(np.float32)
    truth = np.where(rng.random(documents) < 0.5, 0, rng.integers(0, clusters, documents))
    return (centroids[truth] + 0.5 * rng.normal(size=(documents, 4))).astype(np.float32), centroids


SIZES = [(40, 4), (41, 4), (43, 4), (7, 7), (5, 7), (101, 10), (9, 1)]


@pytest.mark.parametrize(("documents", "clusters"), SIZES)
def test_every_cluster_gets_its_share_of_any_number(documents, clusters):
    costs = np.random.default_rng(0).random((documents, clusters)).astype(np.float32)
    costs[:, 0] *= 0.1  # everybody wants the first
    sizes = np.bincount(assigned(costs), minlength=clusters)
    assert set(sizes) <= {documents // clusters, -(-documents // clusters)}


@pytest.mark.parametrize(("documents", "clusters", "seed"), [(60, 3, 0), (100, 7, 1), (203, 8, 2), (300, 12, 3)])
def test_assignment_is_within_one_percent_of_the_exact_one(documents, clusters, seed):
    vectors, centroids = crowd(documents, clusters, seed)
    costs = squared_distances(vectors, centroids)
    cost = cost_of(costs, assigned(costs))
    assert exact_cost(costs) <= cost * (1 + 1e-5)
    assert cost <= exact_cost(costs) * 1.01


@pytest.mark.parametrize(("documents", "clusters"), [(500, 5), (503, 5), (77, 7), (6, 5)])
def test_filled_clusters_hold_their_share(documents, clusters):
    vectors, centroids = crowd(documents, clusters)
    labels = fill(vectors, centroids, np.zeros(clusters, np.float32))
    sizes = np.bincount(labels, minlength=clusters)
    assert set(sizes) <= {documents // clusters, -(-documents // clusters)}


@pytest.mark.parametrize("seed", range(3))
def test_filling_by_potentials_is_within_one_percent_of_the_exact_assignment(seed):
    vectors, centroids = crowd(500, seed=seed)
    costs = squared_distances(vectors, centroids)
    labels = fill(vectors, centroids, fit_potentials(vectors, centroids))
    assert cost_of(costs, labels) <= exact_cost(costs) * 1.01


def test_filling_moves_only_documents_of_full_clusters():
    vectors, centroids = crowd(1000)
    first = nearest(vectors, centroids)
    moved = first != fill(vectors, centroids, np.zeros(5, np.float32))
    assert moved.sum() == np.maximum(np.bincount(first) - 200, 0).sum()


def test_what_already_fits_stays_where_it_is():
    centroids = np.eye(3, dtype=np.float32)
    vectors = np.repeat(centroids, 4, axis=0)
    labels = fill(vectors, centroids, np.zeros(3, np.float32))
    np.testing.assert_array_equal(labels, nearest(vectors, centroids))


def test_equal_vectors_are_divided_all_the_same():
    vectors, centroids = np.ones((100, 2), np.float32), np.array([[1, 1], [5, 5], [9, 9]], np.float32)
    assert sorted(np.bincount(fill(vectors, centroids, np.zeros(3, np.float32)))) == [33, 33, 34]


def test_exchanges_never_raise_the_cost():
    vectors, centroids = crowd(301)
    for _ in range(4):
        costs = squared_distances(vectors, centroids)
        before = greedy(costs)
        after = exchange(costs, before, sweeps=1)
        assert cost_of(costs, after) <= cost_of(costs, before)
        centroids = means(vectors, after, 5)
        assert inertia(vectors, centroids, after) <= cost_of(costs, after) * (1 + 1e-5)


def test_a_sweep_finds_what_looking_at_every_pair_finds():
    """Passing over pairs that have nothing to gain changes no exchange: a second look finds none."""
    for seed in range(5):
        vectors, centroids = crowd(400, 8, seed)
        costs = squared_distances(vectors, centroids)
        labels = exchange(costs, greedy(costs), sweeps=100)
        for a in range(8):
            for b in range(a):
                gain_a, gain_b = ((costs[:, x] - costs[:, y])[labels == x].max() for x, y in ((a, b), (b, a)))
                assert gain_a + gain_b <= 1e-5


@pytest.mark.parametrize("table", [1 << 22, 500])
def test_exchanges_in_blocks_keep_any_sizes_and_lower_the_cost(table, monkeypatch):
    monkeypatch.setattr("stages.clustering.capacity.TABLE", table)
    vectors, centroids = crowd(603)
    before = np.random.default_rng(0).integers(0, 4, 603).astype(np.int32)  # none in the last cluster
    after = exchange_all(vectors, centroids, before)
    np.testing.assert_array_equal(np.bincount(after, minlength=5), np.bincount(before, minlength=5))
    assert inertia(vectors, centroids, after) < 0.9 * inertia(vectors, centroids, before)
