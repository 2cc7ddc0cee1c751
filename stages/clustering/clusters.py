"""From documents with vectors to clusters: fitted on a sample, then assigned; or drawn at random, as a control."""

from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from schemas.cluster_documents import ClusterConfig, ClusterMetrics
from schemas.failures import InputFailure
from stages.clustering.assignment import (
    Assignment,
    Documents,
    Numbers,
    assign,
    assign_by_name,
    cluster_means,
    overlapping,
)
from stages.clustering.distances import Labels
from stages.clustering.features import Floats
from stages.clustering.fitting import TokenVectors, fit_clusters
from stages.clustering.quality import balance, contrast, mutual_information, purity
from stages.clustering.routing import routing_figures
from stages.clustering.summary import summaries, top_terms


@dataclass(frozen=True)
class Clustered:
    """Both splits with their clusters; `shared` are the second clusters of training documents, -1 for none.

    `centroids` are those of routing, in the space of token vectors; `given_centroids` lie where the user's vectors do.
    `potentials` were taken off the distances to the fitted centroids when documents were assigned, if any were.
    """

    train: Assignment
    valid: Assignment
    shared: Labels
    centroids: Floats
    given_centroids: Floats | None
    potentials: Floats | None
    inertia: float
    fit_sizes: Numbers

    @property
    def fitted_centroids(self) -> Floats:
        """In the space of the vectors that were clustered."""
        return self.centroids if self.given_centroids is None else self.given_centroids


def cluster_documents(
    config: ClusterConfig, train: Documents, valid: Documents, sample: Numbers, device: str = "cpu"
) -> Clustered:
    """Clusters of all documents; k-means sees those training documents that `sample` numbers, on a `device` of torch.

    Raises InputFailure when there cannot be so many, or one is left without a training document.
    """
    if config.method == "random":
        return _by_name(config, train, valid, sample)
    fitted = fit_clusters(config, train.vectors(sample), train.lengths[sample], device)
    fit, potentials = fitted.clustering, fitted.potentials
    assigned, held_out = (
        assign(split.vectors, split.lengths, fit.centroids, config.workers, potentials=potentials)
        for split in (train, valid)
    )
    _refuse_empty(assigned.labels, config)
    given = config.vectors is not None
    return Clustered(
        train=assigned,
        valid=held_out,
        shared=overlapping(assigned, config.overlap),
        centroids=_token_means(config, train, assigned.labels) if given else fit.centroids,
        given_centroids=fit.centroids if given else None,
        potentials=potentials,
        inertia=fit.inertia,
        fit_sizes=np.bincount(fit.labels, minlength=config.clusters),
    )


def _by_name(config: ClusterConfig, train: Documents, valid: Documents, sample: Numbers) -> Clustered:
    """A random partition, that tells nothing; its centroids are the means of its clusters."""
    labels = [assign_by_name(split.ids, config.clusters, config.seed) for split in (train, valid)]
    _refuse_empty(labels[0], config)
    centroids = _token_means(config, train, labels[0])
    assigned, held_out = (
        assign(split.token_vectors, split.lengths, centroids, config.workers, own)
        for split, own in zip((train, valid), labels, strict=True)
    )
    return Clustered(
        train=assigned,
        valid=held_out,
        shared=overlapping(assigned, 0),
        centroids=centroids,
        given_centroids=None,
        potentials=None,
        inertia=float(assigned.distances[sample].sum(dtype=np.float64)),
        fit_sizes=np.bincount(labels[0][sample], minlength=config.clusters),
    )


def _token_means(config: ClusterConfig, train: Documents, labels: Labels) -> Floats:
    return cluster_means(train.token_vectors, train.lengths, labels, config.clusters, config.workers)


def _refuse_empty(labels: Labels, config: ClusterConfig) -> None:
    """An expert needs something to train on."""
    empty = np.flatnonzero(np.bincount(labels, minlength=config.clusters) == 0)
    if len(empty):
        raise InputFailure(
            f"{len(empty)} of {config.clusters} clusters got no training document: give fewer --clusters, or more text"
        )


def measure(
    config: ClusterConfig,
    train: Documents,
    valid: Documents,
    sample: Numbers,
    clustered: Clustered,
    vectorizer: TokenVectors,
    tokenizer: Tokenizer,
) -> ClusterMetrics:
    """How the clustering came out."""
    labels = clustered.train.labels
    terms = top_terms(tokenizer, contrast(vectorizer.weighted, labels[sample], config.clusters))
    clusters = summaries(config, clustered.train, clustered.shared, train, clustered.valid.labels, terms)
    routing = routing_figures(config, valid, clustered.centroids, clustered.valid.labels)
    shared = clustered.shared >= 0
    several = len(set(train.sources)) > 1
    return ClusterMetrics(
        clusters=clusters,
        dimensions=clustered.fitted_centroids.shape[1],
        sampled_documents=len(sample),
        inertia=clustered.inertia,
        spread=float(clustered.train.distances.mean(dtype=np.float64)),
        fit_balance=balance(clustered.fit_sizes),
        train_balance=balance([cluster.documents for cluster in clusters]),
        train_token_balance=balance([cluster.tokens for cluster in clusters]),
        valid_balance=balance([cluster.valid_documents for cluster in clusters]),
        valid_token_balance=balance(np.bincount(clustered.valid.labels, valid.lengths, config.clusters)),
        purity=purity(labels, train.sources) if several else None,
        token_purity=purity(labels, train.sources, train.lengths) if several else None,
        nmi=mutual_information(labels, train.sources) if several else None,
        shared_documents=int(shared.sum()),
        shared_tokens=int(train.lengths[shared].sum()),
        largest_weight=routing.largest_weight,
        effective_clusters=routing.effective_clusters,
        routed_home=routing.routed_home,
    )
