"""What is told of each cluster: how much it holds, what it is about, its most typical documents."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
from tokenizers import Tokenizer

from schemas.cluster_documents import ClusterConfig, ClusterSummary
from stages.clustering.assignment import Assignment, Documents
from stages.clustering.distances import Labels
from stages.clustering.features import Floats

TERMS = 10  # named per cluster
CENTRAL = 3  # documents named per cluster
SOURCES = 20  # counted per cluster; a corpus of single files has as many sources as documents


def top_terms(tokenizer: Tokenizer, contrasts: Floats) -> list[tuple[str, ...]]:
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


def central_documents(assignment: Assignment, clusters: int) -> list[list[int]]:
    """Numbers of the documents nearest to each centroid, nearest first; those that say nothing only for want of others.

    A zero vector is nearer to the middle of a loose cluster than most of its documents are.
    """
    empty = np.isinf(assignment.margins) if clusters > 1 else np.zeros(len(assignment.labels), bool)
    order = np.lexsort((assignment.distances, empty, assignment.labels))
    borders = np.cumsum(np.bincount(assignment.labels, minlength=clusters))
    starts = np.concatenate([[0], borders[:-1]])
    return [order[start : min(start + CENTRAL, end)].tolist() for start, end in zip(starts, borders, strict=True)]


def summaries(
    config: ClusterConfig,
    train: Assignment,
    shared: Labels,
    documents: Documents,
    valid_labels: Labels,
    terms: Sequence[tuple[str, ...]],
) -> tuple[ClusterSummary, ...]:
    """One entry per cluster; `shared` are the second clusters of training documents, -1 for none."""
    count = config.clusters
    sizes = np.bincount(train.labels, minlength=count)
    tokens = np.bincount(train.labels, weights=documents.lengths, minlength=count)
    shared_documents = np.bincount(shared[shared >= 0], minlength=count)
    valid_documents = np.bincount(valid_labels, minlength=count)
    sources = [Counter[str]() for _ in range(count)]
    for label, source in zip(train.labels.tolist(), documents.sources, strict=True):
        sources[label][source] += 1
    central = central_documents(train, count)
    return tuple(
        ClusterSummary(
            cluster=cluster,
            documents=int(sizes[cluster]),
            tokens=int(tokens[cluster]),
            shared_documents=int(shared_documents[cluster]),
            valid_documents=int(valid_documents[cluster]),
            top_terms=terms[cluster],
            central_documents=tuple(documents.ids[document] for document in central[cluster]),
            sources=dict(sources[cluster].most_common(SOURCES)),
        )
        for cluster in range(count)
    )
