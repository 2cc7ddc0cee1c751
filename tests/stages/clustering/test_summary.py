"""Central documents of assignments made by hand."""

import numpy as np

from stages.clustering.assignment import Assignment
from stages.clustering.summary import central_documents


def assignment(labels, distances, margins):
    count = len(labels)
    return Assignment(np.array(labels, np.int32), np.full(count, -1, np.int32), np.array(distances), np.array(margins))


def test_the_three_nearest_are_named_nearest_first():
    found = assignment([0, 0, 1, 0, 0, 1], [0.4, 0.1, 0.5, 0.3, 0.2, 0.1], [1.0] * 6)
    assert central_documents(found, 3) == [[1, 4, 3], [5, 2], []]


def test_documents_that_say_nothing_come_last():
    found = assignment([0, 0, 0], [0.1, 0.3, 0.2], [np.inf, 1.0, 1.0])
    assert central_documents(found, 2) == [[2, 1, 0], []]


def test_of_a_single_cluster_all_are_known():
    found = assignment([0, 0], [0.2, 0.1], [np.inf, np.inf])
    assert central_documents(found, 1) == [[1, 0]]
