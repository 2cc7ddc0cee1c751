"""Training rows: documents packed end to end and cut into rows of equal length.

- the stream is `<end> document <end> document …`; row r holds tokens r·L to r·L + L of it (one more than L, so
  that every token is once a target), and documents may continue from one row to the next
- the rows of a step are a pure function of (seed, step): resuming needs no state but the number of the step
- each epoch visits every row once, in an order of its own
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from schemas.failures import InputFailure
from stages.data.token_store import TokenStore

NAMED = 40  # documents that `describe` lists


class Rows:
    """Rows of `length` + 1 tokens over some documents of a store (all when `documents` is None)."""

    def __init__(
        self, store: TokenStore, end_of_text: int, length: int, documents: Sequence[int] | np.ndarray | None = None
    ) -> None:
        """Raises InputFailure when the documents do not fill a single row."""
        self.store = store
        self.end_of_text = end_of_text
        self.length = length
        chosen = np.arange(len(store)) if documents is None else np.asarray(documents, dtype=np.int64)
        self._documents = chosen
        lengths = store.lengths[chosen] + 1  # the separator before each document
        self._starts = np.concatenate([[0], np.cumsum(lengths)])
        self.tokens = int(self._starts[-1])
        self.count = (self.tokens - 1) // length
        if self.count < 1:
            raise InputFailure(
                f"{len(chosen)} documents with {self.tokens} tokens do not fill one row of {length} tokens: "
                "give more text, fewer clusters or a smaller --sequence-length"
            )

    def row(self, index: int) -> np.ndarray:
        """Row `index` as int64 [length + 1]."""
        start, stop = index * self.length, (index + 1) * self.length + 1
        pieces: list[np.ndarray] = []
        place = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start < stop:
            document = self.store.tokens(int(self._documents[place]))
            offset = start - int(self._starts[place])
            if offset == 0:
                pieces.append(np.array([self.end_of_text]))
                start, offset = start + 1, 1
            taken = document[offset - 1 : offset - 1 + stop - start]
            pieces.append(taken)
            start += len(taken)
            place += 1
        return np.concatenate(pieces).astype(np.int64)

    def batch(self, step: int, size: int, seed: int) -> Tensor:
        """The rows of optimizer step `step` (from 0), int64 [size, length + 1]."""
        return torch.from_numpy(np.stack([self.row(index) for index in self.drawn(step, size, seed)]))

    def drawn(self, step: int, size: int, seed: int) -> list[int]:
        """The numbers of the rows of optimizer step `step`."""
        places = range(step * size, (step + 1) * size)
        return [int(_order(seed, place // self.count, self.count)[place % self.count]) for place in places]

    def documents(self, index: int) -> list[str]:
        """The ids of the documents with tokens in row `index`."""
        ends = index * self.length, (index + 1) * self.length
        first, last = np.searchsorted(self._starts, ends, side="right") - 1
        return [self.store.ids[document] for document in self._documents[first : last + 1]]

    def batches(self, size: int, seed: int) -> "Batches":
        """The rows of every step, for a training."""
        return Batches(self, size, seed)


@dataclass(frozen=True)
class Batches:
    """The rows of every step of a training: called with a step, it gives them; it can also say which they are."""

    rows: Rows
    size: int
    seed: int

    def __call__(self, step: int) -> Tensor:
        """See `Rows.batch`."""
        return self.rows.batch(step, self.size, self.seed)

    def describe(self, step: int) -> str:
        """The rows of a step by number and the documents in them by id, in one line."""
        drawn = self.rows.drawn(step, self.size, self.seed)
        names = list(dict.fromkeys(name for index in drawn for name in self.rows.documents(index)))
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        return f"rows {', '.join(map(str, drawn))} (documents {', '.join(names[:NAMED])}{more})"


@dataclass(frozen=True)
class LabelledBatches:
    """Rows of several kinds in turn, and in a last column the number of the row's kind."""

    kinds: Sequence[Rows]
    size: int
    seed: int

    def __call__(self, step: int) -> Tensor:
        """The rows of optimizer step `step`, int64 [size, length + 2]."""
        places = range(step * self.size, (step + 1) * self.size)
        count = len(self.kinds)
        drawn = [self.kinds[place % count].batch(place // count, 1, self.seed) for place in places]
        labels = torch.tensor([place % count for place in places])
        return torch.cat([torch.cat(drawn), labels[:, None]], 1)


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)
