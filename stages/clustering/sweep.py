"""One number of clusters on trial: how even, how tight, how much alike from seed to seed.

- everything is measured on the documents of the sample, each at its nearest centroid (by potentials, if they are asked
  for): it is to compare numbers
- spread falls and purity rises with the number whatever the text; balance and stability tell where it stops to pay
"""

from collections.abc import Sequence

import numpy as np

from schemas.cluster_documents import ClusterConfig, SweepRow
from stages.clustering.assignment import Numbers
from stages.clustering.distances import inertia, nearest
from stages.clustering.features import Floats
from stages.clustering.fitting import fit_clusters
from stages.clustering.quality import balance, mutual_information, purity, stability

SEEDS = 3  # fits of each number, from which its stability is told


def try_clusters(
    config: ClusterConfig,
    clusters: int,
    vectors: Floats,
    lengths: Numbers,
    sources: Sequence[str],
    device: str = "cpu",
) -> SweepRow:
    """Fit `clusters` to the sample's vectors [n, d] from several seeds. Raises InputFailure as `fit_clusters` does."""
    settings = [{"clusters": clusters, "sweep": None, "seed": config.seed + number} for number in range(SEEDS)]
    fitted = [fit_clusters(config.model_copy(update=changed), vectors, lengths, device) for changed in settings]
    fits = [found.clustering for found in fitted]
    labelings = [nearest(vectors, found.clustering.centroids, found.potentials, device) for found in fitted]
    best = int(np.argmin([fit.inertia for fit in fits]))
    labels, several = labelings[best], len(set(sources)) > 1
    return SweepRow(
        clusters=clusters,
        inertia=fits[best].inertia,
        spread=inertia(vectors, fits[best].centroids, labels) / len(vectors),
        document_balance=balance(np.bincount(labels, minlength=clusters)),
        token_balance=balance(np.bincount(labels, weights=lengths, minlength=clusters)),
        purity=purity(labels, sources) if several else None,
        nmi=mutual_information(labels, sources) if several else None,
        stability=stability(labelings),
    )
