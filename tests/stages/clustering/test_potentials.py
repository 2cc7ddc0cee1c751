"""Potentials keep documents even that were not in the fit, at a bounded price."""

import numpy as np
import pytest

from stages.clustering.distances import inertia, nearest
from stages.clustering.kmeans import fit_kmeans
from stages.clustering.potentials import fit_potentials


def topics(documents, draw, count=30, width=20):
    """Unit vectors about topics of which the first is by far the most frequent."""
    centers = np.random.default_rng(0).normal(size=(count, width))
    centers /= np.linalg.norm(centers, axis=1, keepdims=True)
    rng = np.random.default_rng(draw + 1)
    frequency = 1 / np.arange(1, count + 1)
    truth = rng.choice(count, documents, p=frequency / frequency.sum())
    vectors = centers[truth] + rng.normal(size=(documents, width)) / np.sqrt(width)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def balance(labels, clusters):
    return np.bincount(labels, minlength=clusters).max() / len(labels) * clusters


def emptiest(labels, clusters):
    return np.bincount(labels, minlength=clusters).min() / len(labels) * clusters


@pytest.fixture(scope="module")
def centroids():
    return fit_kmeans(topics(8000, 0), 16, balanced=True, restarts=2, iterations=30, seed=0).centroids


def test_fitted_documents_are_even(centroids):
    vectors = topics(8000, 0)
    labels = nearest(vectors, centroids, fit_potentials(vectors, centroids))
    assert balance(labels, 16) <= 1.015
    assert emptiest(labels, 16) >= 0.98


def test_fresh_documents_are_far_more_even_and_hardly_further_away(centroids):
    fresh = topics(32_000, 1)
    plain = nearest(fresh, centroids)
    priced = nearest(fresh, centroids, fit_potentials(topics(32_000, 0), centroids))
    assert balance(plain, 16) > 1.3
    assert balance(priced, 16) < 1.1  # both samples have 2000 a cluster: each is off by 2.2 % by chance
    assert emptiest(priced, 16) > 0.9
    assert inertia(fresh, centroids, priced) <= inertia(fresh, centroids, plain) * 1.03


def test_more_documents_than_the_sample_are_even(centroids, monkeypatch):
    monkeypatch.setattr("stages.clustering.potentials.FEW", 32)
    vectors = topics(8000, 0)
    assert balance(nearest(vectors, centroids, fit_potentials(vectors, centroids)), 16) <= 1.02
    monkeypatch.setattr("stages.clustering.potentials.MANY", 250)
    assert balance(nearest(vectors, centroids, fit_potentials(vectors, centroids)), 16) <= 1.15


def test_clusters_far_apart_share_a_crowd():
    rng = np.random.default_rng(0)
    near, far = rng.normal(size=(900, 3)), rng.normal(size=(100, 3)) + 50
    vectors = np.concatenate([near, far]).astype(np.float32)
    centroids = np.array([[0, 0, 0], [50, 50, 50]], np.float32)
    labels = nearest(vectors, centroids, fit_potentials(vectors, centroids))
    assert abs((labels == 0).sum() - 500) <= 10


def test_potentials_have_mean_zero_and_favour_whom_few_want(centroids):
    vectors = topics(8000, 0)
    potentials = fit_potentials(vectors, centroids)
    sizes = np.bincount(nearest(vectors, centroids), minlength=16)
    assert potentials.dtype == np.float32
    assert abs(potentials.mean()) < 1e-4
    assert np.corrcoef(potentials, sizes)[0, 1] < -0.5


def test_equal_vectors_and_few_of_them_do_not_fail():
    assert np.isfinite(fit_potentials(np.zeros((50, 3), np.float32), np.eye(3, dtype=np.float32))).all()
    assert np.isfinite(fit_potentials(np.eye(3, dtype=np.float32)[:1], np.eye(3, dtype=np.float32))).all()
    assert np.isfinite(fit_potentials(np.eye(3, dtype=np.float32), np.zeros((3, 3), np.float32))).all()
    assert fit_potentials(np.empty((0, 3), np.float32), np.eye(3, dtype=np.float32)).tolist() == [0, 0, 0]
    assert fit_potentials(np.eye(3, dtype=np.float32), np.ones((1, 3), np.float32)).tolist() == [0]


def test_equal_inputs_give_equal_bytes(centroids):
    vectors = topics(8000, 0)
    assert fit_potentials(vectors, centroids).tobytes() == fit_potentials(vectors, centroids).tobytes()
