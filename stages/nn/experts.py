"""The frozen experts of a composed model: what they make of a text, and how well each predicted it so far.

Shape letters: B batch, T new tokens, S tokens so far, E expert width, X experts, A active experts, F kinds of evidence.

- experts are given, never changed, and what one's states may say at a token depends on tokens up to it only
- evidence: the log-likelihood each expert gave the tokens so far, fading, is a prior for the bridges. Without fading
  it is the Bayes posterior of Branch-Train-Merge; text that changes its domain needs the fading
- an expert may rest while tokens are read. Before it is active again it reads what it has missed, all of it, so that no
  cache of its has holes, and its evidence is what it would be had it never rested
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor, nn

from stages.nn.attention import StackCache
from stages.nn.decoder import Decoder, token_log_probs
from stages.nn.fading import fading_sums

FADING = (0.8, 0.95, 0.99)  # what is left of the evidence of the token before
SCORED = 1024  # tokens whose logits are held at a time


@dataclass
class ExpertCache:
    """What one expert keeps: its layers' caches; its state at, and its evidence up to, the last token it read."""

    layers: StackCache
    last_BE: Tensor | None = None
    next_BV: Tensor | None = None  # log-probabilities of the token after it, once someone has asked for them
    evidence_BF: Tensor | None = None
    counted: int = 0  # tokens of this context that are in the evidence already, as another context told of them

    def predicted(self, expert: Decoder) -> Tensor:
        """Log-probabilities [B, V] of the token after the last one read."""
        assert self.last_BE is not None, "nothing read"
        if self.next_BV is None:
            self.next_BV = expert.lm_head(self.last_BE).float().log_softmax(-1)
        return self.next_BV


@dataclass
class ExpertsCache:
    """What the experts keep between chunks, and what one that rests would have to read."""

    each: list[ExpertCache]
    ids_BS: Tensor | None = None
    mean_BS: Tensor | None = None  # log-likelihood of each token, by the experts that read it when it came

    @property
    def seen(self) -> int:
        """Tokens of the text so far."""
        return 0 if self.ids_BS is None else self.ids_BS.shape[1]

    @property
    def tokens_read(self) -> int:
        """By all experts together."""
        return sum(cache.layers.seen for cache in self.each)

    def recall(self, before: "ExpertsCache", rows: int, *, follows: bool) -> None:
        """Go on with the evidence that another context has of the first `rows` of its texts.

        Of tokens read so far nothing counts again. `follows`: the next token is the one after the last that was read
        there, and how well it was predicted there is evidence if every expert has read up to it; else how well it is
        predicted here, if something was read here.
        """
        known = [old.evidence_BF for old in before.each if old.evidence_BF is not None]
        whole = all(old.layers.seen == before.seen for old in before.each)
        for own, old in zip(self.each, before.each, strict=True):
            own.counted = self.seen
            if known:
                evidence_BF = torch.zeros_like(known[0]) if old.evidence_BF is None else old.evidence_BF
                missed = before.seen - old.layers.seen
                own.evidence_BF = evidence_BF[:rows] * evidence_BF.new_tensor(FADING) ** missed
            if follows and whole and old.last_BE is not None:
                own.last_BE, own.next_BV = old.last_BE[:rows], None


@dataclass
class ExpertStates:
    """What the experts made of tokens; the first of them has index `start`."""

    start: int
    state_XLBTE: list[list[Tensor] | None]  # embeddings, then every layer's output, the last one normed; None: at rest
    prior_BTXF: Tensor
    target_BTX: Tensor | None = None  # log-likelihood of the targets given, 0 of experts at rest
    late: list["ExpertStates"] = field(default_factory=list)  # of tokens before, by experts that had missed them

    def at_depth(self, depth: float) -> list[Tensor | None]:
        """States [B, T, E] of each expert after that share of its layers."""
        return [None if states is None else states[round(depth * (len(states) - 1))] for states in self.state_XLBTE]

    def static(self) -> "ExpertStates":
        """The same at every token of every row: the mean."""

        def mean(x: Tensor) -> Tensor:
            return x.mean((0, 1), keepdim=True).expand_as(x)

        states = [each if each is None else [mean(state_BTE) for state_BTE in each] for each in self.state_XLBTE]
        return replace(self, state_XLBTE=states, prior_BTXF=mean(self.prior_BTXF))

    def resting(self) -> list[int]:
        """The experts that have no states."""
        return [index for index, states in enumerate(self.state_XLBTE) if states is None]


class Experts(nn.ModuleList):
    """Decoders that read the same text, each with its cache."""

    def __init__(self, experts: Sequence[Decoder], *, evidence: bool) -> None:
        """`evidence`: whether to tell how well each predicted the text."""
        super().__init__(experts)
        self.kinds = len(FADING) * evidence

    @property
    def decoders(self) -> list[Decoder]:
        """The experts."""
        return cast(list[Decoder], list(self))

    def new_cache(self) -> ExpertsCache:
        """An empty cache for `forward`."""
        return ExpertsCache([ExpertCache(decoder.new_cache()) for decoder in self.decoders])

    def forward(
        self,
        ids_BT: Tensor,
        cache: ExpertsCache,
        active: Sequence[int] | None = None,
        target_BT: Tensor | None = None,
    ) -> ExpertStates:
        """States of the active experts (None: all) and their evidence, at the tokens after those the cache has seen.

        `target_BT`: the token that follows each, where it is known. What an expert gave it is told beside the states,
        and is its evidence one token later, so that no output layer runs twice.
        """
        numbers = list(range(len(self)) if active is None else active)
        start = cache.seen
        late = [self._catch_up(number, cache) for number in numbers if cache.each[number].layers.seen < start]
        cache.ids_BS = ids_BT if cache.ids_BS is None else torch.cat([cache.ids_BS, ids_BT], 1)
        states: list[list[Tensor] | None] = [None] * len(self)
        evidence_BTXF = ids_BT.new_zeros((*ids_BT.shape, len(self), self.kinds), dtype=torch.float32)
        target_BTX = None if target_BT is None else torch.zeros((*ids_BT.shape, len(self)), device=ids_BT.device)
        likelihoods = []
        for number in numbers:
            states[number], likelihood_BT, next_BT = self._read(number, ids_BT, cache.each[number], target_BT)
            likelihoods.append(likelihood_BT)
            if target_BTX is not None:
                target_BTX[..., number] = next_BT
        if self.kinds:
            likelihood_BTA = torch.stack(likelihoods, -1)
            mean_BT1 = likelihood_BTA.mean(-1, keepdim=True)
            evidence_BTXF[:, :, numbers] = _evidence(likelihood_BTA - mean_BT1, [cache.each[each] for each in numbers])
            mean_BT = mean_BT1[..., 0]
            cache.mean_BS = mean_BT if cache.mean_BS is None else torch.cat([cache.mean_BS, mean_BT], 1)
        return ExpertStates(start, states, evidence_BTXF, target_BTX, late)

    def _catch_up(self, number: int, cache: ExpertsCache) -> ExpertStates:
        """Have an expert read what it has missed."""
        assert cache.ids_BS is not None
        own = cache.each[number]
        start = own.layers.seen
        read, likelihood_BT, _ = self._read(number, cache.ids_BS[:, start:], own)
        if cache.mean_BS is not None and own.counted < cache.seen:
            new = max(start, own.counted)
            _evidence((likelihood_BT[:, new - start :] - cache.mean_BS[:, new:])[..., None], [own])
        states = [read if other == number else None for other in range(len(self))]
        return ExpertStates(start, states, cache.ids_BS.new_zeros(0, dtype=torch.float32))

    def _read(
        self, number: int, ids_BT: Tensor, cache: ExpertCache, target_BT: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """The states of further tokens, and log-likelihoods: of each, after what came before it, and of the next ones.

        Both are empty where nobody asks for them, which saves the output layer.
        """
        expert = self.decoders[number]
        states = expert.hidden_states(ids_BT, cache.layers)
        before, cache.last_BE, cache.next_BV = replace(cache), states[-1][:, -1], None
        if not self.kinds and target_BT is None:
            return states, ids_BT.new_zeros(0), ids_BT.new_zeros(0)
        following_BT = ids_BT[:, 1:] if target_BT is None else target_BT
        state_BTE = states[-1][:, : following_BT.shape[1]]
        pairs = zip(state_BTE.split(SCORED, 1), following_BT.split(SCORED, 1), strict=True)
        next_BT = torch.cat([token_log_probs(expert.lm_head(state), token) for state, token in pairs], 1)
        if before.last_BE is None:
            first_B1 = next_BT.new_zeros(len(ids_BT), 1)  # nothing predicts the first token
        else:
            first_B1 = before.predicted(expert).gather(1, ids_BT[:, :1])
        return states, torch.cat([first_B1, next_BT[:, : ids_BT.shape[1] - 1]], 1), next_BT


def _evidence(difference_BTA: Tensor, caches: list[ExpertCache]) -> Tensor:
    """Faded sums [B, T, A, F] of the experts' log-likelihoods above the mean, of the tokens up to each.

    Only differences between experts count, and these do not depend on what is taken off them all.
    """
    known = [cache.evidence_BF for cache in caches if cache.evidence_BF is not None]
    before = torch.stack(known, 1).unbind(-1) if known else [None] * len(FADING)
    sums = [fading_sums(difference_BTA, fading, None, old) for fading, old in zip(FADING, before, strict=True)]
    evidence_BTAF = torch.stack(sums, -1)
    for index, cache in enumerate(caches):
        cache.evidence_BF = evidence_BTAF[:, -1, index]
    return evidence_BTAF
