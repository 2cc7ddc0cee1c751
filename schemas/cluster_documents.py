"""Settings and manifests of `cpipe cluster`: the clusters themselves, and a comparison of numbers of clusters.

- where the user's own vectors lie is not in the key; what they hold is: the file's sha256 is an input
- `--sweep` is a stage of its own in `clusters-sweep/`: `clusters/` is left as it is
"""

from math import prod
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from schemas.files import FileRef
from schemas.manifest import Manifest
from schemas.strict import Config, Strict, runtime_setting
from schemas.tokenize_text import Split

CLUSTERS = 8
MOST_CLUSTERS = 4096
OF_ONE_CLUSTERING = {"clusters", "tree", "overlap", "temperature", "materialise"}  # settings a sweep does not look at


class ClusterConfig(Config):
    """How many clusters, how documents become vectors, how k-means is fitted, and what is written."""

    clusters: int = Field(CLUSTERS, ge=1, le=MOST_CLUSTERS, description="Number of clusters, so of experts.")
    tree: str | None = Field(
        None,
        pattern=r"^[1-9][0-9]{0,3}(x[1-9][0-9]{0,3}){1,9}$",
        description="Clusters in clusters: 4x4 cuts the documents into 4 and each of these into 4; the 16 count.",
    )
    sweep: str | None = Field(
        None,
        pattern=r"^[1-9][0-9]{0,3}(,[1-9][0-9]{0,3})*$",
        description="Only compare numbers of clusters, as in 4,8,16: no clusters are written.",
    )
    method: Literal["balanced", "unbalanced", "random"] = Field(
        "balanced",
        description="k-means with equal sizes while fitting, plain k-means, or a random partition as control.",
    )
    equal: Literal["tokens", "documents"] = Field(
        "tokens", description="What the clusters of the balanced method get the same amount of while fitting."
    )
    vectors: str | None = runtime_setting(
        None,
        "Your own document vectors to cluster by: .arrow or .parquet with `id` and `vector`, or .npy or .safetensors "
        "with the ids, one a line, in FILE.ids; default: tf-idf of the tokens.",
    )
    dimensions: int = Field(100, ge=1, le=4096, description="Of the vectors made of tokens (truncated SVD).")
    sample_documents: int = Field(50_000, gt=0, description="Training documents that vectors and centroids fit on.")
    restarts: int = Field(3, gt=0, description="Starts of k-means, of which the best is kept.")
    iterations: int = Field(50, gt=0, description="Rounds of k-means at most, in each start.")
    potentials: bool = Field(
        False,
        description="Take a number per cluster off the distances, so that documents outside of the fit stay balanced.",
    )
    overlap: float = Field(
        0.0, ge=0, le=1, description="Share of the training documents, those nearest to a border, for two experts each."
    )
    temperature: float = Field(
        0.1, gt=0, description="Of the weights exp(-squared distance / temperature) that route a text to the experts."
    )
    materialise: bool = Field(
        False, description="Also write the token shards of each cluster, so that its expert needs no others."
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Of the sample, the SVD and the starts of k-means.")
    workers: int | None = runtime_setting(None, "Threads that assign documents; default: one per core.", gt=0)

    @model_validator(mode="before")
    @classmethod
    def _count_leaves(cls, values: Any) -> Any:
        """The leaves of the tree are the clusters, unless another number is asked for."""
        if isinstance(values, dict) and values.get("tree") and values.get("clusters", CLUSTERS) == CLUSTERS:
            branches = str(values["tree"]).split("x")
            if all(branch.isdecimal() for branch in branches):
                return {**values, "clusters": prod(map(int, branches))}
        return values

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.tree and self.clusters != prod(self.branches()):
            raise ValueError(f"--tree {self.tree} makes {prod(self.branches())} clusters, not {self.clusters}")
        if self.tree and self.method != "balanced":
            raise ValueError(f"--tree is fitted with clusters of equal size, not with --method {self.method}")
        if self.method == "random" and (self.overlap or self.vectors or self.sweep):
            given = next(name for name in ("overlap", "vectors", "sweep") if getattr(self, name))
            raise ValueError(f"--{given} needs distances, and --method random goes by the documents' names alone")
        if self.potentials and self.method != "balanced":
            raise ValueError(f"--potentials keep clusters of equal size equal, and --method {self.method} makes none")
        if self.overlap and self.clusters == 1 and not self.sweep:
            raise ValueError("--overlap needs a second cluster")
        if self.sweep and max(self.counts()) > MOST_CLUSTERS:
            raise ValueError(f"--sweep {self.sweep}: at most {MOST_CLUSTERS} clusters")
        if self.sweep and self.tree:
            raise ValueError("--sweep compares numbers of clusters without --tree")
        return self

    def branches(self) -> tuple[int, ...]:
        """The levels of the tree, from its root."""
        return tuple(map(int, self.tree.split("x"))) if self.tree else ()

    def counts(self) -> tuple[int, ...]:
        """The numbers of clusters to compare, ascending."""
        return tuple(sorted(set(map(int, self.sweep.split(","))))) if self.sweep else ()

    def key_settings(self) -> dict[str, Any]:
        """See Config; of a sweep, without what it does not look at."""
        unused = OF_ONE_CLUSTERING if self.sweep else set()
        return {name: value for name, value in super().key_settings().items() if name not in unused}


class ClusterSummary(Strict):
    """What one cluster holds."""

    cluster: int = Field(ge=0, description="Its number.")
    documents: int = Field(ge=0, description="Training documents.")
    tokens: int = Field(ge=0, description="Training tokens.")
    shared_documents: int = Field(ge=0, description="Training documents of other clusters that overlap with it.")
    valid_documents: int = Field(ge=0, description="Held-out documents.")
    top_terms: tuple[str, ...] = Field(description="Tokens whose tf-idf stands out most against the whole corpus.")
    central_documents: tuple[str, ...] = Field(description="Training documents nearest to the centroid, by id.")
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
    valid_token_balance: float | None = Field(None, ge=1, description="Of held-out tokens.")
    purity: float | None = Field(description="Share of training documents from their cluster's main source.")
    token_purity: float | None = Field(description="Share of training tokens from their cluster's main source.")
    nmi: float | None = Field(description="Normalised mutual information of cluster and source; null for one source.")
    shared_documents: int = Field(ge=0, description="Training documents that two experts see.")
    shared_tokens: int = Field(ge=0, description="Training tokens that two experts see.")
    largest_weight: float = Field(description="Mean over held-out documents of the largest routing weight.")
    effective_clusters: float = Field(description="Mean over held-out documents of exp(entropy of routing weights).")
    routed_home: float = Field(
        ge=0, le=1, description="Share of held-out documents that routing by tokens would send to their own cluster."
    )


class ClusterManifest(Manifest):
    """Manifest of `clusters/`: vectorizer.safetensors, centroids.safetensors, assignments-{train,valid}.arrow.

    centroids.safetensors holds `centroids` to route by, `given_centroids` with `vectors`, and with `potentials` one for
    each cluster: documents were assigned by squared distance, to `given_centroids` where there are some, less these.

    And for people clusters.md and map.png; with `materialise` also 000/train-00000.arrow, 000/valid-00000.arrow ….
    """

    command: ClassVar[str] = "cluster"
    folder: ClassVar[str] = "clusters"

    config: ClusterConfig
    metrics: ClusterMetrics

    def shards(self, cluster: int, split: Split) -> list[FileRef]:
        """The token shards of one cluster, in the order of the documents; none unless materialised."""
        start = f"{self.folder}/{cluster:03d}/{split}-"
        return [ref for ref in self.outputs if ref.path.startswith(start)]


class SweepRow(Strict):
    """One number of clusters, measured on the documents of the sample. Balances are largest over mean: 1 is even."""

    clusters: int = Field(ge=1, description="Number of clusters.")
    inertia: float = Field(ge=0, description="Sum of squared distances in the fit, the best of the seeds.")
    spread: float = Field(ge=0, description="Mean squared distance of the documents to the nearest centroid.")
    document_balance: float = Field(ge=1, description="Of documents, each with its nearest centroid.")
    token_balance: float = Field(ge=1, description="Of their tokens.")
    purity: float | None = Field(description="Share of documents from their cluster's main source.")
    nmi: float | None = Field(description="Normalised mutual information of cluster and source; null for one source.")
    stability: float = Field(le=1, description="Mean adjusted Rand index of the clusters of two seeds; 1: the same.")


class SweepMetrics(Strict):
    """The numbers of clusters beside each other."""

    rows: tuple[SweepRow, ...] = Field(description="One row per number of clusters, ascending.")
    sampled_documents: int = Field(ge=1, description="Documents that everything was measured on.")
    dimensions: int = Field(ge=1, description="Dimensions of their vectors.")


class SweepManifest(Manifest):
    """Manifest of `clusters-sweep/`: a JSON file for each number of clusters, from which a stopped sweep goes on."""

    command: ClassVar[str] = "cluster"
    folder: ClassVar[str] = "clusters-sweep"

    config: ClusterConfig
    metrics: SweepMetrics
