"""Settings and manifest of `cpipe cluster`."""

from typing import ClassVar, Literal

from pydantic import Field

from schemas.manifest import Manifest
from schemas.strict import Config, Strict


class ClusterConfig(Config):
    """How many clusters, how documents become vectors, how k-means is fitted."""

    clusters: int = Field(8, ge=1, le=4096, description="Number of clusters, so of experts.")
    method: Literal["balanced", "unbalanced", "random"] = Field(
        "balanced",
        description="k-means with equal sizes while fitting, plain k-means, or a random partition as control.",
    )
    equal: Literal["tokens", "documents"] = Field(
        "tokens", description="What the clusters of the balanced method get the same amount of while fitting."
    )
    dimensions: int = Field(100, ge=1, le=4096, description="Of the document vectors (truncated SVD).")
    sample_documents: int = Field(50_000, gt=0, description="Training documents that vectors and centroids fit on.")
    restarts: int = Field(3, gt=0, description="Starts of k-means, of which the best is kept.")
    iterations: int = Field(50, gt=0, description="Rounds of k-means at most, in each start.")
    temperature: float = Field(
        0.1, gt=0, description="Of the weights exp(-squared distance / temperature) that route a text to the experts."
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Of the sample, the SVD and the starts of k-means.")


class ClusterSummary(Strict):
    """What one cluster holds."""

    documents: int = Field(ge=0, description="Training documents.")
    tokens: int = Field(ge=0, description="Training tokens.")
    valid_documents: int = Field(ge=0, description="Held-out documents.")
    top_terms: tuple[str, ...] = Field(description="Tokens whose tf-idf stands out most against the whole corpus.")
    sources: dict[str, int] = Field(description="Training documents of the most frequent sources.")


class ClusterMetrics(Strict):
    """How the clustering came out. Balances are largest over mean: 1 is even."""

    clusters: tuple[ClusterSummary, ...] = Field(description="The clusters, by number.")
    dimensions: int = Field(ge=1, description="Dimensions of the vectors; fewer than asked for in a tiny corpus.")
    sampled_documents: int = Field(ge=1, description="Documents that vectors and centroids were fitted on.")
    inertia: float = Field(ge=0, description="Sum of squared distances in the fit.")
    spread: float = Field(ge=0, description="Mean squared distance of the training documents to their centroids.")
    fit_balance: float = Field(ge=1, description="In the fit: of documents, or of tokens where they are made equal.")
    train_balance: float = Field(ge=1, description="Of training documents.")
    train_token_balance: float = Field(ge=1, description="Of training tokens.")
    valid_balance: float = Field(ge=1, description="Of held-out documents.")
    purity: float | None = Field(description="Share of training documents from their cluster's main source.")
    token_purity: float | None = Field(description="Share of training tokens from their cluster's main source.")
    nmi: float | None = Field(description="Normalised mutual information of cluster and source; null for one source.")
    largest_weight: float = Field(description="Mean over held-out documents of the largest routing weight.")
    effective_clusters: float = Field(description="Mean over held-out documents of exp(entropy of routing weights).")


class ClusterManifest(Manifest):
    """Manifest of `clusters/`: vectorizer.safetensors, centroids.safetensors, assignments-{train,valid}.arrow."""

    command: ClassVar[str] = "cluster"
    folder: ClassVar[str] = "clusters"

    config: ClusterConfig
    metrics: ClusterMetrics
