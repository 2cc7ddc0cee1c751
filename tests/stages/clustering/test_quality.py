"""Measures of a clustering on cases small enough to count by hand."""

import numpy as np
import pytest
from scipy import sparse

from stages.clustering.quality import balance, contrast, mutual_information, numbered, purity, stability

SOURCES = ["a", "a", "a", "b", "b", "b"]


def test_balance_is_largest_over_mean():
    assert balance([2, 2, 2]) == 1
    assert balance([6, 0, 0]) == 3
    assert balance([0, 0]) == 1


def test_purity_counts_the_main_source_of_each_cluster():
    assert purity(np.array([0, 0, 1, 1, 1, 1], np.int32), SOURCES) == pytest.approx(5 / 6)
    assert purity(np.array([1, 1, 1, 0, 0, 0], np.int32), SOURCES) == 1


def test_purity_can_weigh_documents_by_their_tokens():
    labels, tokens = np.array([0, 0, 0, 0, 1, 1], np.int32), np.array([1, 1, 1, 7, 2, 2])
    assert purity(labels, SOURCES, tokens) == pytest.approx((7 + 4) / 14)


def test_mutual_information_ignores_the_numbering():
    assert mutual_information(np.array([1, 1, 1, 0, 0, 0], np.int32), SOURCES) == pytest.approx(1)
    assert mutual_information(np.zeros(6, np.int32), SOURCES) == pytest.approx(0)


def test_contrast_is_the_cluster_mean_less_the_mean():
    rows = sparse.csr_matrix(np.array([[1, 0], [1, 0], [0, 1], [0, 1]], np.float32))
    labels = np.array([0, 0, 1, 1], np.int32)
    np.testing.assert_allclose(contrast(rows, labels, 3), [[0.5, -0.5], [-0.5, 0.5], [-0.5, -0.5]])


def test_stability_is_the_mean_rand_index_of_all_pairs():
    same, other = np.array([0, 0, 1, 1], np.int32), np.array([1, 1, 0, 0], np.int32)
    crossed = np.array([0, 1, 0, 1], np.int32)
    assert stability([same, other]) == 1
    assert stability([same, other, crossed]) == pytest.approx((1 - 0.5 - 0.5) / 3)  # -0.5: as unlike as four can be


def test_names_are_numbered_as_they_come():
    assert numbered(["b", "a", "b", "c"]).tolist() == [0, 1, 0, 2]
