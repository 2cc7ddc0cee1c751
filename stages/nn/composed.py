"""The composed model: central model, bridges and frozen experts in one forward pass.

Shape letters: B batch, N states that read, T new tokens, D central width, X experts, F priors per expert.

- only the central model and the bridges are trained and saved; experts are given, never changed
- every expert runs on every token, unless it is said which are active (see `stages.nn.choice`)
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from schemas.central import CentralConfig
from schemas.compose_model import BridgeConfig
from schemas.decoder import DecoderConfig
from schemas.train_gates import GateMode
from stages.nn.bridges import SHARE_AT_HEAD, CalmBridge, CalmCache, Shares, StitchBridge
from stages.nn.central import (
    HEAD_SITE,
    LATENT_SITES,
    NOTHING,
    CentralCache,
    CentralModel,
    CentralOutput,
    latent_site,
    token_site,
)
from stages.nn.decoder import Decoder, token_log_probs
from stages.nn.experts import Experts, ExpertsCache, ExpertStates
from stages.nn.gates import ExpertGates, SeedGate
from stages.nn.levels import EXCHANGED, STATIC, LevelOutput


class Gate(Protocol):
    """What says, from tokens alone, how much each expert is worth at each of them; may keep a cache of its own."""

    def new_cache(self) -> Any:
        """An empty cache."""

    def __call__(self, ids_BT: Tensor, cache: Any = None) -> Tensor:
        """Log-weights [B, T, X], from the tokens up to each."""


@dataclass
class ComposedCache:
    """What a composed model keeps between chunks."""

    central: CentralCache
    experts: ExpertsCache
    gate: Any
    bridges: dict[str, CalmCache]
    prior_BXF: Tensor | None = None  # at the last token


class Bridges(nn.Module):
    """The bridges of all sites. Which layer of an expert a site reads goes by the share of depth it lies at."""

    def __init__(self, config: BridgeConfig, central: CentralConfig, expert_widths: list[int], priors: int) -> None:
        super().__init__()
        self.depths = site_depths(config, central)
        bridges: dict[str, nn.Module] = {}
        for site in self.depths:
            own = central.widths(int(site.startswith(LATENT_SITES)))
            if site == HEAD_SITE and config.head == "predictions":
                bridges[site] = Shares(own.width, len(expert_widths), priors, SHARE_AT_HEAD)
            elif site == HEAD_SITE or config.bridge == "stitch":
                bridges[site] = StitchBridge(own.width, expert_widths, priors, before_head=site == HEAD_SITE)
            else:
                bridges[site] = CalmBridge(own.width, own.heads, expert_widths, priors)
        self.sites = nn.ModuleDict(bridges)

    def depths_read(self) -> set[float]:
        """The shares of an expert's depth at which some bridge reads its states."""
        return {
            self.depths[site] for site, bridge in self.sites.items() if isinstance(bridge, CalmBridge | StitchBridge)
        }

    def remember(self, experts: ExpertStates, caches: dict[str, CalmCache]) -> None:
        """Put the experts' states where attention finds them: also those of tokens that complete no group."""
        for site, bridge in self.sites.items():
            if isinstance(bridge, CalmBridge):
                cache = caches.setdefault(site, CalmCache())
                for part in (*experts.late, experts):
                    bridge.remember(part.at_depth(self.depths[site]), part.start, cache)

    def forward(
        self, site: str, x_BND: Tensor, end_N: Tensor, *, experts: ExpertStates, caches: dict[str, CalmCache]
    ) -> Tensor:
        """The states of a site after its bridge; as they were where there is none, or predictions are mixed."""
        if site not in self.depths:
            return x_BND
        bridge, row_N = self.sites[site], end_N - experts.start
        if not isinstance(bridge, CalmBridge | StitchBridge):
            return x_BND
        prior_BNXF = experts.prior_BTXF[:, row_N]
        if isinstance(bridge, CalmBridge):
            return bridge(x_BND, end_N, prior_BNXF, caches[site], experts.resting())
        states = experts.at_depth(self.depths[site])
        return bridge(x_BND, [state if state is None else state[:, row_N] for state in states], prior_BNXF)


def site_depths(config: BridgeConfig, central: CentralConfig) -> dict[str, float]:
    """The sites, spread evenly over depth, each with the share of an expert's depth it reads."""
    depths = {}
    for number in range(1, config.latent_sites + 1):
        after = round(number * central.latent_layers / config.latent_sites)
        if after:
            depths[latent_site(after - 1)] = after / central.latent_layers
    for number in range(1, config.token_sites):
        after = round(number * central.decoder_layers / config.token_sites)
        if 0 < after < central.decoder_layers:
            token_layers = central.encoder_layers + central.decoder_layers
            depths[token_site(after - 1)] = (central.encoder_layers + after) / token_layers
    depths[HEAD_SITE] = 1.0
    return depths


class ComposedModel(nn.Module):
    """A central model that reads frozen experts through bridges."""

    gate: Gate | None

    def __init__(
        self, central: CentralModel, experts: Sequence[Decoder], config: BridgeConfig, gate: Gate | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.central = central
        self.experts = Experts(experts, evidence=config.evidence).requires_grad_(False)
        self.gate = gate
        if isinstance(gate, nn.Module):
            gate.requires_grad_(False)
        priors = (gate is not None) + self.experts.kinds
        widths = [expert.config.hidden_size for expert in experts]
        self.bridges = Bridges(config, central.config, widths, priors)

    @property
    def decoders(self) -> list[Decoder]:
        """The experts."""
        return self.experts.decoders

    @classmethod
    def from_weights(
        cls,
        central_config: CentralConfig,
        config: BridgeConfig,
        weights: dict[str, Tensor],
        experts: Sequence[Decoder],
        gate: Gate | None = None,
    ) -> Self:
        """A composed model with the weights that `weights` returned. Raises RuntimeError when they do not fit."""
        model = cls(CentralModel(central_config), experts, config, gate)
        parts: dict[str, dict[str, Tensor]] = {"central": {}, "bridges": {}}
        for name, tensor in weights.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        model.central.load_weights(parts["central"])
        model.bridges.load_state_dict(parts["bridges"])
        return model.eval().requires_grad_(False)

    @classmethod
    def from_parts(
        cls,
        central: CentralConfig,
        bridges: BridgeConfig,
        weights: dict[str, Tensor],
        experts: Sequence[tuple[DecoderConfig, dict[str, Tensor]]],
        seed: tuple[DecoderConfig, dict[str, Tensor]],
        gate: tuple[dict[str, Tensor], GateMode, int, float, int] | None,
    ) -> Self:
        """A composed model from what is on disk: decoders as (shape, weights), gates as `ExpertGates` reads them."""
        decoders = [Decoder.from_weights(*expert) for expert in experts]
        if gate is None:
            return cls.from_weights(central, bridges, weights, decoders)
        reader = SeedGate(Decoder.from_weights(*seed), ExpertGates.from_tensors(*gate))
        return cls.from_weights(central, bridges, weights, decoders, reader)

    def weights(self) -> dict[str, Tensor]:
        """The weights to save: central model and bridges."""
        central = {f"central.{name}": tensor for name, tensor in self.central.weights().items()}
        return central | {f"bridges.{name}": tensor for name, tensor in self.bridges.state_dict().items()}

    def new_cache(self) -> ComposedCache:
        """An empty cache for `forward`."""
        gate = None if self.gate is None else self.gate.new_cache()
        return ComposedCache(self.central.new_cache(), self.experts.new_cache(), gate, {})

    def forward(
        self,
        ids_BT: Tensor,
        cache: ComposedCache | None = None,
        ablate: frozenset[str] = NOTHING,
        *,
        active: Sequence[int] | None = None,
        last: bool = False,
    ) -> CentralOutput:
        """Logits for the token after each position of `ids_BT`, the tokens after those the cache has seen.

        `active`: the experts that are read at these tokens, at least one; the others rest. None: all. `last`: for the
        token after the last position only.
        `ablate`: "latents" and "plan" as in the central model; "bridges" leaves it alone, without experts, "bridges
        exchanged" has it read what experts make of another row, "bridges static" the mean of what they make of all;
        "experts" gives what each expert says in the place of another.
        """
        cache = self.new_cache() if cache is None else cache
        if "bridges" in ablate:
            return self.central(ids_BT, cache.central, None, ablate, last=last)
        experts = self.consult(ids_BT.roll(1, 0) if f"bridges{EXCHANGED}" in ablate else ids_BT, cache, active)
        experts = experts.static() if f"bridges{STATIC}" in ablate else experts
        count = len(self.experts)
        order = [(place + ("experts" in ablate)) % count for place in range(count)]
        shown = replace(experts, state_XLBTE=[experts.state_XLBTE[number] for number in order])
        x_BTD, levels = self._states(ids_BT, cache, shown, ablate, last=last)
        own_BTV = self.central.lm_head(x_BTD).float()
        if self.config.head == "states":
            return CentralOutput(own_BTV, levels)
        share_BTX = self._log_shares(x_BTD, experts)
        mixed_BTV = share_BTX[..., :1] + own_BTV.log_softmax(-1)
        for number, share_BT1 in zip(order, share_BTX[..., 1:].split(1, -1), strict=True):
            log_BTV = self._predicted(number, experts, x_BTD.shape[1], cache if last and not ablate else None)
            if log_BTV is not None:
                mixed_BTV = torch.logaddexp(mixed_BTV, share_BT1 + log_BTV)
        return CentralOutput(mixed_BTV, levels)

    def log_probs(
        self,
        ids_BT: Tensor,
        target_BT: Tensor,
        active: Sequence[int] | None = None,
        experts: ExpertStates | None = None,
    ) -> tuple[Tensor, list[LevelOutput]]:
        """Log-probability [B, T] of the token that follows each, which must be given, and what the levels give.

        The same numbers as `forward`'s, which holds those of the whole vocabulary: this is for training. `experts`:
        what they make of both, where that is known.
        """
        cache = self.new_cache()
        experts = self.consult(ids_BT, cache, active, target_BT) if experts is None else experts
        x_BTD, levels = self._states(ids_BT, cache, experts)
        own_BT = token_log_probs(self.central.lm_head(x_BTD), target_BT)
        if experts.target_BTX is None:
            return own_BT, levels
        log_BTX = torch.cat([own_BT[..., None], experts.target_BTX], -1)
        return (self._log_shares(x_BTD, experts) + log_BTX).logsumexp(-1), levels

    def _states(
        self,
        ids_BT: Tensor,
        cache: ComposedCache,
        experts: ExpertStates,
        ablate: frozenset[str] = NOTHING,
        *,
        last: bool = False,
    ) -> tuple[Tensor, list[LevelOutput]]:
        """The central model's states [B, T, D] before the output layer, with what it reads from the experts."""
        self.bridges.remember(experts, cache.bridges)
        read = partial(self.bridges, experts=experts, caches=cache.bridges)
        return self.central.states(ids_BT, cache.central, read, ablate, last=last)

    def _log_shares(self, x_BTD: Tensor, experts: ExpertStates) -> Tensor:
        """[B, T, 1 + X] of the last tokens read, as many as there are states of them."""
        head = self.bridges.sites[HEAD_SITE]
        assert isinstance(head, Shares)
        return head.log_shares(x_BTD, experts.prior_BTXF[:, -x_BTD.shape[1] :], experts.resting())

    @torch.no_grad()
    def _predicted(self, number: int, experts: ExpertStates, tokens: int, cache: ComposedCache | None) -> Tensor | None:
        """Log-probabilities [B, T, V] that an expert gives after the last so many tokens; None where it rests."""
        states, decoder = experts.state_XLBTE[number], self.decoders[number]
        if states is None:
            return None
        if cache:  # kept, as they say, when the next token is there, how well it was predicted
            return cache.experts.each[number].predicted(decoder)[:, None]
        return decoder.lm_head(states[-1][:, -tokens:]).float().log_softmax(-1)

    @torch.no_grad()
    def consult(
        self,
        ids_BT: Tensor,
        cache: ComposedCache,
        active: Sequence[int] | None = None,
        target_BT: Tensor | None = None,
    ) -> ExpertStates:
        """What the frozen experts, and the gates, make of the tokens after those the cache has seen."""
        known_BT = target_BT if self.config.head == "predictions" else None
        states = self.experts(ids_BT, cache.experts, active, known_BT)
        if self.gate is not None:
            gate_BTXF = self.gate(ids_BT, cache.gate)[..., None].float()
            states.prior_BTXF = torch.cat([gate_BTXF, states.prior_BTXF], -1)
        cache.prior_BXF = states.prior_BTXF[:, -1]
        return states
