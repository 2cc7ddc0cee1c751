"""A composed model, packed for writing: one token of each of some texts at a time.

Shape letters: N texts, Q queries of a text, X experts, A active experts, F priors per expert, C central width,
V vocabulary.

- what is computed is `ComposedModel.forward`, up to rounding
- a text is read there, prompt or context, and comes here with its cache (`take`) for what is written; its cache can go
  back at any token (`give_back`)
- latents are made a text at a time; all else is one product for all texts, and for all experts
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from stages.nn.bridges import CalmBridge, CalmCache, Shares, StitchBridge
from stages.nn.central import HEAD_SITE
from stages.nn.composed import ComposedCache, ComposedModel
from stages.nn.experts import ExpertsCache
from stages.nn.gates import SeedGate
from stages.nn.packed_bridges import PackedCalm, PackedStitch
from stages.nn.packed_central import PackedCentral
from stages.nn.packed_experts import PackedExperts, PackedGate, ReadStates
from stages.nn.packed_stack import Step
from stages.nn.packing import packable, packable_layers


def writable(model: ComposedModel) -> bool:
    """Whether `ComposedWriter` knows all its parts: packable layers throughout, and experts of one shape."""
    central, seeds = model.central, [model.gate.seed] if isinstance(model.gate, SeedGate) else []
    return (
        all(packable(decoder) for decoder in (*model.decoders, *seeds))
        and all(expert.config == model.decoders[0].config for expert in model.decoders)
        and (model.gate is None or (isinstance(model.gate, SeedGate) and model.gate.gates.layer > 0))
        and packable_layers([*central.encoder, *central.decoder])
        and central.config.rope_scaling is None
    )


class ComposedWriter:
    """Up to `texts` texts, of which the first ones are written. Weights are copied."""

    def __init__(self, model: ComposedModel, texts: int) -> None:
        """`model` must be `writable`, and be on the device that is to compute."""
        self.model = model
        self._depths = model.bridges.depths
        self._texts = texts
        self._gate = PackedGate(model.gate, texts) if isinstance(model.gate, SeedGate) else None
        self._central = PackedCentral(model.central, texts)
        self._device = model.central.lm_head.weight.device
        self._lengths = [0] * texts
        self._caches: list[ComposedCache] = [model.new_cache()] * texts
        self._news: list[list[tuple[int, Tensor]]] = [[] for _ in range(texts)]  # ids, and mean log-likelihoods
        self._active: list[int] = []

    def length(self, text: int) -> int:
        """Tokens of a text so far."""
        return self._lengths[text]

    @torch.inference_mode()
    def take(self, text: int, cache: ComposedCache, active: Sequence[int] | None = None) -> None:
        """Go on where the model left a text, whose cache is not to be used until it is given back.

        `active`: the experts that read on (None: all), the same for all texts.
        """
        self._pack(list(range(len(self.model.experts)) if active is None else active))
        self._lengths[text], self._caches[text], self._news[text] = cache.experts.seen, cache, []
        self._experts.take(text, [cache.experts.each[number] for number in self._active])
        if self._gate is not None:
            self._gate.take(text, cache.gate)
        self._central.take(text, cache.central)
        for site, calm in self._calms.items():
            calm.take(text, cache.bridges.get(site))

    def _pack(self, active: list[int]) -> None:
        """Have the active experts, and what reads them, packed."""
        if active == self._active:
            return
        self._active = active
        self._resting = [number for number in range(len(self.model.experts)) if number not in active]
        self._share_A = torch.tensor(active, device=self._device) + 1
        predicts, depths = self.model.config.head == "predictions", self.model.bridges.depths_read()
        self._experts = PackedExperts(self.model.experts, active, depths, self._texts, predict=predicts)
        sites = self.model.bridges.sites.items()
        self._stitches = {
            site: PackedStitch(bridge, active) for site, bridge in sites if isinstance(bridge, StitchBridge)
        }
        self._calms = {
            site: PackedCalm(bridge, active, self._texts) for site, bridge in sites if isinstance(bridge, CalmBridge)
        }

    @torch.inference_mode()
    def give_back(self, text: int) -> ComposedCache:
        """The text's cache, with all that was written since it was taken."""
        cache, length = self._caches[text], self._lengths[text]
        if self._news[text]:
            _remember(cache.experts, self._news[text], evidence=self.model.experts.kinds > 0)
            self._experts.give_back(text, length, [cache.experts.each[number] for number in self._active])
            if self._gate is not None:
                self._gate.give_back(text, length, cache.gate)
            self._central.give_back(text, length)
            for site, calm in self._calms.items():
                calm.give_back(text, cache.bridges.setdefault(site, CalmCache()))
            self._news[text] = []
        return cache

    @torch.inference_mode()
    def move(self, source: int, target: int) -> None:
        """Put one text in the place of another."""
        for part in (self._experts, self._gate, self._central, *self._calms.values()):
            if part is not None:
                part.move(source, target)
        self._lengths[target], self._caches[target] = self._lengths[source], self._caches[source]
        self._news[target] = self._news[source]

    @torch.inference_mode()
    def step(self, ids: list[int]) -> Tensor:
        """Read one token of each of the first len(ids) texts; logits [N, V] in fp32 of the tokens after them."""
        id_N = torch.tensor(ids, device=self._device)
        step = Step(self._lengths[: len(ids)], self._device)
        states, mean_N = self._experts.step(id_N, step)
        if self._resting:
            evidence_NXF = mean_N.new_zeros(len(ids), len(self.model.experts), self.model.experts.kinds)
            states.prior_NXF = evidence_NXF.index_copy(1, self._share_A - 1, states.prior_NXF)
        if self._gate is not None:
            states.prior_NXF = torch.cat([self._gate.step(id_N, step)[..., None], states.prior_NXF], -1)
        for site, calm in self._calms.items():
            calm.remember(states.at_depth(self._depths[site]), step.place_N)
        x_NC = self._central.step(id_N, step, partial(self._read, states=states, place_N=step.place_N))
        for text, (token, length) in enumerate(zip(ids, step.lengths, strict=True)):
            self._lengths[text] = length + 1
            self._news[text].append((token, mean_N[text]))
            self._caches[text].prior_BXF = states.prior_NXF[text, None]
        return self._mixed(x_NC, states)

    def _read(self, site: str, x_NQC: Tensor, texts: slice, *, states: ReadStates, place_N: Tensor) -> Tensor:
        """The states of a site of some texts, with what is read there."""
        prior_NXF = states.prior_NXF[texts]
        if site in self._stitches:
            return self._stitches[site].read(x_NQC, states.at_depth(self._depths[site])[:, texts], prior_NXF)
        if site in self._calms:
            return self._calms[site].read(x_NQC, texts, place_N[texts], prior_NXF)
        return x_NQC

    def _mixed(self, x_NC: Tensor, states: ReadStates) -> Tensor:
        """Logits, or what central model and experts predict, mixed."""
        head = self.model.bridges.sites[HEAD_SITE]
        if HEAD_SITE in self._stitches:
            x_NQC = self._stitches[HEAD_SITE].read(x_NC[:, None], states.at_depth(1.0), states.prior_NXF)
            return self._central.logits(x_NQC[:, 0])
        assert isinstance(head, Shares)
        share_NX = head.log_shares(x_NC, states.prior_NXF, self._resting)
        own_NV = self._central.logits(x_NC).log_softmax(-1) + share_NX[:, :1]
        mixed_ANV = self._experts.next_XNV[:, : len(x_NC)] + share_NX[:, self._share_A].T[..., None]
        return torch.logaddexp(own_NV, mixed_ANV.logsumexp(0))


def _remember(cache: ExpertsCache, news: list[tuple[int, Tensor]], *, evidence: bool) -> None:
    """Tokens read by all experts, and how well these predicted each in the mean."""
    mean_1T = torch.stack([mean for _, mean in news])[None]
    id_1T = torch.tensor([[token for token, _ in news]], device=mean_1T.device)
    cache.ids_BS = id_1T if cache.ids_BS is None else torch.cat([cache.ids_BS, id_1T], 1)
    if evidence:
        cache.mean_BS = mean_1T if cache.mean_BS is None else torch.cat([cache.mean_BS, mean_1T], 1)
