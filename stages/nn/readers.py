"""Models in the middle of a text: what is read further is answered by the log-probabilities of the next token.

Shape letters: T new tokens, V vocabulary.

- a decoder is loaded when it is first asked; caches last as long as a context does
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from stages.nn.decoder import Decoder
from stages.nn.decoding import PackedDecoder, begin_text
from stages.nn.packing import packable


class Restarts(Protocol):
    """Where texts are read, one after the other, each a context at a time."""

    def begin(self, skipped: list[int]) -> None:
        """Begin a text, of which `skipped` comes before what will be read."""

    def restart(self, kept: list[int]) -> None:
        """Begin a new context of the text: it holds `kept`, the last tokens of the context before."""


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

    def begin(self, skipped: list[int]) -> None:
        """See Restarts."""
        self.restart([])

    def restart(self, kept: list[int]) -> None:
        """See Restarts."""
        self.pending = [*kept]
        self._further = None
