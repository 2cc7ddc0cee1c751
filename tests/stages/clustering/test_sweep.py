"""A sweep on data whose number of groups is known."""

import numpy as np
import pytest

from schemas.cluster_documents import ClusterConfig
from stages.clustering.distances import nearest
from stages.clustering.fitting import fit_clusters
from stages.clustering.sweep import try_clusters

RNG = np.random.default_rng(0)
TRUTH = np.repeat(np.arange(4), 50)
VECTORS = (3 * np.eye(4)[TRUTH] + 0.3 * RNG.normal(size=(200, 4))).astype(np.float32)
SOURCES = [f"s{number}" for number in TRUTH]
LENGTHS = np.full(200, 10)


@pytest.fixture(scope="module")
def rows():
    config = ClusterConfig(sweep="2,4,8", equal="documents")
    return {count: try_clusters(config, count, VECTORS, LENGTHS, SOURCES) for count in config.counts()}


def test_the_true_number_is_the_stable_one_and_agrees_with_the_sources(rows):
    assert rows[4].stability == pytest.approx(1)
    assert rows[8].stability < 0.9
    assert rows[4].purity == rows[4].nmi == pytest.approx(1)
    assert rows[2].purity == pytest.approx(0.5)
    assert rows[4].document_balance == rows[4].token_balance == 1


def test_spread_and_inertia_fall_with_the_number(rows):
    assert rows[2].spread > rows[4].spread > rows[8].spread
    assert rows[2].inertia > rows[4].inertia > rows[8].inertia


def test_a_row_measures_the_fit_the_stage_would_make(rows):
    fit = fit_clusters(ClusterConfig(clusters=4, equal="documents"), VECTORS, LENGTHS).clustering
    spread = ((VECTORS - fit.centroids[nearest(VECTORS, fit.centroids)]) ** 2).sum(1).mean()
    assert rows[4].inertia == pytest.approx(fit.inertia)
    assert rows[4].spread == pytest.approx(spread, rel=1e-5)


def test_the_same_documents_give_the_same_row(rows):
    assert try_clusters(ClusterConfig(sweep="2,4,8", equal="documents"), 4, VECTORS, LENGTHS, SOURCES) == rows[4]


def test_of_the_seeds_the_best_counts():
    config = ClusterConfig(clusters=8, restarts=1, equal="documents")
    fits = [fit_clusters(config.model_copy(update={"seed": seed}), VECTORS, LENGTHS).clustering for seed in range(3)]
    assert len({fit.inertia for fit in fits}) == 3
    row = try_clusters(config.model_copy(update={"clusters": 2, "sweep": "8"}), 8, VECTORS, LENGTHS, SOURCES)
    assert row.inertia == min(fit.inertia for fit in fits)


def test_one_source_has_nothing_to_agree_with():
    row = try_clusters(ClusterConfig(sweep="1"), 1, VECTORS, LENGTHS, ["s"] * 200)
    assert (row.purity, row.nmi, row.stability, row.document_balance) == (None, None, 1, 1)
