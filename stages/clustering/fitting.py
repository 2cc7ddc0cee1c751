"""Which documents centroids are fitted on, how often each counts, and the fit itself.

- equal in tokens: documents enter k-means in proportion to their length. With as many documents each, but lengths that
  differ by domain, some experts would see their few tokens over and over and others would mix several domains
- a document whose vector is zero tells nothing and is left out of the fit
- potentials are fitted on the same draws: what is equal in the fit, tokens or documents, they keep equal afterwards
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from loguru import logger
from numpy.typing import NDArray
from scipy import sparse

from schemas.cluster_documents import ClusterConfig
from schemas.failures import InputFailure
from stages.clustering.features import (
    Floats,
    Tokens,
    count_tokens,
    fit_token_vectors,
    inverse_document_frequency,
    weighted_rows,
)
from stages.clustering.kmeans import Clustering, TooFewVectors, fit_kmeans
from stages.clustering.potentials import fit_potentials
from stages.clustering.tree import fit_tree

DRAWS = 4096  # at least, in proportion to length: a document with such a share of the tokens is in the fit for certain


def choose_sample(config: ClusterConfig, documents: int) -> NDArray[np.int64]:
    """Numbers of the documents to fit on, ascending. Raises InputFailure when they are too few for the clusters."""
    size = min(config.sample_documents, documents)
    wanted = max(config.counts() or (config.clusters,))
    if size < wanted:
        more = "text" if size == documents else "--sample-documents"
        flag = "--sweep" if config.sweep else "--tree" if config.tree else "--clusters"
        raise InputFailure(
            f"{size} training documents cannot make {wanted} clusters: give {flag} at most {size} or more {more}"
        )
    return np.sort(np.random.default_rng(config.seed).choice(documents, size, replace=False))


@dataclass(frozen=True)
class TokenVectors:
    """The table of token vectors [vocabulary, d], and the tf-idf [sample, vocabulary] it was fitted on."""

    table: Floats
    weighted: sparse.csr_matrix


def fit_vectorizer(config: ClusterConfig, documents: Iterable[Tokens], vocabulary: int) -> TokenVectors:
    """tf-idf and its truncated SVD, from the tokens of the sample."""
    counts = count_tokens(documents, vocabulary)
    idf = inverse_document_frequency(counts)
    weighted = weighted_rows(counts, idf)
    return TokenVectors(fit_token_vectors(weighted, idf, config.dimensions, config.seed), weighted)


@dataclass(frozen=True)
class Fit:
    """Centroids and labels of the draws, and the potentials [k] to assign by when they are asked for."""

    clustering: Clustering
    potentials: Floats | None


def fit_clusters(config: ClusterConfig, vectors: Floats, lengths: NDArray[np.int64], device: str = "cpu") -> Fit:
    """k-means or a tree of it over the sample: its vectors [n, d] and tokens [n].

    Raises InputFailure when the documents cannot make so many clusters.
    """
    drawn = vectors[draw(config, vectors, lengths)]
    settings: dict[str, Any] = {
        "restarts": config.restarts, "iterations": config.iterations, "seed": config.seed, "device": device,
    }  # fmt: skip
    try:
        if config.tree:
            fit = fit_tree(drawn, config.branches(), **settings)
        else:
            fit = fit_kmeans(drawn, config.clusters, balanced=config.method == "balanced", **settings)
    except TooFewVectors as error:
        raise InputFailure(
            f"{error}: documents are too much alike, or a few hold nearly all tokens; give fewer --clusters, "
            f"other text or --equal documents"
        ) from error
    logger.info("k-means ended after {} rounds with inertia {:.4g}", fit.iterations, fit.inertia)
    return Fit(fit, fit_potentials(drawn, fit.centroids) if config.potentials else None)


def draw(config: ClusterConfig, vectors: Floats, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows to run k-means on: each document once, or systematically in proportion to its length."""
    if config.clusters == 1:
        return np.arange(len(vectors))
    known = np.flatnonzero(vectors.any(axis=1))
    if config.method != "balanced" or config.equal == "documents" or not lengths[known].sum():
        return known
    ends = np.cumsum(lengths[known])
    draws = max(len(known), DRAWS)
    return known[np.searchsorted(ends, (np.arange(draws) + 0.5) * ends[-1] / draws, side="right")]
