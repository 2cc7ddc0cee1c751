"""The token table against sklearn's count -> tf-idf -> truncated SVD -> norm."""

import numpy as np
import pytest
from sklearn.decomposition import TruncatedSVD
from sklearn.preprocessing import normalize

from stages.clustering.features import (
    count_tokens,
    document_vectors,
    fit_token_vectors,
    inverse_document_frequency,
    normalised,
    weighted_rows,
)

VOCABULARY = 60


def documents(number, seed=0, vocabulary=VOCABULARY):
    """Documents of two topics: even and odd tokens; token 0 is in all of them."""
    rng = np.random.default_rng(seed)
    bodies = [rng.integers(1, vocabulary // 2, rng.integers(5, 90)) * 2 - topic % 2 for topic in range(number)]
    return [np.append(body, 0).astype(np.uint16) for body in bodies]


def table_of(docs, dimensions=8, vocabulary=VOCABULARY):
    counts = count_tokens(docs, vocabulary)
    idf = inverse_document_frequency(counts)
    return fit_token_vectors(weighted_rows(counts, idf), idf, dimensions, seed=0)


def test_counts_equal_bincount():
    docs = [*documents(20), np.array([], np.uint16)]
    expected = [np.bincount(tokens, minlength=VOCABULARY) for tokens in docs]
    np.testing.assert_array_equal(count_tokens(docs, VOCABULARY).toarray(), expected)


def test_vectors_are_normalised_sums_of_token_rows_across_batches(monkeypatch):
    docs = [*documents(20), np.array([], np.uint16), np.arange(9, dtype=np.uint32)]
    table = np.random.default_rng(0).normal(size=(VOCABULARY, 5)).astype(np.float32)
    expected = normalised(np.stack([table[tokens].sum(0) for tokens in docs]))
    whole = document_vectors(docs, table)
    np.testing.assert_allclose(whole, expected, atol=1e-5)
    monkeypatch.setattr("stages.clustering.features.BATCH_TOKENS", 100)
    assert document_vectors(iter(docs), table).tobytes() == whole.tobytes()


def test_token_of_every_document_weighs_nothing_and_rarer_weighs_more():
    docs = [np.array(tokens, np.uint16) for tokens in ([0, 1, 1], [0, 1], [0, 2], [0])]
    idf = inverse_document_frequency(count_tokens(docs, 4))
    np.testing.assert_allclose(idf, [0, np.log(5 / 3), np.log(5 / 2), 0], rtol=1e-6)


def test_sum_of_token_vectors_equals_tfidf_svd_norm():
    docs = documents(80)
    counts = count_tokens(docs, VOCABULARY)
    idf = inverse_document_frequency(counts)
    tfidf = normalize(counts.multiply(idf).tocsr())
    reference = normalize(TruncatedSVD(8, algorithm="arpack", random_state=0).fit_transform(tfidf.astype(np.float64)))
    ours = document_vectors(docs, table_of(docs))
    # Singular vectors have no sign, and near-equal ones no order: the angles between documents are what must agree.
    np.testing.assert_allclose(ours @ ours.T, reference @ reference.T, atol=0.02)
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, rtol=1e-5)


def test_equal_runs_give_equal_bytes():
    docs = documents(40)
    assert table_of(docs).tobytes() == table_of(docs).tobytes()


def test_tiny_corpora_get_as_many_dimensions_as_they_have():
    assert table_of(documents(5), dimensions=100).shape == (VOCABULARY, 5)
    assert table_of([np.array([1, 2]), np.array([2])], dimensions=100).shape == (VOCABULARY, 1)


def test_two_different_documents_have_different_vectors():
    docs = [np.array([1, 2, 2]), np.array([1, 3])]
    one, other = document_vectors(docs, table_of(docs))
    assert abs(one @ other) < 0.99


def test_documents_without_telling_tokens_are_zero():
    docs = documents(20)
    vectors = document_vectors([np.array([], np.uint16), np.array([0, 0]), docs[0]], table_of(docs))
    assert not vectors[:2].any()
    assert np.linalg.norm(vectors[2]) == pytest.approx(1, rel=1e-5)


def test_identical_documents_leave_nothing_but_zeros():
    docs = [np.array([1, 2])] * 5
    assert not table_of(docs).any()


def test_no_documents_give_no_vectors():
    assert document_vectors([], np.ones((4, 3), np.float32)).shape == (0, 3)
    assert count_tokens([], 4).shape == (0, 4)


def test_token_outside_the_vocabulary_is_refused():
    with pytest.raises(IndexError, match=r"token 9 .* vocabulary of 4"):
        count_tokens([np.array([1, 9])], 4)
    with pytest.raises(IndexError, match=r"token 9 .* vocabulary of 4"):
        document_vectors([np.array([1, 9])], np.ones((4, 2), np.float32))


def test_normalised_keeps_float32_and_zero_rows():
    rows = normalised(np.array([[3, 4], [0, 0]], np.float32))
    np.testing.assert_allclose(rows, [[0.6, 0.8], [0, 0]], rtol=1e-6)
    assert rows.dtype == np.float32
