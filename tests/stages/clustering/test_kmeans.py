"""k-means against sklearn's, and with sizes that must be even; a few documents at once, many from a sample."""

import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from sklearn.cluster import KMeans

from stages.clustering.distances import inertia, means, nearest
from stages.clustering.kmeans import TooFewVectors, fit_kmeans


def blobs(sizes, seed=0, noise=0.1, width=6):
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(len(sizes), width))
    truth = np.repeat(np.arange(len(sizes)), sizes)
    return (centers[truth] + noise * rng.normal(size=(len(truth), width))).astype(np.float32), truth


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
    for documents in (vectors, np.repeat(vectors, 10_000, axis=0)):
        with pytest.raises(ValueError, match="not finite"):
            fit_kmeans(documents, 2, balanced=True, restarts=1, iterations=5, seed=0)


def test_too_few_different_vectors_among_many_are_refused():
    vectors = np.repeat(np.eye(3, dtype=np.float32), 10_000, axis=0)
    vectors[5] *= -1  # -0 is 0: [-1, 0, 0] is the only new one
    with pytest.raises(TooFewVectors, match="4 different document vectors cannot make 5 clusters"):
        fit_kmeans(vectors, 5, balanced=True, restarts=1, iterations=5, seed=0)


@pytest.fixture
def small_sample(monkeypatch):
    """As if 120 documents were many, and 30 a cluster enough to start on."""
    monkeypatch.setattr("stages.clustering.kmeans.SAMPLE", 30)
    monkeypatch.setattr("stages.clustering.kmeans.SMALLEST_SAMPLE", 120)
    monkeypatch.setattr("stages.clustering.kmeans.SMALL", 120)


@pytest.mark.parametrize(("documents", "clusters"), [(3000, 4), (3001, 7), (2999, 16)])
def test_all_documents_are_even_after_starts_on_a_sample(documents, clusters, small_sample):
    vectors, _ = blobs([documents // 2, documents - documents // 2 - 9, 9], noise=1)
    fit = fit_kmeans(vectors, clusters, balanced=True, restarts=2, iterations=30, seed=0)
    assert set(np.bincount(fit.labels)) <= {documents // clusters, documents // clusters + 1}
    np.testing.assert_allclose(fit.centroids, means(vectors, fit.labels, clusters), rtol=1e-5, atol=1e-6)
    assert fit.inertia == pytest.approx(inertia(vectors, fit.centroids, fit.labels))


@pytest.mark.parametrize("balanced", [True, False])
def test_starting_on_a_sample_costs_little(balanced, monkeypatch):
    vectors, _ = blobs([900, 600, 300, 100, 60, 40], noise=0.8)
    arguments = {"balanced": balanced, "restarts": 10, "iterations": 50, "seed": 0}
    everything = fit_kmeans(vectors, 8, **arguments)
    for name in ("SAMPLE", "SMALLEST_SAMPLE", "SMALL"):
        monkeypatch.setattr(f"stages.clustering.kmeans.{name}", 100)
    sampled = fit_kmeans(vectors, 8, **arguments)
    assert sampled.labels.tobytes() != everything.labels.tobytes()
    assert sampled.inertia <= everything.inertia * 1.03


def test_equal_seeds_give_equal_bytes_on_a_sample_too(small_sample):
    vectors, _ = blobs([2000], noise=1)
    first, again = (fit_kmeans(vectors, 5, balanced=True, restarts=2, iterations=9, seed=1) for _ in range(2))
    assert first.centroids.tobytes() == again.centroids.tobytes()
    assert first.labels.tobytes() == again.labels.tobytes()


@pytest.mark.parametrize("balanced", [True, False])
def test_many_documents_are_fitted_on_a_device_of_torch(balanced, small_sample):
    vectors, truth = blobs([500, 500, 500])
    arguments = {"balanced": balanced, "restarts": 3, "iterations": 20, "seed": 0}
    ours, torchs = (fit_kmeans(vectors, 3, device=device, **arguments) for device in ("cpu", "cpu:0"))
    assert len(set(zip(torchs.labels, truth, strict=True))) == 3
    np.testing.assert_array_equal(torchs.labels, ours.labels)


def test_vectors_that_are_nearly_all_equal_are_even_too(small_sample):
    vectors = np.append(np.zeros((5000, 3), np.float32), np.eye(3, dtype=np.float32), axis=0)
    fit = fit_kmeans(vectors, 4, balanced=True, restarts=1, iterations=20, seed=0)
    assert sorted(np.bincount(fit.labels)) == [1250, 1251, 1251, 1251]


def test_no_cluster_of_many_stays_empty_without_balance(small_sample):
    vectors = np.append(np.zeros((5000, 3), np.float32), np.eye(3, dtype=np.float32), axis=0)
    fit = fit_kmeans(vectors, 4, balanced=False, restarts=1, iterations=20, seed=0)
    assert np.bincount(fit.labels, minlength=4).min() >= 1


def test_memory_does_not_grow_with_documents_times_clusters(small_sample, monkeypatch):
    monkeypatch.setattr("stages.clustering.capacity.TABLE", 1 << 18)
    vectors = np.random.default_rng(0).normal(size=(60_000, 2)).astype(np.float32)
    tracemalloc.start()
    fit_kmeans(vectors, 60, balanced=True, restarts=1, iterations=3, seed=0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 60_000 * 60 * 4 / 2
