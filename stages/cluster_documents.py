"""Cluster documents: token shards in; a table of token vectors, centroids and a cluster for every document out (cBTM).

- vectors and centroids are fitted on a bounded sample of the training documents; then every document, held-out ones
  too, goes to its nearest centroid. Sizes are equal in the fit only, so the manifest gives both balances. With
  `potentials` a number per cluster, stored beside the centroids, is taken off the distances, and sizes stay near equal
- clusters may come from elsewhere: the user's own vectors, or names alone (`random`, a control). A text is routed to
  experts by its tokens in any case, as they are all there is while it is written; the centroids of routing are then the
  means of the clusters' token vectors, and the manifest says how many held-out documents they send home
- a document without a token that tells anything has the zero vector: it is left out of the fit and goes to the centroid
  nearest to zero
- memory: 30 bytes per distinct token of each sampled document while tf-idf is fitted, of which 8 stay; 12 x dimensions
  bytes per sampled document; and 20 bytes per document beside its id and source. The vectors of all documents are made
  in chunks and not kept
- interrupted, the stage starts over and ends with the same bytes; a sweep goes on after the last number it measured
"""

import shutil
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from loguru import logger
from tokenizers import Tokenizer

from schemas.cluster_documents import (
    ClusterConfig,
    ClusterManifest,
    ClusterMetrics,
    SweepManifest,
    SweepMetrics,
    SweepRow,
)
from schemas.failures import IntegrityFailure
from schemas.files import FileRef, write_bytes
from schemas.manifest import InputRef
from schemas.tokenize_text import SPLITS, TokenizeManifest
from stages.artifacts.model_folder import device, write_tensors
from stages.artifacts.stage_folder import claim_folder, drop_leftovers
from stages.clustering.assignment import Documents, Numbers, members
from stages.clustering.clusters import Clustered, cluster_documents, measure
from stages.clustering.features import Floats, document_vectors
from stages.clustering.fitting import TokenVectors, choose_sample, fit_vectorizer
from stages.clustering.layout import map_places
from stages.clustering.sweep import try_clusters
from stages.data.cluster_shards import write_cluster
from stages.data.token_store import TokenStore, write_table
from stages.data.vectors import GivenVectors, vector_inputs
from stages.reporting.clusters import clusters_map, clusters_markdown

MAPPED = 3000  # documents on the map


def run(config: ClusterConfig, run_dir: Path, *, force: bool = False) -> ClusterManifest | SweepManifest:
    """Cluster the documents of `run_dir/tokens` into `run_dir/clusters`, or only compare numbers of clusters.

    Raises InputFailure when the documents cannot make so many clusters or the vectors given are not theirs, and
    IntegrityFailure when a shard was changed.
    """
    tokens = TokenizeManifest.read(run_dir)
    inputs = [tokens.as_input(), *(vector_inputs(Path(config.vectors)) if config.vectors else [])]
    if config.sweep:
        return _sweep(config, run_dir, tokens, inputs, force)
    with claim_folder(run_dir, ClusterManifest, config, inputs, force=force) as claim:
        if claim.finished:
            return claim.finished
        _drop_leftovers(claim.path)
        corpus = Corpus(config, run_dir, tokens)
        vectorizer = corpus.vectorizer  # first of all: later several threads ask for it
        clustered = cluster_documents(config, corpus.train, corpus.valid, corpus.sample, str(device()))
        metrics = measure(config, corpus.train, corpus.valid, corpus.sample, clustered, vectorizer, corpus.tokenizer)
        outputs = [
            *_write(corpus, clustered, claim.path),
            *(_write_shards(config, corpus, clustered, claim.path) if config.materialise else []),
            *_report(config, corpus, clustered, metrics, claim.path),
        ]
        return claim.finish(outputs, metrics)


def _drop_leftovers(folder: Path) -> None:
    """What a killed start left: files, and the folders of clusters."""
    drop_leftovers(folder)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)


def _sweep(
    config: ClusterConfig, run_dir: Path, tokens: TokenizeManifest, inputs: list[InputRef], force: bool
) -> SweepManifest:
    """Try numbers of clusters on the sample."""
    with claim_folder(run_dir, SweepManifest, config, inputs, force=force) as claim:
        if claim.finished:
            return claim.finished
        corpus = Corpus(config, run_dir, tokens)
        lengths, sources = corpus.train.lengths[corpus.sample], [corpus.train.sources[n] for n in corpus.sample]
        vectors = corpus.train.vectors(corpus.sample)
        rows, outputs = [], []
        for count in config.counts():
            path = claim.path / f"{count:03d}.json"
            if path.exists():
                row = SweepRow.from_json(path.read_bytes())
            else:
                row = try_clusters(config, count, vectors, lengths, sources, str(device()))
            outputs.append(write_bytes(path, row.model_dump_json(indent=2).encode(), run_dir))
            rows.append(row)
            logger.info("{} clusters: spread {:.4f}, stability {:.3f}", count, row.spread, row.stability)
        metrics = SweepMetrics(rows=tuple(rows), sampled_documents=len(vectors), dimensions=vectors.shape[1])
        return claim.finish(outputs, metrics)


class Corpus:
    """The documents of a run, with the vectors to cluster them by and those made of their tokens."""

    def __init__(self, config: ClusterConfig, run_dir: Path, tokens: TokenizeManifest) -> None:
        self.run_dir = run_dir
        self.vocabulary = tokens.metrics.vocab_size
        self.tokenizer = Tokenizer.from_file(str(tokens.output("tokenizer.json").check(run_dir)))
        self.stores = tuple(TokenStore.open([ref.check(run_dir) for ref in tokens.shards(split)]) for split in SPLITS)
        self.sample = choose_sample(config, len(self.stores[0]))
        self._config = config
        self._given: GivenVectors | None = None
        if config.vectors:
            self._given = GivenVectors.open(Path(config.vectors))
            places = self._given.places([name for store in self.stores for name in store.ids])
            self._places = np.split(places, [len(self.stores[0])])
        self.train, self.valid = (self._documents(number) for number in range(len(SPLITS)))

    @cached_property
    def vectorizer(self) -> TokenVectors:
        """Token vectors and the tf-idf of the sample they are fitted on."""
        logger.info("fitting {} dimensions on {} documents", self._config.dimensions, len(self.sample))
        return fit_vectorizer(self._config, self._tokens(self.stores[0], self.sample), self.vocabulary)

    def _documents(self, split: int) -> Documents:
        store, given = self.stores[split], self._given

        def by_tokens(numbers: Numbers) -> Floats:
            return document_vectors(self._tokens(store, numbers), self.vectorizer.table)

        vectors = by_tokens if given is None else given.reader(self._places[split])
        return Documents(store.ids, store.sources, store.lengths, vectors, by_tokens)

    def _tokens(self, store: TokenStore, numbers: Numbers) -> Iterator[np.ndarray]:
        for number in numbers.tolist():
            tokens = store.tokens(number)
            if len(tokens) and tokens.max() >= self.vocabulary:
                raise IntegrityFailure(
                    f"document {store.ids[number]} holds token {tokens.max()}, the tokenizer has only "
                    f"{self.vocabulary}: rerun `cpipe tokenize` with --force"
                )
            yield tokens


def _write(corpus: Corpus, clustered: Clustered, folder: Path) -> list[FileRef]:
    """What the next stages read."""
    centroids = {"centroids": clustered.centroids}
    if clustered.given_centroids is not None:
        centroids["given_centroids"] = clustered.given_centroids
    if clustered.potentials is not None:
        centroids["potentials"] = clustered.potentials
    files = {"vectorizer": {"token_vectors": corpus.vectorizer.table}, "centroids": centroids}
    written = []
    for name, arrays in files.items():
        tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
        written.append(write_tensors(folder / f"{name}.safetensors", tensors, corpus.run_dir, name))
    tables: dict[str, dict[str, Sequence[str] | np.ndarray]] = {
        "train": {"id": corpus.train.ids, "cluster": clustered.train.labels, "second": clustered.shared},
        "valid": {"id": corpus.valid.ids, "cluster": clustered.valid.labels},
    }
    for split, columns in tables.items():
        written.append(write_table(folder / f"assignments-{split}.arrow", columns, corpus.run_dir))
    return written


def _write_shards(config: ClusterConfig, corpus: Corpus, clustered: Clustered, folder: Path) -> list[FileRef]:
    """The documents of each cluster, and those it shares, as token shards of its own."""
    parts = (
        members(clustered.train.labels, clustered.shared, config.clusters),
        members(clustered.valid.labels, None, config.clusters),
    )
    return [
        ref
        for cluster in range(config.clusters)
        for split, store, part in zip(SPLITS, corpus.stores, parts, strict=True)
        for ref in write_cluster(
            store, part[cluster], folder / f"{cluster:03d}", split, corpus.run_dir, corpus.vocabulary
        )
    ]


def _report(
    config: ClusterConfig, corpus: Corpus, clustered: Clustered, metrics: ClusterMetrics, folder: Path
) -> list[FileRef]:
    """The table and the map for people."""
    train = corpus.train
    chosen = np.random.default_rng(config.seed).permutation(len(train.ids))[:MAPPED]
    labels = clustered.train.labels[chosen]
    places = map_places(train.vectors(chosen), labels, clustered.fitted_centroids)
    picture = clusters_map(places, labels, [train.sources[number] for number in chosen], metrics)
    return [
        write_bytes(folder / "clusters.md", clusters_markdown(metrics).encode(), corpus.run_dir),
        write_bytes(folder / "map.png", picture, corpus.run_dir),
    ]
