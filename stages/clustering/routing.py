"""Which experts a text is for: weights over clusters from the tokens read so far (cBTM, Gururangan et al. 2023).

    w_c = softmax_c( -||x - c||² / temperature )

- the distance is squared once, as in the paper. The reference code squares a squared distance, so a temperature tuned
  with it does not carry over
- causal: the vector at position t is made of the tokens before t; before the first token nothing is known and every
  cluster weighs the same, also with `top_k`
- potentials play no part, also where documents were assigned by them: they say how crowded a cluster was among whole
  documents, and a prefix asks which expert knows its text. So a document may be routed away from its own cluster
- the state of a text is one un-normalised sum: `sum += token_vectors[token]`, then `cluster_weights(normalised(sum))`
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from schemas.cluster_documents import ClusterConfig
from stages.clustering.assignment import Documents, Numbers, in_chunks
from stages.clustering.distances import Labels, means, nearest, squared_distances
from stages.clustering.features import Floats, Tokens, document_vectors, normalised


def prefix_sums(tokens: Tokens, token_vectors: Floats, before: Floats | None = None) -> Floats:
    """Running sums [T + 1, d], not normalised: row t holds tokens[:t], the last row the state to continue from.

    `before` is such a state of the text read earlier. Summed in order, so pieces and single steps give the same bits.
    """
    rows = np.empty((len(tokens) + 1, token_vectors.shape[1]), np.float32)
    rows[0] = 0 if before is None else before
    rows[1:] = token_vectors[tokens]
    return np.cumsum(rows, axis=0, dtype=np.float32)


def prefix_vectors(tokens: Tokens, token_vectors: Floats) -> Floats:
    """Unit vectors [T, d]: row t is the vector of the tokens before position t; row 0 is zero."""
    return normalised(prefix_sums(tokens, token_vectors)[:-1])


def centroid_of(documents: Iterable[Tokens], token_vectors: Floats) -> Floats:
    """The mean [d] of the documents' unit vectors, as those of clusters are: shorter where they are scattered."""
    vectors = document_vectors(documents, token_vectors)
    return means(vectors, np.zeros(len(vectors), np.int32), 1)[0]


def cluster_weights(vectors: Floats, centroids: Floats, temperature: float, top_k: int | None = None) -> Floats:
    """Weights [..., k] of vectors [..., d] that sum to one; with `top_k` all but the largest are zero.

    Uniform where the vector is zero: nothing is known.
    """
    clusters = len(centroids)
    scores = -squared_distances(vectors, centroids) / temperature
    if top_k is not None and top_k < clusters:
        # Stable, so that of equal scores the first clusters are kept and never more than top_k.
        dropped = np.argsort(-scores, axis=-1, kind="stable")[..., top_k:]
        np.put_along_axis(scores, dropped, -np.inf, axis=-1)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    known = np.any(vectors != 0, axis=-1, keepdims=True)
    return np.where(known, weights, np.float32(1 / clusters)).astype(np.float32)


@dataclass(frozen=True)
class Router:
    """What routes texts: a vector per token, a centroid per cluster, and how sharply to choose."""

    token_vectors: Floats
    centroids: Floats
    temperature: float

    def weights(self, documents: Iterable[Tokens], top_k: int | None, temperature: float | None = None) -> Floats:
        """Weights [N, k] of all tokens of the documents, each from the tokens of its document before it."""
        chosen = self.temperature if temperature is None else temperature
        found = (prefix_vectors(tokens, self.token_vectors) for tokens in documents)
        return np.concatenate([cluster_weights(vectors, self.centroids, chosen, top_k) for vectors in found])

    def distances(self, documents: Iterable[Tokens]) -> Floats:
        """Squared distances [N, k] of which softmax(-distance / temperature) are the weights, for any temperature."""
        found = (prefix_vectors(tokens, self.token_vectors) for tokens in documents)
        return np.concatenate([_distances_if_known(vectors, self.centroids) for vectors in found])


def _distances_if_known(vectors: Floats, centroids: Floats) -> Floats:
    """All the same where the vector is zero, for the weights are."""
    known = np.any(vectors != 0, axis=-1, keepdims=True)
    return np.where(known, squared_distances(vectors, centroids), np.float32(0))


class RoutingFigures(NamedTuple):
    """How documents would be routed: means of the largest weight and of exp(entropy), and the share that gets home."""

    largest_weight: float
    effective_clusters: float
    routed_home: float


def routing_figures(config: ClusterConfig, documents: Documents, centroids: Floats, labels: Labels) -> RoutingFigures:
    """Of whole documents, at least one. Home is the cluster of their label."""

    def compute(numbers: Numbers) -> Floats:
        vectors = documents.token_vectors(numbers)
        weights = cluster_weights(vectors, centroids, config.temperature)
        entropy = -(weights * np.log(np.maximum(weights, np.finfo(np.float32).tiny))).sum(1)
        home = nearest(vectors, centroids) == labels[numbers]
        return np.stack([weights.max(1), np.exp(entropy), home])

    found = np.concatenate(list(in_chunks(compute, documents.lengths, len(centroids), config.workers)), axis=1)
    return RoutingFigures(*found.mean(axis=1, dtype=np.float64).tolist())
