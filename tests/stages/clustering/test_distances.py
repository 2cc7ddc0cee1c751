"""Distances, means and inertia against plain numpy; chunks and devices change nothing."""

import tracemalloc

import numpy as np
import pytest

from stages.clustering.distances import (
    inertia,
    means,
    nearest,
    own_distances,
    relative_costs,
    score_chunks,
    squared_distances,
)


@pytest.fixture
def cloud():
    rng = np.random.default_rng(0)
    return rng.normal(size=(500, 6)).astype(np.float32), rng.normal(size=(7, 6)).astype(np.float32)


def test_squared_distances_are_squared_once():
    x, c = np.array([[3.0, 0.0]], np.float32), np.array([[0.0, 4.0], [3.0, 0.0]], np.float32)
    np.testing.assert_allclose(squared_distances(x, c), [[25, 0]], atol=1e-5)


def test_nearest_is_the_argmin_of_the_distances_in_any_chunks(cloud, monkeypatch):
    monkeypatch.setattr("stages.clustering.distances.CHUNK", 50)
    vectors, centroids = cloud
    np.testing.assert_array_equal(nearest(vectors, centroids), squared_distances(vectors, centroids).argmin(1))


def test_potentials_are_taken_off_the_distance(cloud):
    vectors, centroids = cloud
    potentials = np.linspace(-2, 2, 7).astype(np.float32)
    expected = (squared_distances(vectors, centroids) - potentials).argmin(1)
    np.testing.assert_array_equal(nearest(vectors, centroids, potentials), expected)


def test_the_first_of_equal_centroids_is_the_nearest():
    assert nearest(np.ones((3, 2), np.float32), np.zeros((4, 2), np.float32)).tolist() == [0, 0, 0]


def test_a_device_of_torch_gives_the_same_labels(cloud, monkeypatch):
    monkeypatch.setattr("stages.clustering.distances.DEVICE_CHUNK", 200)
    vectors, centroids = cloud
    potentials = np.linspace(-1, 1, 7).astype(np.float32)
    for prices in (None, potentials):
        found = nearest(vectors, centroids, prices, device="cpu:0")
        np.testing.assert_array_equal(found, nearest(vectors, centroids, prices))
        assert found.dtype == np.int32
    assert len(nearest(vectors[:0], centroids, device="cpu:0")) == 0


def test_only_chosen_rows_are_scored(cloud, monkeypatch):
    monkeypatch.setattr("stages.clustering.distances.CHUNK", 21)
    vectors, centroids = cloud
    chosen = np.array([9, 3, 400, 7, 7])
    scores = np.concatenate([part for _, part in score_chunks(vectors, centroids, None, chosen)])
    expected = (vectors[chosen] ** 2).sum(1)[:, None] - squared_distances(vectors[chosen], centroids)
    np.testing.assert_allclose(scores, expected, atol=1e-4)


def test_costs_are_distances_less_what_is_the_same_for_all_centroids(cloud):
    vectors, centroids = cloud
    expected = squared_distances(vectors, centroids) - (vectors**2).sum(1)[:, None]
    np.testing.assert_allclose(relative_costs(vectors, centroids), expected, atol=1e-4)


def test_sums_over_parts_are_the_sums(cloud, monkeypatch):
    vectors, centroids = cloud
    labels = nearest(vectors, centroids)
    whole = means(vectors, labels, 7)
    monkeypatch.setattr("stages.clustering.distances.SUM_ROWS", 33)
    np.testing.assert_allclose(means(vectors, labels, 7), whole, rtol=1e-6)
    expected = ((vectors - centroids[labels]) ** 2).sum(1)
    np.testing.assert_allclose(own_distances(vectors, centroids, labels), expected, rtol=1e-5)
    assert inertia(vectors, centroids, labels) == pytest.approx(expected.sum(), rel=1e-5)


def test_means_are_those_of_numpy_and_zero_for_an_empty_cluster(cloud):
    vectors, _ = cloud
    labels = np.random.default_rng(2).integers(0, 3, len(vectors)).astype(np.int32)
    found = means(vectors, labels, 4)
    for cluster in range(3):
        np.testing.assert_allclose(found[cluster], vectors[labels == cluster].mean(0), atol=1e-5)
    assert not found[3].any()


def test_the_table_of_all_distances_is_never_in_memory():
    vectors = np.random.default_rng(0).normal(size=(60_000, 4)).astype(np.float32)
    tracemalloc.start()
    nearest(vectors, vectors[:200])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 60_000 * 200 * 4 / 8
