"""The map: groups that are apart stay apart, also when there are more of them than two axes can show."""

import numpy as np
import pytest

from stages.clustering.distances import means
from stages.clustering.layout import map_places

RNG = np.random.default_rng(0)


def groups(count, width=12, noise=0.1):
    labels = np.repeat(np.arange(count), 40).astype(np.int32)
    vectors = (np.eye(count, width)[labels] + noise * RNG.normal(size=(len(labels), width))).astype(np.float32)
    return vectors, labels, means(vectors, labels, count)


@pytest.mark.parametrize("count", [2, 3, 7, 12])
def test_groups_lie_apart(count):
    vectors, labels, centroids = groups(count)
    places = map_places(vectors, labels, centroids)
    middles = np.stack([places[labels == group].mean(0) for group in range(count)])
    distances = ((places[:, None] - middles) ** 2).sum(-1)
    assert (distances.argmin(1) == labels).mean() > 0.99


def test_a_document_between_two_clusters_lies_between_them():
    vectors, labels, centroids = groups(3)
    vectors[0] = (centroids[0] + centroids[1]) / 2
    places = map_places(vectors, labels, centroids)
    first, second = (places[labels == group][1:].mean(0) for group in (0, 1))
    along = (places[0] - first) @ (second - first) / ((second - first) ** 2).sum()
    assert 0.2 < along < 0.8


def test_a_loose_cluster_is_wide():
    vectors, labels, centroids = groups(4, noise=0.02)
    loose = labels == 2
    vectors[loose] += 0.15 * RNG.normal(size=vectors[loose].shape).astype(np.float32)
    places = map_places(vectors, labels, centroids)
    widths = [float(places[labels == group].std(0).mean()) for group in range(4)]
    assert widths[2] > 3 * max(widths[:2])


def test_it_is_the_same_every_time():
    vectors, labels, centroids = groups(5)
    np.testing.assert_array_equal(map_places(vectors, labels, centroids), map_places(vectors, labels, centroids))


@pytest.mark.parametrize(
    ("vectors", "clusters"),
    [
        (np.ones((5, 3)), 1),
        (np.ones((1, 3)), 1),
        (np.zeros((6, 3)), 2),
        (np.arange(8.0)[:, None], 2),
        (np.eye(300), 300),
    ],
    ids=["equal", "single", "zero", "one dimension", "many clusters"],
)
def test_whatever_there_is_has_a_place(vectors, clusters):
    vectors = vectors.astype(np.float32)
    labels = (np.arange(len(vectors)) % clusters).astype(np.int32)
    places = map_places(vectors, labels, means(vectors, labels, clusters))
    assert places.shape == (len(vectors), 2)
    assert np.isfinite(places).all()
