"""Trees against what they must keep: equal leaves, numbers in the order of the branches, coarse before fine."""

import numpy as np
import pytest

from stages.clustering.distances import means
from stages.clustering.kmeans import TooFewVectors
from stages.clustering.tree import fit_tree

RNG = np.random.default_rng(0)
COARSE = np.repeat(10 * np.eye(2, 4), 60, axis=0)
FINE = np.tile(np.repeat(np.eye(3, 4)[:, ::-1], 20, axis=0), (2, 1))
VECTORS = (COARSE + FINE + 0.05 * RNG.normal(size=(120, 4))).astype(np.float32)


def test_two_groups_of_three_are_found_level_by_level():
    tree = fit_tree(VECTORS, (2, 3), restarts=3, iterations=20, seed=0)
    assert np.bincount(tree.labels).tolist() == [20] * 6
    np.testing.assert_allclose(tree.centroids, means(VECTORS, tree.labels, 6), atol=1e-6)
    truth = np.repeat(np.arange(6), 20)
    assert len(set(zip(tree.labels.tolist(), truth.tolist(), strict=True))) == 6
    assert {(leaf // 3, group // 3) for leaf, group in zip(tree.labels.tolist(), truth.tolist(), strict=True)} in (
        {(0, 0), (1, 1)}, {(0, 1), (1, 0)},
    )  # fmt: skip


@pytest.mark.parametrize("branches", [(2, 2, 2), (5, 3), (1, 7)])
def test_leaves_are_equal_within_the_number_of_levels(branches):
    vectors = RNG.normal(size=(101, 5)).astype(np.float32)
    tree = fit_tree(vectors, branches, restarts=1, iterations=10, seed=0)
    sizes = np.bincount(tree.labels, minlength=np.prod(branches))
    assert len(sizes) == np.prod(branches)
    assert sizes.max() - sizes.min() <= len(branches)
    assert tree.inertia == pytest.approx(((vectors - tree.centroids[tree.labels]) ** 2).sum(), rel=1e-5)


def test_the_seed_decides():
    vectors = RNG.normal(size=(200, 5)).astype(np.float32)
    first, again, other = (fit_tree(vectors, (3, 3), 1, 10, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.labels, again.labels)
    assert (first.labels != other.labels).any()


def test_a_node_of_equal_vectors_cannot_be_cut():
    vectors = np.repeat(np.array([[1, 0], [0, 1]], np.float32), 10, axis=0)
    with pytest.raises(TooFewVectors, match="1 different document vectors cannot make 2"):
        fit_tree(vectors, (2, 2), restarts=1, iterations=5, seed=0)
