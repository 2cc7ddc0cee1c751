"""What goes into a fit: which documents, and how often each."""

import numpy as np
import pytest

from schemas.cluster_documents import ClusterConfig
from schemas.failures import InputFailure
from stages.clustering.distances import nearest
from stages.clustering.fitting import choose_sample, draw, fit_clusters

RNG = np.random.default_rng(0)
VECTORS = RNG.normal(size=(60, 4)).astype(np.float32)
LENGTHS = RNG.integers(1, 100, 60)


def refused(act):
    with pytest.raises(InputFailure) as failure:
        act()
    assert "\n" not in str(failure.value)
    return str(failure.value)


def test_the_sample_is_bounded_ascending_and_of_the_seed():
    whole = choose_sample(ClusterConfig(clusters=2), 30)
    assert whole.tolist() == list(range(30))
    some = choose_sample(ClusterConfig(clusters=2, sample_documents=10), 30)
    assert len(set(some.tolist())) == 10 and (np.diff(some) > 0).all()
    assert some.tolist() != choose_sample(ClusterConfig(clusters=2, sample_documents=10, seed=1), 30).tolist()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (ClusterConfig(clusters=31), "30 training documents cannot make 31 clusters: give --clusters at most 30 or mo"),
        (ClusterConfig(tree="8x4"), "30 training documents cannot make 32 clusters: give --tree at most 30 or more te"),
        (ClusterConfig(sweep="2,40"), "30 training documents cannot make 40 clusters: give --sweep at most 30 or more"),
        (ClusterConfig(sample_documents=5), "5 training documents cannot make 8 clusters: give --clusters at most 5"),
    ],
)  # fmt: skip
def test_fewer_documents_than_clusters_are_refused(config, expected):
    assert expected in refused(lambda: choose_sample(config, 30))


def test_documents_are_drawn_in_proportion_to_their_tokens():
    rows = draw(ClusterConfig(clusters=3), VECTORS, LENGTHS)
    assert len(rows) == 4096
    share = np.bincount(rows, minlength=60) / len(rows)
    np.testing.assert_allclose(share, LENGTHS / LENGTHS.sum(), atol=1 / 4096)
    for config in (ClusterConfig(clusters=3, equal="documents"), ClusterConfig(clusters=3, method="unbalanced")):
        assert draw(config, VECTORS, LENGTHS).tolist() == list(range(60))


def test_documents_that_say_nothing_are_not_drawn():
    vectors, lengths = VECTORS.copy(), LENGTHS.copy()
    vectors[[4, 7]] = 0
    lengths[4] = 0  # an empty one
    assert not {4, 7} & set(draw(ClusterConfig(clusters=3), vectors, lengths).tolist())


def test_only_empty_documents_are_refused():
    message = refused(lambda: fit_clusters(ClusterConfig(clusters=2), np.zeros((9, 4), np.float32), np.zeros(9, int)))
    assert message.startswith("0 different document vectors cannot make 2 clusters: documents are too much alike")


def test_identical_documents_are_refused():
    vectors = np.ones((9, 4), np.float32)
    assert "1 different document vectors cannot make 2" in refused(
        lambda: fit_clusters(ClusterConfig(clusters=2), vectors, np.ones(9, int))
    )


def test_a_giant_document_leaves_no_tokens_for_others_unless_documents_count():
    lengths = np.ones(60, int)
    lengths[11] = 10**9
    message = refused(lambda: fit_clusters(ClusterConfig(clusters=3), VECTORS, lengths))
    assert "a few hold nearly all tokens; give fewer --clusters, other text or --equal documents" in message
    fit = fit_clusters(ClusterConfig(clusters=3, equal="documents"), VECTORS, lengths).clustering
    assert np.bincount(fit.labels).tolist() == [20, 20, 20]


def test_a_tree_is_fitted_where_one_is_asked_for():
    fit = fit_clusters(ClusterConfig(tree="2x3", equal="documents"), VECTORS, LENGTHS).clustering
    assert np.bincount(fit.labels).tolist() == [10] * 6


@pytest.mark.parametrize("changed", [{}, {"tree": "2x2"}])
@pytest.mark.parametrize("equal", ["tokens", "documents"])
def test_potentials_keep_documents_even_that_were_not_in_the_fit(equal, changed):
    vectors, lengths = crowded(20_000, seed=0)
    fresh, amounts = crowded(20_000, seed=1)
    config = ClusterConfig.from_mapping({"clusters": 4, "equal": equal, "potentials": True, **changed})
    fit = fit_clusters(config, vectors[:8000], lengths[:8000])
    plain, priced = (
        np.bincount(nearest(fresh, fit.clustering.centroids, by), amounts if equal == "tokens" else None, 4)
        for by in (None, fit.potentials)
    )
    assert plain.max() > 1.15 * plain.mean()
    assert priced.max() < 1.06 * priced.mean()
    assert fit_clusters(config.model_copy(update={"potentials": False}), vectors, lengths).potentials is None


def crowded(documents, seed):
    """Half of the documents are about one topic, and four times as long."""
    rng = np.random.default_rng(seed)
    truth = np.where(rng.random(documents) < 0.5, 0, rng.integers(1, 6, documents))
    topics = np.random.default_rng(9).normal(size=(6, 8))
    vectors = topics[truth] + 0.7 * rng.normal(size=(documents, 8))
    return vectors.astype(np.float32), np.where(truth == 0, 400, 100)
