"""Texts written side by side: each has a row, and their steps are taken together.

Shape letters: N texts, V vocabulary.

- rows have no gaps: when a text ends, the last row takes its place
- who writes says what a row is: a decoder here, a composed model in `stages.nn.composed_batch`
"""

from abc import ABC, abstractmethod
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from stages.nn.decoding import PackedDecoder, TextCache
from stages.nn.readers import Restarts


class Place(Restarts, Protocol):
    """Where one text is read."""

    row: int

    def read_to_last(self, ids: list[int]) -> int:
        """Read what is not read yet and all but the last of further tokens; returns that one."""


P = TypeVar("P", bound=Place)


class Batch(ABC, Generic[P]):
    """Texts written side by side, each under a number of its own."""

    def __init__(self) -> None:
        self._places: dict[int, P] = {}

    @abstractmethod
    def _new_place(self, row: int) -> P:
        """A place for another text."""

    @abstractmethod
    def _move(self, source: int, target: int) -> None:
        """Put what is in one row into another."""

    @abstractmethod
    def _step(self, ids: list[int]) -> Tensor:
        """Read one token of each row; logits [N, V] of the tokens after them."""

    def add(self, number: int) -> P:
        """Make a place for a text."""
        place = self._places[number] = self._new_place(len(self._places))
        return place

    def remove(self, number: int) -> None:
        """Give up the place of a text: the last one takes it."""
        freed = self._places.pop(number)
        if self._places and freed.row < len(self._places):
            last = max(self._places.values(), key=lambda place: place.row)
            self._move(last.row, freed.row)
            last.row = freed.row

    def read(self, unread: dict[int, list[int]]) -> dict[int, Tensor]:
        """Read further tokens of every text; logits [V] of the token after them."""
        newest = [0] * len(self._places)
        for number, ids in unread.items():
            place = self._places[number]
            newest[place.row] = place.read_to_last(ids)
        logits_NV = self._step(newest)
        return {number: logits_NV[self._places[number].row] for number in unread}


class TextPlace:
    """The row of one text in a batch; `pending` tokens wait to be read."""

    def __init__(self, row: int, decoder: PackedDecoder, cache: TextCache) -> None:
        self.row = row
        self._pending: list[int] = []
        self._decoder, self._cache = decoder, cache
        cache.lengths[row] = 0

    def begin(self, skipped: list[int]) -> None:
        """See Restarts."""
        self.restart([])

    def restart(self, kept: list[int]) -> None:
        """See Restarts."""
        self._pending = [*kept]
        self._cache.lengths[self.row] = 0

    def read_to_last(self, ids: list[int]) -> int:
        """See Place."""
        *before, newest = [*self._pending, *ids]
        self._pending = []
        if before:
            self._decoder.take(before, self._cache, self.row)
        return newest


class TextBatch(Batch[TextPlace]):
    """Up to `rows` texts written side by side by one decoder."""

    def __init__(self, decoder: PackedDecoder, rows: int) -> None:
        super().__init__()
        self._decoder = decoder
        self._cache = decoder.new_cache(rows)

    def _new_place(self, row: int) -> TextPlace:
        return TextPlace(row, self._decoder, self._cache)

    def _move(self, source: int, target: int) -> None:
        self._cache.move(source, target)

    def _step(self, ids: list[int]) -> Tensor:
        return self._decoder.step(ids, self._cache)
