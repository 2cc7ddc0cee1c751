"""From log-probabilities per token to rows of the table: bits per byte, over all, per source and per cluster."""

import math
from collections.abc import Sequence

import numpy as np
import polars
from torch import Tensor

from schemas.evaluate_models import ModelRow, UsageRow

REFERENCE = "dense"


class ScoreTable:
    """Rows over the same documents; `starts` [documents + 1] says where each one's tokens lie."""

    def __init__(self, sources: Sequence[str], clusters: Sequence[str], sizes: np.ndarray, starts: np.ndarray) -> None:
        self._documents = polars.DataFrame({"source": sources, "cluster": clusters, "bytes": sizes})
        self._starts = starts
        self._rows: list[ModelRow] = []

    def bits_per_byte(self, log_prob_N: Tensor) -> float:
        """Over all documents together."""
        return -float(log_prob_N.double().sum()) / math.log(2) / int(self._documents["bytes"].sum())

    def add(
        self,
        model: str,
        group: str,
        log_prob_N: Tensor,
        parameters: int,
        active_parameters: int,
        training_flops: float,
        inference_flops: float,
    ) -> None:
        """Append a model's row."""
        sums = np.add.reduceat(log_prob_N.double().numpy(), self._starts[:-1])
        scored = self._documents.with_columns(bits=-polars.Series(sums) / math.log(2))
        sources, clusters = _per(scored, "source"), _per(scored, "cluster")
        self._rows.append(
            ModelRow(
                model=model,
                group=group,
                bits_per_byte=round(self.bits_per_byte(log_prob_N), 6),
                against_dense=None,
                macro_bits_per_byte=round(sum(sources.values()) / len(sources), 6),
                perplexity=round(math.exp(-float(log_prob_N.double().mean())), 4),
                parameters=parameters,
                active_parameters=active_parameters,
                training_flops=training_flops,
                inference_flops=round(inference_flops),
                sources=sources,
                clusters=clusters,
            )
        )

    def rows(self) -> tuple[ModelRow, ...]:
        """The rows, best first, each compared with dense where there is one."""
        dense = next((row.bits_per_byte for row in self._rows if row.model == REFERENCE), None)
        if dense is None:
            return tuple(sorted(self._rows, key=_score))
        compared = (
            row.model_copy(update={"against_dense": round(100 * (row.bits_per_byte / dense - 1), 3)})
            for row in self._rows
        )
        return tuple(sorted(compared, key=_score))


def usage_row(model: str, part: str, lost_N: Tensor, size: int, place_N: np.ndarray) -> UsageRow:
    """From the nats lost at every token of a text of `size` bytes, and the tokens' places in their groups."""
    lost = lost_N.double().numpy()
    places = np.bincount(place_N, weights=lost) / np.maximum(1, np.bincount(place_N))
    bits = float(lost.sum()) / math.log(2) / size
    return UsageRow(
        model=model, part=part, difference=round(bits, 6), places=tuple(round(float(nats), 6) for nats in places)
    )


def _score(row: ModelRow) -> float:
    return row.bits_per_byte


def _per(scored: polars.DataFrame, column: str) -> dict[str, float]:
    """Bits per byte of each value of `column`, by name."""
    sums = scored.group_by(column).agg(polars.col("bits").sum(), polars.col("bytes").sum()).sort(column)
    return {name: round(bits / size, 6) for name, bits, size in sums.rows()}
