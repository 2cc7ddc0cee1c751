"""A composed model that asks few of its experts: which, is decided for each text from what is known of it.

Shape letters: B batch, T new tokens, X experts, F priors per expert.

- every `SEGMENT` tokens, from what lies before them: nothing a text says later changes who was asked before
- the first `OPENING` tokens are read by all experts, as nothing is known yet; after them those stay whose prior before
  the output layer is highest: what the gates said at the last token, and how well each expert predicted the opening
- of experts at rest nothing newer than the opening is known but the gates' word. Where there are gates, what the
  opening said fades as evidence does, and an expert that comes in reads all it has missed. Without gates, the first
  choice of a context stands
- texts differ in whom they ask, so each is read alone
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.nn.bridges import Shares
from stages.nn.central import HEAD_SITE
from stages.nn.composed import ComposedCache, ComposedModel
from stages.nn.experts import FADING

OPENING = 16  # tokens
SEGMENT = 64  # tokens; from the opening to a multiple of them, and then from one to the next


@dataclass
class ChoiceCache:
    """What is kept of one text: the model's caches, who is asked, and what the opening said of all experts."""

    composed: ComposedCache
    active: Sequence[int] | None = None  # None: all
    first_BXF: Tensor | None = None


class ChosenExperts:
    """Runs a composed model with `count` experts active per text, of which it counts what they read."""

    def __init__(self, composed: ComposedModel, count: int) -> None:
        self.composed = composed
        self.count = min(count, len(composed.experts))
        self.tokens = 0
        self.tokens_read = 0  # by experts, with what those that came in had missed

    def new_cache(self) -> ChoiceCache:
        """An empty cache, of one text."""
        return ChoiceCache(self.composed.new_cache())

    def read(self, ids_1T: Tensor, cache: ChoiceCache, *, last: bool = False) -> Tensor:
        """Logits [1, T, V] for the token after each of further tokens of one text; `last`: after the last only."""
        experts, before = cache.composed.experts, cache.composed.experts.tokens_read
        logits: list[Tensor] = []
        while ids_1T.shape[1]:
            left = OPENING - experts.seen if experts.seen < OPENING else SEGMENT - experts.seen % SEGMENT
            piece_1T, ids_1T = ids_1T[:, :left], ids_1T[:, left:]
            if self.count == len(self.composed.experts):  # nothing to choose
                piece_1T, ids_1T = torch.cat([piece_1T, ids_1T], 1), ids_1T[:, :0]
            elif experts.seen == OPENING or (experts.seen and left == SEGMENT):
                cache.active = self._choose(cache)
            out = self.composed(piece_1T, cache.composed, active=cache.active, last=last)
            logits = [out.logits_BTV] if last else [*logits, out.logits_BTV]
            self.tokens += piece_1T.shape[1]
        self.tokens_read += experts.tokens_read - before
        return torch.cat(logits, 1)

    def chooses_at(self, seen: int) -> bool:
        """Whether who reads the token after the first `seen` is, or is yet to be, chosen there."""
        return self.count < len(self.composed.experts) and (seen <= OPENING or seen % SEGMENT == 0)

    @property
    def read_per_token(self) -> float:
        """Tokens that experts read for one of the texts."""
        return self.tokens_read / max(1, self.tokens)

    def _choose(self, cache: ChoiceCache) -> list[int]:
        """The experts of the segment that begins."""
        now_BXF = cache.composed.prior_BXF
        assert now_BXF is not None and len(now_BXF) == 1, "texts differ in whom they ask"
        if cache.first_BXF is None:
            cache.first_BXF = now_BXF
        prior_BXF = cache.first_BXF.clone()
        if self.composed.gate is not None:
            kinds = self.composed.experts.kinds
            since = cache.composed.experts.seen - OPENING
            fading_F = prior_BXF.new_tensor([1.0, *FADING][: 1 + kinds])
            prior_BXF = torch.cat([now_BXF[..., :1], prior_BXF[..., 1:]], -1) * fading_F**since
        head = self.composed.bridges.sites[HEAD_SITE]
        assert isinstance(head, Shares)
        with torch.no_grad():
            score_X = head.prior(prior_BXF[:, None])[0, 0]
        return sorted(score_X.topk(self.count).indices.tolist())
