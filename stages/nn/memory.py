"""What a composed model knows of a document when its context is full, and how the next context goes on from it.

Shape letters: B batch, T new tokens, V vocabulary.

- caches of layers end with a context, which is as long as the rows of training. What gates have read and how well each
  expert predicted are fading sums over tokens, which no context bounds: of a long document they go on
- what an expert that rested did not read counts for it as for the mean of those that read it
"""

import torch
from torch import Tensor

from stages.nn.choice import ChosenExperts
from stages.nn.composed import ComposedCache
from stages.nn.gates import GateCache


def recall(cache: ComposedCache, before: ComposedCache, rows: int, *, follows: bool = True) -> None:
    """Have a context know what another came to know of the first `rows` of its texts.

    `follows`: whether the next token to be read is the one after the last that the other read.
    """
    cache.experts.recall(before.experts, rows, follows=follows)
    if isinstance(cache.gate, GateCache) and before.gate.read_BD is not None:
        cache.gate.read_BD = before.gate.read_BD[:rows]


class DocumentReader:
    """Reads documents side by side, a context at a time; those that end are left out from the last row on."""

    def __init__(self, model: ChosenExperts) -> None:
        self._model = model
        self.begin()

    def begin(self) -> None:
        """The next to be read are the first contexts of other documents."""
        self._before: ComposedCache | None = None

    def __call__(self, ids_BT: Tensor) -> Tensor:
        """Logits [B, T, V] for the token after each position of the documents' next contexts."""
        cache = self._model.new_cache()
        if self._before:
            recall(cache.composed, self._before, len(ids_BT))
        self._before = cache.composed
        return self._model.read(ids_BT, cache)


class ComposedReader:
    """A composed model in the middle of a text, with all its caches (see `stages.nn.readers.Reader`)."""

    def __init__(self, model: ChosenExperts) -> None:
        self._model = model
        self._device = next(model.composed.parameters()).device
        self.begin([])

    @torch.no_grad()
    def begin(self, skipped: list[int]) -> None:
        """See Restarts. Of what is skipped, the last context is read by experts and gates, for what they say of it."""
        self._cache = self._model.new_cache()
        if skipped:
            context = min(expert.config.max_position_embeddings for expert in self._model.composed.decoders)
            before = self._model.composed.new_cache()
            self._model.composed.consult(self._as_row(skipped[-context:]), before)
            recall(self._cache.composed, before, 1)

    @torch.no_grad()
    def restart(self, kept: list[int]) -> None:
        """See Restarts. What is kept is read once more: after it, what was known before counts, and nothing twice.

        Meanwhile it is read as if it came after what is known; so are few experts chosen for it.
        """
        before, self._cache = self._cache.composed, self._model.new_cache()
        if kept:
            recall(self._cache.composed, before, 1, follows=False)
            self._model.read(self._as_row(kept), self._cache, last=True)
        recall(self._cache.composed, before, 1)

    @torch.no_grad()
    def read(self, ids: list[int]) -> Tensor:
        """See Reader."""
        return self._model.read(self._as_row(ids), self._cache, last=True)[0, -1].log_softmax(-1)

    def _as_row(self, ids: list[int]) -> Tensor:
        return torch.tensor([ids], device=self._device)
