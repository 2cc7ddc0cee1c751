"""Cluster documents: token shards in; a table of token vectors, centroids and a cluster for every document out (cBTM).

- vectors and centroids are fitted on a bounded sample of the training documents; then every document, held-out ones
  too, goes to its nearest centroid. Sizes are equal in the fit only, so the manifest gives both balances
- equal in tokens: documents enter k-means in proportion to their length. With as many documents each, but lengths that
  differ by domain, some experts would see their few tokens over and over and others would mix several domains
- a document without a token that tells anything has the zero vector: it is left out of the fit and goes to the centroid
  nearest to zero
- `random` is a control: the cluster is a hash of seed and document id, the centroids are the clusters' means
- memory: 8 bytes per distinct token of each sampled document, 4 x (dimensions + clusters) bytes per document
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from loguru import logger
from scipy import sparse
from tokenizers import Tokenizer

from schemas.cluster_documents import ClusterConfig, ClusterManifest, ClusterMetrics, ClusterSummary
from schemas.failures import InputFailure, IntegrityFailure
from schemas.files import FileRef
from schemas.tokenize_text import SPLITS, Split, TokenizeManifest
from stages.artifacts.model_folder import write_tensors
from stages.artifacts.stage_folder import claim_folder
from stages.clustering.features import (
    Floats,
    count_tokens,
    document_vectors,
    fit_token_vectors,
    inverse_document_frequency,
    weighted_rows,
)
from stages.clustering.kmeans import Clustering, Labels, TooFewVectors, fit_kmeans, inertia, means, nearest
from stages.clustering.quality import balance, contrast, mutual_information, purity
from stages.clustering.routing import cluster_weights
from stages.data.token_store import TokenStore, write_table

TERMS = 10  # named per cluster
DRAWS = 4096  # at least, in proportion to length: a document with such a share of the tokens is in the fit for certain
SOURCES = 20  # counted per cluster; a corpus of single files has as many sources as documents


def run(config: ClusterConfig, run_dir: Path, *, force: bool = False) -> ClusterManifest:
    """Cluster the documents of `run_dir/tokens` into `run_dir/clusters`.

    Raises InputFailure when the documents cannot make so many clusters, IntegrityFailure when a shard was changed.
    """
    tokens = TokenizeManifest.read(run_dir)
    with claim_folder(run_dir, ClusterManifest, config, [tokens.as_input()], force=force) as claim:
        if claim.finished:
            return claim.finished
        train, valid = (_open(tokens, split, run_dir) for split in SPLITS)
        tokenizer = Tokenizer.from_file(str(tokens.output("tokenizer.json").check(run_dir)))
        sample = _sample(config, train)
        weighted, token_vectors = _vectorizer(config, train, sample, tokens.metrics.vocab_size)
        fit = _fit(config, train, sample, token_vectors)
        assigned = [_assign(config, store, token_vectors, fit.centroids) for store in (train, valid)]
        _refuse_empty(assigned[0].labels, config)
        terms = _terms(tokenizer, contrast(weighted, assigned[0].labels[sample], config.clusters))
        outputs = _write(claim.path, run_dir, token_vectors, fit.centroids, assigned)
        return claim.finish(outputs, _metrics(config, fit, assigned[0], assigned[1], terms))


@dataclass(frozen=True)
class Assigned:
    """A split with a vector and a cluster for each document."""

    store: TokenStore
    vectors: Floats
    labels: Labels


def _open(tokens: TokenizeManifest, split: Split, run_dir: Path) -> TokenStore:
    return TokenStore.open([ref.check(run_dir) for ref in tokens.shards(split)])


def _sample(config: ClusterConfig, train: TokenStore) -> np.ndarray:
    """Numbers of the documents to fit on, ascending."""
    size = min(config.sample_documents, len(train))
    if size < config.clusters:
        more = "text" if size == len(train) else "--sample-documents"
        raise InputFailure(
            f"{size} training documents cannot make {config.clusters} clusters: give --clusters at most {size} "
            f"or more {more}"
        )
    return np.sort(np.random.default_rng(config.seed).choice(len(train), size, replace=False))


def _documents(store: TokenStore, numbers: Iterable[int], vocabulary: int) -> Iterator[np.ndarray]:
    for number in numbers:
        tokens = store.tokens(number)
        if len(tokens) and tokens.max() >= vocabulary:
            raise IntegrityFailure(
                f"document {store.ids[number]} holds token {tokens.max()}, the tokenizer has only {vocabulary}: "
                f"rerun `cpipe tokenize` with --force"
            )
        yield tokens


def _vectorizer(
    config: ClusterConfig, train: TokenStore, sample: np.ndarray, vocabulary: int
) -> tuple[sparse.csr_matrix, Floats]:
    """tf-idf of the sample, and the token vectors fitted on it."""
    counts = count_tokens(_documents(train, sample, vocabulary), vocabulary)
    idf = inverse_document_frequency(counts)
    weighted = weighted_rows(counts, idf)
    logger.info("fitting {} dimensions on {} documents", config.dimensions, len(sample))
    return weighted, fit_token_vectors(weighted, idf, config.dimensions, config.seed)


def _fit(config: ClusterConfig, train: TokenStore, sample: np.ndarray, token_vectors: Floats) -> Clustering:
    """Centroids from the sample; those of a random partition are the means of its clusters."""
    vectors = document_vectors(_documents(train, sample, len(token_vectors)), token_vectors)
    if config.method == "random":
        labels = _hashed([train.ids[document] for document in sample], config)
        centroids = means(vectors, labels, config.clusters)
        return Clustering(centroids, labels, inertia(vectors, centroids, labels), 0)
    drawn = _draw(config, vectors, train.lengths[sample])
    try:
        fit = fit_kmeans(
            vectors[drawn],
            config.clusters,
            balanced=config.method == "balanced",
            restarts=config.restarts,
            iterations=config.iterations,
            seed=config.seed,
        )
    except TooFewVectors as error:
        raise InputFailure(
            f"{error}: documents are too much alike, or a few hold nearly all tokens; give fewer --clusters, "
            f"other text or --equal documents"
        ) from error
    logger.info("k-means ended after {} rounds with inertia {:.4g}", fit.iterations, fit.inertia)
    return fit


def _draw(config: ClusterConfig, vectors: Floats, lengths: np.ndarray) -> np.ndarray:
    """Rows to run k-means on: each document once, or systematically in proportion to its length."""
    if config.clusters == 1:
        return np.arange(len(vectors))
    known = np.flatnonzero(vectors.any(axis=1))
    if config.method != "balanced" or config.equal == "documents" or not len(known):
        return known
    ends = np.cumsum(lengths[known])
    draws = max(len(known), DRAWS)
    return known[np.searchsorted(ends, (np.arange(draws) + 0.5) * ends[-1] / draws, side="right")]


def _hashed(ids: Sequence[str], config: ClusterConfig) -> Labels:
    digests = (hashlib.sha256(f"{config.seed}:{name}".encode()).digest() for name in ids)
    return np.array([int.from_bytes(digest[:8]) % config.clusters for digest in digests], np.int32)


def _assign(config: ClusterConfig, store: TokenStore, token_vectors: Floats, centroids: Floats) -> Assigned:
    vectors = document_vectors(_documents(store, range(len(store)), len(token_vectors)), token_vectors)
    labels = _hashed(store.ids, config) if config.method == "random" else nearest(vectors, centroids)
    return Assigned(store, vectors, labels)


def _refuse_empty(labels: Labels, config: ClusterConfig) -> None:
    """An expert needs something to train on."""
    empty = np.flatnonzero(np.bincount(labels, minlength=config.clusters) == 0)
    if len(empty):
        raise InputFailure(
            f"{len(empty)} of {config.clusters} clusters got no training document: give fewer --clusters, or more text"
        )


def _terms(tokenizer: Tokenizer, contrasts: Floats) -> list[tuple[str, ...]]:
    """The tokens each cluster stands out by: words and word pieces, each once whatever its case and leading space."""
    return [tuple(islice(_words(tokenizer, row), TERMS)) for row in contrasts]


def _words(tokenizer: Tokenizer, contrasts: Floats) -> Iterator[str]:
    seen = set()
    for token in np.argsort(-contrasts, kind="stable"):
        if contrasts[token] <= 0:
            return
        word = tokenizer.decode([int(token)]).strip()
        if len(word) > 1 and any(map(str.isalpha, word)) and "\ufffd" not in word and word.casefold() not in seen:
            seen.add(word.casefold())
            yield word


def _write(
    folder: Path, run_dir: Path, token_vectors: Floats, centroids: Floats, splits: Sequence[Assigned]
) -> list[FileRef]:
    tensors = {"vectorizer": ("token_vectors", token_vectors), "centroids": ("centroids", centroids)}
    written = [
        write_tensors(folder / f"{file}.safetensors", {name: torch.from_numpy(array)}, run_dir, name)
        for file, (name, array) in tensors.items()
    ]
    for split, assigned in zip(SPLITS, splits, strict=True):
        columns: dict[str, Sequence[str] | np.ndarray] = {"id": assigned.store.ids, "cluster": assigned.labels}
        written.append(write_table(folder / f"assignments-{split}.arrow", columns, run_dir))
    return written


def _metrics(
    config: ClusterConfig, fit: Clustering, train: Assigned, valid: Assigned, terms: Sequence[tuple[str, ...]]
) -> ClusterMetrics:
    clusters = _summaries(config.clusters, train, valid, terms)
    several = len(set(train.store.sources)) > 1
    # Without held-out documents the routing weights of the training documents are the next best thing to show.
    routed = valid.vectors if len(valid.vectors) else train.vectors
    weights = cluster_weights(routed, fit.centroids, config.temperature)
    entropy = -(weights * np.log(np.maximum(weights, np.finfo(np.float32).tiny))).sum(1)
    return ClusterMetrics(
        clusters=clusters,
        dimensions=fit.centroids.shape[1],
        sampled_documents=min(config.sample_documents, len(train.labels)),
        inertia=fit.inertia,
        spread=inertia(train.vectors, fit.centroids, train.labels) / len(train.labels),
        fit_balance=balance(np.bincount(fit.labels, minlength=config.clusters)),
        train_balance=balance([cluster.documents for cluster in clusters]),
        train_token_balance=balance([cluster.tokens for cluster in clusters]),
        valid_balance=balance([cluster.valid_documents for cluster in clusters]),
        purity=purity(train.labels, train.store.sources) if several else None,
        token_purity=purity(train.labels, train.store.sources, train.store.lengths) if several else None,
        nmi=mutual_information(train.labels, train.store.sources) if several else None,
        largest_weight=float(weights.max(1).mean()),
        effective_clusters=float(np.exp(entropy).mean()),
    )


def _summaries(
    clusters: int, train: Assigned, valid: Assigned, terms: Sequence[tuple[str, ...]]
) -> tuple[ClusterSummary, ...]:
    documents = np.bincount(train.labels, minlength=clusters)
    tokens = np.bincount(train.labels, weights=train.store.lengths, minlength=clusters)
    valid_documents = np.bincount(valid.labels, minlength=clusters)
    sources = [Counter[str]() for _ in range(clusters)]
    for label, source in zip(train.labels, train.store.sources, strict=True):
        sources[label][source] += 1
    return tuple(
        ClusterSummary(
            documents=int(documents[cluster]),
            tokens=int(tokens[cluster]),
            valid_documents=int(valid_documents[cluster]),
            top_terms=terms[cluster],
            sources=dict(sources[cluster].most_common(SOURCES)),
        )
        for cluster in range(clusters)
    )
