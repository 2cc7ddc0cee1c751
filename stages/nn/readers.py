"""Models in the middle of a text: what is read further is answered by the log-probabilities of the next token.

Shape letters: T new tokens, V vocabulary.

- a decoder is loaded when it is first asked; caches last as long as a context does
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from stages.nn.choice import ChosenExperts
from stages.nn.decoder import Decoder
from stages.nn.decoding import PackedDecoder, begin_text
from stages.nn.packing import packable


class Restarts(Protocol):
    """Where a text is read, and can be read anew."""

    def restart(self, skipped: list[int], kept: list[int]) -> None:
        """Begin a new context that holds `kept`; `skipped` were never read and belong to the text before it."""


class Reader(Restarts, Protocol):
    """A model in the middle of a text."""

    def read(self, ids: list[int]) -> Tensor:
        """Take further tokens; log-probabilities [V] of the next one."""


class DecoderReader:
    """One decoder with its cache, loaded when it is first asked; `pending` tokens wait until it is."""

    def __init__(self, load: Callable[[], Decoder]) -> None:
        self.pending: list[int] = []
        self.tokens_read = 0
        self._load = load
        self._decoder: Decoder | PackedDecoder | None = None
        self._further: Callable[[list[int]], Tensor] | None = None

    def decoder(self) -> Decoder | PackedDecoder:
        """The decoder, as it writes fastest."""
        if self._decoder is None:
            loaded = self._load()
            self._decoder = PackedDecoder(loaded) if packable(loaded) else loaded
        return self._decoder

    def read(self, ids: list[int]) -> Tensor:
        """See Reader."""
        self._further = self._further or begin_text(self.decoder())
        self.pending += ids
        unread, self.pending = self.pending, []
        self.tokens_read += len(unread)
        return self._further(unread).log_softmax(-1)

    def restart(self, skipped: list[int], kept: list[int]) -> None:
        """See Reader."""
        self.pending = [*kept]
        self._further = None


class ComposedReader:
    """A composed model with all its caches."""

    def __init__(self, model: ChosenExperts) -> None:
        self._model = model
        self._device = next(model.composed.parameters()).device
        self._pending: list[int] = []
        self._cache = model.new_cache()

    @torch.no_grad()
    def read(self, ids: list[int]) -> Tensor:
        """See Reader."""
        unread, self._pending = [*self._pending, *ids], []
        ids_1T = torch.tensor([unread], device=self._device)
        return self._model.read(ids_1T, self._cache, last=True)[0, -1].log_softmax(-1)

    def restart(self, skipped: list[int], kept: list[int]) -> None:
        """See Reader."""
        self._pending = [*kept]
        self._cache = self._model.new_cache()
