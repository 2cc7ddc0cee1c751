"""Texts that a composed model writes, packed where it can be: one, or several side by side.

- prompts and contexts begun anew are read a text at a time by the model as it is, all but their last token
- with few experts active texts differ in whom they ask, so such a text is alone, and the model as it is reads those
  tokens at which it chooses
"""

from torch import Tensor

from stages.nn.choice import ChosenExperts
from stages.nn.composed_writer import ComposedWriter, writable
from stages.nn.memory import ComposedReader
from stages.nn.readers import Reader
from stages.nn.text_batches import Batch


class ComposedPlace(ComposedReader):
    """The row of one text in a writer."""

    def __init__(self, row: int, model: ChosenExperts, writer: ComposedWriter | None = None) -> None:
        """Without a writer that others share, one of its own is made when something is written."""
        self.row = row
        self._writer = writer
        self._written = False  # whether the writer has the text, or the cache
        super().__init__(model)

    def begin(self, skipped: list[int]) -> None:
        """See Restarts."""
        self._written = False
        super().begin(skipped)

    def restart(self, kept: list[int]) -> None:
        """See Restarts."""
        self._leave()
        super().restart(kept)

    def read_to_last(self, ids: list[int]) -> int:
        """See Place."""
        *before, newest = ids
        if before:
            self._leave()
            super().read(before)
        if not self._written:
            self._packed().take(self.row, self._cache.composed, self._cache.active)
            self._written = True
        return newest

    def read(self, ids: list[int]) -> Tensor:
        """See Reader; for a text that is alone."""
        seen = self._packed().length(self.row) if self._written else self._cache.composed.experts.seen
        if self._model.chooses_at(seen + len(ids) - 1):
            self._leave()
            return super().read(ids)
        return self._packed().step([self.read_to_last(ids)])[0].log_softmax(-1)

    def batch(self, rows: int) -> "ComposedBatch | None":
        """For texts side by side, written by the same model; None where each chooses experts of its own."""
        return ComposedBatch(self._model, rows) if self._model.count == len(self._model.composed.experts) else None

    def _leave(self) -> None:
        if self._written:
            self._packed().give_back(self.row)
            self._written = False

    def _packed(self) -> ComposedWriter:
        self._writer = self._writer or ComposedWriter(self._model.composed, 1)
        return self._writer


class ComposedBatch(Batch[ComposedPlace]):
    """Up to `rows` texts written side by side by a composed model with all its experts."""

    def __init__(self, model: ChosenExperts, rows: int) -> None:
        super().__init__()
        self._model = model
        self._writer = ComposedWriter(model.composed, rows)

    def _new_place(self, row: int) -> ComposedPlace:
        return ComposedPlace(row, self._model, self._writer)

    def _move(self, source: int, target: int) -> None:
        self._writer.move(source, target)

    def _step(self, ids: list[int]) -> Tensor:
        return self._writer.step(ids)


def composed_reader(model: ChosenExperts) -> Reader:
    """What reads one text, as fast as it can be."""
    if not writable(model.composed):
        return ComposedReader(model)
    return ComposedPlace(0, model)
