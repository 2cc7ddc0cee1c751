"""Held-out documents cut into windows for scoring: every token of a document is predicted exactly once.

- a window's input starts with the token before it (the separator, for a document's first), so nothing is predicted from
  nothing; its context is the window alone, the same for every model. What is no context, such as which experts have
  predicted the document so far, a model may remember from window to window
- results of all models are flat arrays over the same tokens, in the order of the documents
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from loguru import logger
from torch import Tensor

from schemas.failures import UsageFailure
from stages.data.token_store import TokenStore


@dataclass(frozen=True)
class WindowBatch:
    """Some windows padded to one length: `ids` and `targets` int64 [B, T], and where their tokens lie, flat.

    `begins`: whether each is the first of its document.
    """

    ids: Tensor
    targets: Tensor
    real: np.ndarray  # bool [B, T]
    place: np.ndarray  # int64 [tokens in the batch]: flat numbers of the real tokens
    begins: bool


class Windows:
    """The windows of some documents of a store."""

    def __init__(
        self, store: TokenStore, documents: Sequence[int], end_of_text: int, length: int, *, switched: bool = False
    ) -> None:
        """`switched`: each document goes on, after its first half, as another of these documents does."""
        self.documents = np.asarray(documents, dtype=np.int64)
        self._ends = _others(store, self.documents) if switched else None
        self.lengths = store.lengths[self.documents]
        if self._ends is not None:  # every half is there once
            self.lengths = self.lengths // 2 + (store.lengths[self._ends] + 1) // 2
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])
        self.tokens = int(self.starts[-1])
        self.bytes = int(store.bytes[self.documents].sum())
        self._store = store
        self._end_of_text = end_of_text
        self._length = length

    def document_tokens(self, number: int) -> np.ndarray:
        """The ids of the number-th of these documents."""
        begun = self._store.tokens(int(self.documents[number]))
        if self._ends is None:
            return begun
        ended = self._store.tokens(int(self._ends[number]))
        return np.concatenate([begun[: len(begun) // 2], ended[len(ended) // 2 :]])

    def names(self, labels: Sequence[str]) -> list[str]:
        """A label for each document: its own, or one for all where a document is made of two."""
        return ["switched"] * len(labels) if self._ends is not None else [*labels]

    def texts(self) -> Iterator[np.ndarray]:
        """The ids of each document."""
        return map(self.document_tokens, range(len(self.documents)))

    def inputs(self) -> Iterator[Tensor]:
        """The token before each token of a document, int64 [tokens]: the separator first."""
        for document in self.texts():
            yield torch.from_numpy(np.append(self._end_of_text, document[:-1]).astype(np.int64))

    def split(self, values: Tensor) -> list[Tensor]:
        """Values of all tokens [N, …] by document."""
        return list(values.split(self.lengths.tolist()))

    def window_starts(self) -> np.ndarray:
        """Flat numbers of the tokens with which a window begins."""
        ends = self.starts[1:]
        return np.concatenate(
            [np.arange(start, end, self._length) for start, end in zip(self.starts, ends, strict=False)]
        )

    def places(self) -> np.ndarray:
        """Each token's place in its window, int64 [tokens]."""
        return np.concatenate([np.arange(count) % self._length for count in self.lengths])

    def batches(self, size: int) -> Iterator[WindowBatch]:
        """All windows, `size` at a time, those of like length together so that little is padding.

        Neighbours are of different documents, as far as there are such: what stands beside a text is another text.
        """
        spans = [
            (number, first, min(first + self._length, int(count)))
            for number, count in enumerate(self.lengths)
            for first in range(0, int(count), self._length)
        ]
        spans.sort(key=lambda span: (span[1] - span[2], span[1], span[0]))
        for start in range(0, len(spans), size):
            yield self._batch(spans[start : start + size])

    def batches_in_turn(self, size: int) -> Iterator[WindowBatch]:
        """All windows, `size` documents at a time: the first of each, then the second of those that have one.

        The longest documents come first, so that those that go on are the first rows of the batch before, all full.
        """
        order = np.argsort(-self.lengths, kind="stable")
        for start in range(0, len(order), size):
            numbers = order[start : start + size].tolist()
            for first in range(0, int(self.lengths[numbers[0]]), self._length):
                ends = [(number, min(first + self._length, int(self.lengths[number]))) for number in numbers]
                yield self._batch([(number, first, last) for number, last in ends if last > first])

    def collect(
        self,
        compute: Callable[[Tensor, Tensor], Tensor],
        size: int,
        label: str,
        device: torch.device,
        begin: Callable[[], None] | None = None,
    ) -> Tensor:
        """What `compute(ids [B, T], targets [B, T])` says of every token, flat: [N, …] for [B, T, …].

        `begin`: if `compute` remembers what it read of a document, what makes it forget. Windows then come in turn.
        """
        found = torch.empty(0)
        done = 0
        for batch in self.batches_in_turn(size) if begin else self.batches(size):
            if begin and batch.begins:
                begin()
            with torch.no_grad():
                values = compute(batch.ids.to(device), batch.targets.to(device)).cpu()
            if not done:
                found = values.new_empty(self.tokens, *values.shape[2:])
            found[torch.from_numpy(batch.place)] = values[torch.from_numpy(batch.real)]
            done += len(batch.place)
            logger.bind(task=label, done=done, total=self.tokens, text="tokens").debug("{}", label)
        return found

    def _batch(self, spans: list[tuple[int, int, int]]) -> WindowBatch:
        longest = max(last - first for _, first, last in spans)
        ids = np.full((len(spans), longest), self._end_of_text, dtype=np.int64)
        targets = ids.copy()
        real = np.zeros(ids.shape, dtype=bool)
        place = []
        for row, (number, first, last) in enumerate(spans):
            document = self.document_tokens(number)
            targets[row, : last - first] = document[first:last]
            ids[row, 1 : last - first] = document[first : last - 1]
            if first:
                ids[row, 0] = document[first - 1]
            real[row, : last - first] = True
            place.append(self.starts[number] + np.arange(first, last))
        begins = all(first == 0 for _, first, _ in spans)
        return WindowBatch(torch.from_numpy(ids), torch.from_numpy(targets), real, np.concatenate(place), begins)


def _others(store: TokenStore, documents: np.ndarray) -> np.ndarray:
    """The same documents in another order: with each stands one of another source, as far as there are such."""
    order = np.argsort([store.sources[document] for document in documents], kind="stable")
    most = max(np.unique([store.sources[document] for document in documents], return_counts=True)[1], default=0)
    ends = np.empty_like(documents)
    ends[order] = documents[np.roll(order, -int(most))]
    return ends


def choose_windows(
    store: TokenStore, end_of_text: int, length: int, scored: int, again: int, others: int, *, switched: bool = False
) -> tuple[Windows, Windows, Windows]:
    """Windows of so many tokens, at most: to score, of the same to score once more, and of documents not scored.

    Raises UsageFailure as `choose_documents` does; `others` may be 0.
    """
    documents = choose_documents(store, scored)
    few = choose_documents(store, min(scored, again))
    rest = choose_documents(store, others, documents) if others else []
    found = (Windows(store, chosen, end_of_text, length, switched=switched) for chosen in (documents, few, rest))
    return next(found), next(found), next(found)


def choose_documents(store: TokenStore, tokens: int, excluded: Sequence[int] = ()) -> list[int]:
    """Whole documents of at most `tokens` tokens together, every source getting the same share where it has so much.

    In the order of the store within each source, which tokenize leaves unrelated to the split; those `excluded` stay
    out. Raises UsageFailure when not a single document fits.
    """
    sources = np.asarray(store.sources, dtype=object)
    sources[list(excluded)] = None
    names = sorted(set(sources) - {None})
    if not names:
        raise UsageFailure(f"all {len(store)} held-out documents are taken already: give fewer with --tokens")
    chosen: list[int] = []
    budget = tokens
    by_size = sorted(names, key=lambda name: int(store.lengths[sources == name].sum()))
    for left, name in zip(range(len(names), 0, -1), by_size, strict=True):
        taken = 0
        for document in np.flatnonzero(sources == name):
            if taken + store.lengths[document] <= budget // left:
                chosen.append(int(document))
                taken += int(store.lengths[document])
        budget -= taken
    if not chosen:
        raise UsageFailure(
            f"{tokens} tokens hold no whole held-out document (the shortest has {store.lengths.min()}, and sources "
            "share the tokens): give more with --tokens, --usage-tokens or --fit-tokens"
        )
    return sorted(chosen)
