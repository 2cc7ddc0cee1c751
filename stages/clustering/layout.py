"""Places of documents on a map, so that a person sees which clusters are apart and which run together.

- the first two principal components show two or three clusters and pile up the others, so centroids are laid out by
  their distances (multidimensional scaling by majorisation), from their principal components: deterministic, no chance
- a document lies among the centroids by its nearness to them, and about them as it differs from its own: so documents
  between two clusters lie between them, and a loose cluster is a wide one
"""

import numpy as np
from numpy.typing import NDArray
from sklearn.manifold import smacof
from sklearn.utils.extmath import svd_flip

from stages.clustering.distances import Labels, squared_distances
from stages.clustering.features import Floats

SHARPNESS = 0.1  # temperature of the nearness, in mean squared distances of a document to its centroid
LOOSENESS = 0.5  # of the deviations from the own centroid that are drawn
MOST_SCALED = 256  # centroids; of more, the principal components stand

Places = NDArray[np.float64]


def map_places(vectors: Floats, labels: Labels, centroids: Floats) -> Places:
    """Places [n, 2] of documents with these vectors [n, d] and clusters, among centroids [k, d]."""
    width = max(0, 2 - vectors.shape[1])  # a plane needs two directions
    vectors, centroids = (np.pad(array, ((0, 0), (0, width))) for array in (vectors, centroids))
    centres = _centres(centroids)
    distances = squared_distances(vectors, centroids)
    scale = SHARPNESS * max(float(distances[np.arange(len(labels)), labels].mean()), 1e-12)
    nearness = np.exp((distances.min(1, keepdims=True) - distances) / scale)
    places = (nearness / nearness.sum(1, keepdims=True)) @ centres
    for cluster in np.unique(labels):
        own = labels == cluster
        places[own] += LOOSENESS * _plane(vectors[own] - centroids[cluster])
    return places


def _centres(centroids: Floats) -> Places:
    plane = _plane(centroids - centroids.mean(0))
    if not 2 < len(centroids) <= MOST_SCALED:
        return plane
    distances = np.sqrt(squared_distances(centroids, centroids).astype(np.float64))
    distances = (distances + distances.T) / 2  # equal to the last bit, as the scaling demands
    np.fill_diagonal(distances, 0)
    return smacof(distances, n_components=2, init=plane, n_init=1, random_state=0)[0]


def _plane(deviations: Floats) -> Places:
    """The first two principal components [n, 2] of deviations [n, d], the same way round wherever it is computed."""
    left, values, right = np.linalg.svd(deviations.astype(np.float64), full_matrices=False)
    left, _ = svd_flip(left, right)
    plane = np.zeros((len(deviations), 2))
    rank = min(2, len(values))
    plane[:, :rank] = left[:, :rank] * values[:rank]
    return plane
