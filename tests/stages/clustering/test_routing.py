"""Routing weights against hand-computed ones; running sums against whole documents."""

import numpy as np
import pytest

from stages.clustering.features import document_vectors, normalised
from stages.clustering.routing import Router, cluster_weights, prefix_sums, prefix_vectors

RNG = np.random.default_rng(0)
TABLE = RNG.normal(size=(50, 8)).astype(np.float32)
CENTROIDS = normalised(RNG.normal(size=(5, 8)).astype(np.float32))
TOKENS = RNG.integers(0, 50, 40).astype(np.uint16)


def test_each_prefix_is_the_vector_of_the_tokens_before_it():
    expected = document_vectors([TOKENS[:t] for t in range(len(TOKENS))], TABLE)
    np.testing.assert_allclose(prefix_vectors(TOKENS, TABLE), expected, atol=2e-6)


def test_a_later_token_moves_no_earlier_vector():
    changed = TOKENS.copy()
    changed[20] = (changed[20] + 1) % 50
    before, after = prefix_vectors(TOKENS, TABLE), prefix_vectors(changed, TABLE)
    np.testing.assert_array_equal(before[:21], after[:21])
    assert (before[21:] != after[21:]).any(axis=1).all()


def test_pieces_and_single_steps_give_the_bits_of_the_whole():
    whole = prefix_sums(TOKENS, TABLE)
    first = prefix_sums(TOKENS[:13], TABLE)
    second = prefix_sums(TOKENS[13:], TABLE, before=first[-1])
    np.testing.assert_array_equal(np.concatenate([first[:-1], second]), whole)
    state = np.zeros(8, np.float32)
    for token in TOKENS:
        state += TABLE[token]
    np.testing.assert_array_equal(state, whole[-1])


def test_no_tokens_are_no_prefixes():
    assert prefix_vectors(TOKENS[:0], TABLE).shape == (0, 8)
    np.testing.assert_array_equal(prefix_sums(TOKENS[:0], TABLE), np.zeros((1, 8)))


def test_two_clusters_by_hand():
    # ||x - c||² = 0.8 and 1.0, T = 0.1: 1 / (1 + e^-2) = 0.8808, not the 0.973 of a distance squared twice.
    vectors = np.array([[1.0, 0.0]], np.float32)
    centroids = np.array([[1 - 0.8**0.5, 0.0], [1.0, 1.0]], np.float32)
    weights = cluster_weights(vectors, centroids, temperature=0.1)
    np.testing.assert_allclose(weights, [[0.8808, 0.1192]], atol=1e-4)


def test_weights_equal_a_plain_loop():
    vectors = normalised(RNG.normal(size=(7, 8)).astype(np.float32))
    expected = [[np.exp(-(np.linalg.norm(x.astype(float) - c) ** 2) / 0.3) for c in CENTROIDS] for x in vectors]
    expected = np.array(expected) / np.sum(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(cluster_weights(vectors, CENTROIDS, 0.3), expected, rtol=1e-4)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_top_k_keeps_the_largest_and_sums_to_one(top_k):
    vectors = prefix_vectors(TOKENS, TABLE)[1:]
    full, cut = cluster_weights(vectors, CENTROIDS, 0.1), cluster_weights(vectors, CENTROIDS, 0.1, top_k)
    kept = cut > 0
    assert (kept.sum(1) <= top_k).all()
    assert (full.argmax(1) == cut.argmax(1)).all()
    np.testing.assert_allclose(cut.sum(1), 1, rtol=1e-5)
    renormalised = np.where(kept, full, 0) / np.where(kept, full, 0).sum(1, keepdims=True)
    np.testing.assert_allclose(cut, renormalised, atol=1e-6)


def test_top_k_of_equal_scores_is_still_k():
    centroids = np.ones((4, 8), np.float32)
    weights = cluster_weights(np.eye(8, dtype=np.float32)[:2], centroids, 0.1, top_k=2)
    np.testing.assert_allclose(weights, [[0.5, 0.5, 0, 0]] * 2)


def test_nothing_known_is_uniform():
    for top_k in (None, 2):
        np.testing.assert_allclose(cluster_weights(np.zeros((1, 8), np.float32), CENTROIDS, 0.1, top_k), [[0.2] * 5])


def test_any_leading_axes_and_extreme_temperatures():
    vectors = prefix_vectors(TOKENS, TABLE).reshape(4, 10, 8)
    for temperature in (1e-6, 0.1, 1e6):
        weights = cluster_weights(vectors, CENTROIDS, temperature)
        assert weights.shape == (4, 10, 5)
        assert weights.dtype == np.float32
        np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)


def test_a_router_weighs_every_token_by_its_document_before_it():
    documents = [TOKENS[:13], TOKENS[:0], TOKENS[20:]]
    router = Router(TABLE, CENTROIDS, 0.1)
    found = router.weights(documents, 2)
    expected = [cluster_weights(prefix_vectors(tokens, TABLE), CENTROIDS, 0.1, 2) for tokens in documents]
    np.testing.assert_array_equal(found, np.concatenate(expected))
    other = router.weights(documents, None, temperature=0.7)
    np.testing.assert_array_equal(other, Router(TABLE, CENTROIDS, 0.7).weights(documents, None))


@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_distances_give_the_weights_at_any_temperature(temperature):
    documents = [TOKENS[:13], TOKENS[20:]]
    router = Router(TABLE, CENTROIDS * np.arange(1, 6, dtype=np.float32)[:, None] / 5, 0.1)
    scores = -router.distances(documents) / temperature
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    np.testing.assert_allclose(weights, router.weights(documents, None, temperature), atol=1e-6)
