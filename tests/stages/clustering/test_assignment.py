"""Chunked assignment against one matrix of distances; the same bits whatever the threads and the chunks."""

import threading

import numpy as np
import pytest

from stages.clustering import assignment
from stages.clustering.assignment import (
    Assignment,
    assign,
    assign_by_name,
    cluster_means,
    in_chunks,
    members,
    overlapping,
)
from stages.clustering.distances import means, nearest, squared_distances

RNG = np.random.default_rng(0)
VECTORS = RNG.normal(size=(500, 6)).astype(np.float32)
VECTORS[[3, 250]] = 0
LENGTHS = RNG.integers(0, 50, 500)
CENTROIDS = RNG.normal(size=(7, 6)).astype(np.float32)


def take(numbers):
    return VECTORS[numbers]


@pytest.fixture(params=[(1 << 20, 1 << 12, 1 << 22), (100, 4, 30)], ids=["one chunk", "many chunks"])
def chunks(request, monkeypatch):
    for name, size in zip(("CHUNK_TOKENS", "CHUNK_DOCUMENTS", "CHUNK_DISTANCES"), request.param, strict=True):
        monkeypatch.setattr(assignment, name, size)


@pytest.mark.parametrize("workers", [1, 3, None])
def test_every_document_goes_to_the_nearest_and_names_the_second(chunks, workers):
    found = assign(take, LENGTHS, CENTROIDS, workers)
    distances = squared_distances(VECTORS, CENTROIDS)
    order = distances.argsort(1)
    np.testing.assert_array_equal(found.labels, nearest(VECTORS, CENTROIDS))
    np.testing.assert_array_equal(found.second, order[:, 1])
    assert found.labels.dtype == found.second.dtype == np.int32
    ranked = np.sort(distances, 1)
    np.testing.assert_allclose(found.distances, ranked[:, 0], rtol=1e-5)
    known = VECTORS.any(1)
    np.testing.assert_allclose(found.margins[known], (ranked[:, 1] - ranked[:, 0])[known], atol=1e-5)
    assert np.isinf(found.margins[~known]).all()


def test_the_number_of_threads_changes_no_bit(chunks):
    one, many = assign(take, LENGTHS, CENTROIDS, 1), assign(take, LENGTHS, CENTROIDS, 4)
    for name in ("labels", "second", "distances", "margins"):
        np.testing.assert_array_equal(getattr(one, name), getattr(many, name))
    alone = cluster_means(take, LENGTHS, one.labels, 7, 1)
    np.testing.assert_array_equal(alone, cluster_means(take, LENGTHS, one.labels, 7, 4))


def test_labels_given_are_kept_and_measured(chunks):
    labels = (np.arange(500) % 7).astype(np.int32)
    found = assign(take, LENGTHS, CENTROIDS, 2, labels)
    np.testing.assert_array_equal(found.labels, labels)
    expected = ((VECTORS - CENTROIDS[labels]) ** 2).sum(1)
    np.testing.assert_allclose(found.distances, expected, rtol=1e-4)
    assert (found.second != labels).all()


def test_potentials_are_taken_off_distances_but_not_told_as_distances(chunks):
    potentials = np.linspace(-3, 3, 7).astype(np.float32)
    found = assign(take, LENGTHS, CENTROIDS, 2, potentials=potentials)
    distances = squared_distances(VECTORS, CENTROIDS)
    costs = distances - potentials
    order, ranked = costs.argsort(1), np.sort(costs, 1)
    np.testing.assert_array_equal(found.labels, order[:, 0])
    np.testing.assert_array_equal(found.labels, nearest(VECTORS, CENTROIDS, potentials))
    assert (found.labels != distances.argmin(1)).any()
    np.testing.assert_array_equal(found.second, order[:, 1])
    np.testing.assert_allclose(found.distances, distances[np.arange(500), found.labels], rtol=1e-5)
    known = VECTORS.any(1)
    np.testing.assert_allclose(found.margins[known], (ranked[:, 1] - ranked[:, 0])[known], atol=1e-5)


def test_a_single_cluster_has_no_second():
    found = assign(take, LENGTHS, CENTROIDS[:1])
    assert (found.labels == 0).all() and (found.second == -1).all()


def test_no_documents_are_no_assignment():
    found = assign(take, LENGTHS[:0], CENTROIDS)
    assert [len(column) for column in (found.labels, found.second, found.distances, found.margins)] == [0] * 4


def test_means_over_chunks_are_the_means(chunks):
    labels = nearest(VECTORS, CENTROIDS)
    found = cluster_means(take, LENGTHS, labels, 8, 2)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, means(VECTORS, labels, 8), atol=1e-6)
    assert not found[7].any()


def test_chunks_hold_few_documents_and_few_tokens_in_order(monkeypatch):
    monkeypatch.setattr(assignment, "CHUNK_TOKENS", 10)
    monkeypatch.setattr(assignment, "CHUNK_DOCUMENTS", 3)
    lengths = np.array([4, 4, 4, 99, 0, 0, 0, 0, 5, 5, 1])
    chunks = [numbers.tolist() for numbers in in_chunks(lambda numbers: numbers, lengths, workers=2)]
    assert chunks == [[0, 1], [2], [3], [4, 5, 6], [7, 8, 9], [10]]


def test_no_more_chunks_are_begun_than_the_threads_need(monkeypatch):
    monkeypatch.setattr(assignment, "CHUNK_DOCUMENTS", 1)
    begun = []
    results = in_chunks(lambda numbers: begun.append(int(numbers[0])), np.ones(200, np.int64), workers=2)
    for taken in range(1, 50):
        next(results)
        assert len(begun) <= taken + 2 * 2 + 1
    results.close()


def test_a_fault_in_a_thread_is_raised():
    def fails(numbers):
        raise KeyError(f"{threading.current_thread().name}")

    with pytest.raises(KeyError):
        list(in_chunks(fails, LENGTHS, workers=2))


def test_overlap_takes_the_documents_with_the_smallest_margins():
    found = assign(take, LENGTHS, CENTROIDS)
    second = overlapping(found, 0.1)
    chosen = second >= 0
    assert chosen.sum() == 50
    np.testing.assert_array_equal(second[chosen], found.second[chosen])
    assert found.margins[chosen].max() <= found.margins[~chosen].min()
    assert (overlapping(found, 0) == -1).all()
    assert (overlapping(found, 1) >= 0).sum() == 498  # of two nothing is known, so no border is near


def test_members_are_ascending_and_shared_ones_belong_to_both():
    labels, second = np.array([2, 0, 0, 2, 1], np.int32), np.array([-1, 2, -1, 0, -1], np.int32)
    assert [part.tolist() for part in members(labels, None, 4)] == [[1, 2], [4], [0, 3], []]
    assert [part.tolist() for part in members(labels, second, 4)] == [[1, 2, 3], [4], [0, 1, 3], []]


def test_random_clusters_depend_on_name_and_seed_alone():
    names = [f"d{number}" for number in range(300)]
    labels = assign_by_name(names, 3, 0)
    assert assign_by_name(names[100:], 3, 0).tolist() == labels[100:].tolist()
    assert assign_by_name(names, 3, 1).tolist() != labels.tolist()
    assert np.bincount(labels).min() > 70


def test_an_assignment_holds_sixteen_bytes_a_document():
    found = assign(take, LENGTHS, CENTROIDS)
    assert isinstance(found, Assignment)
    assert sum(column.nbytes for column in (found.labels, found.second, found.distances, found.margins)) == 16 * 500
