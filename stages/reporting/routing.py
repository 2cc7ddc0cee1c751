"""Whom gates ask for which text: mean weights by source and by cluster, as JSON and as heat maps.

- a gate is of use when it opens on its own cluster and stays shut on others: both are told
- tokens of an expert are those on whose account it has most weight, of all that come often enough to tell
"""

import io
import json
import math
from collections.abc import Callable, Sequence

import numpy as np

from schemas.evaluate_models import LayerRouting

OFTEN = 20  # occurrences of a token
TOKENS = 12  # of an expert


class RoutingTable:
    """Rows over the same documents; `starts` [documents + 1] says where each one's tokens lie."""

    def __init__(
        self, sources: Sequence[str], clusters: np.ndarray, starts: np.ndarray, ids: np.ndarray, vocabulary: int
    ) -> None:
        """`ids` [N]: the token each weight was read from."""
        lengths = np.diff(starts)
        self._sources = np.repeat(np.asarray(sources, dtype=object), lengths)
        self._clusters = np.repeat(clusters, lengths)
        self._ids = ids
        self._vocabulary = vocabulary
        self.rows: list[LayerRouting] = []

    def add(self, model: str, weights: np.ndarray, text: Callable[[int], str]) -> None:
        """Append a model's weights [N, experts + 1] at the experts' inputs, or [N, layers, experts + 1] inside.

        The first slot is the seed. `text`: of a token.
        """
        layers = ["input"] if weights.ndim == 2 else [f"layer {layer}" for layer in range(weights.shape[1])]
        weight_LNS = weights[None] if weights.ndim == 2 else weights.swapaxes(0, 1)
        for name, weight_NS in zip(layers, weight_LNS, strict=True):
            self.rows.append(
                LayerRouting(
                    model=model,
                    layer=name,
                    sources=_means(weight_NS, self._sources),
                    clusters=_means(weight_NS, self._clusters),
                    experts_asked=round(float((weight_NS[:, 1:] > 0).sum(1).mean()), 4),
                    entropy=round(float(_entropy(weight_NS).mean()), 4),
                    own=_rounded(self._openness(weight_NS, own=True)),
                    foreign=_rounded(self._openness(weight_NS, own=False)),
                    tokens=tuple(tuple(map(text, ids)) for ids in self._top_tokens(weight_NS)),
                )
            )

    def _openness(self, weight_NS: np.ndarray, own: bool) -> list[float]:
        """Each expert's mean weight on its own cluster, or on all others; 0 where there is no such text."""
        masks = [(self._clusters == expert) == own for expert in range(weight_NS.shape[1] - 1)]
        return [float(weight_NS[mask, 1 + e].mean()) if mask.any() else 0.0 for e, mask in enumerate(masks)]

    def _top_tokens(self, weight_NS: np.ndarray) -> list[list[int]]:
        count_V = np.bincount(self._ids, minlength=self._vocabulary)
        often_V = np.flatnonzero(count_V >= OFTEN)
        found = []
        for weight_N in weight_NS[:, 1:].T:
            mean_V = np.bincount(self._ids, weight_N, self._vocabulary)[often_V] / count_V[often_V]
            found.append(often_V[np.argsort(-mean_V, kind="stable")[:TOKENS]].tolist())
        return found

    def as_json(self) -> bytes:
        """All rows, for scripts."""
        return (json.dumps([row.model_dump() for row in self.rows], indent=1, ensure_ascii=False) + "\n").encode()

    def plot(self) -> bytes:
        """A heat map of source by slot for each model, means over its layers and then each of them. PNG."""
        from matplotlib.figure import Figure

        models = list(dict.fromkeys(row.model for row in self.rows))
        across = max(sum(row.model == model for row in self.rows) for model in models)
        sources = list(self.rows[0].sources)
        size = 1.2 + 0.32 * len(self.rows[0].sources[sources[0]]), 1.1 + 0.26 * len(sources)
        figure = Figure(figsize=(1.5 + size[0] * across, size[1] * len(models)), layout="constrained")
        axes = figure.subplots(len(models), across, squeeze=False)
        for line, model in zip(axes, models, strict=True):
            rows = [row for row in self.rows if row.model == model]
            for place, axis in enumerate(line):
                if place >= len(rows):
                    axis.set_axis_off()
                    continue
                axis.imshow([rows[place].sources[source] for source in sources], vmin=0, vmax=1, aspect="auto")
                slots = range(len(rows[place].sources[sources[0]]))
                axis.set_xticks(slots, ["seed", *map(str, slots[:-1])], fontsize=6)
                axis.set_yticks(range(len(sources)), sources if not place else [""] * len(sources), fontsize=6)
                axis.set_title(f"{model}, {rows[place].layer}" if not place else rows[place].layer, fontsize=7)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
        return buffer.getvalue()


def _means(weight_NS: np.ndarray, group_N: np.ndarray) -> dict[str, tuple[float, ...]]:
    """Mean weights [S] of each group's tokens."""
    return {str(name): _rounded(weight_NS[group_N == name].mean(0).tolist()) for name in sorted(set(group_N))}


def _entropy(weight_NS: np.ndarray) -> np.ndarray:
    return -(weight_NS * np.log(np.where(weight_NS > 0, weight_NS, 1.0))).sum(1) / math.log(2)


def _rounded(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(value, 4) for value in values)
