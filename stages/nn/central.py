"""The central concept model: token layers around a stack of latents that think in groups and plan the next concepts.

Shape letters: B batch, T new tokens, G group length, M groups, K latents per group, N states of a site, D model width,
H horizon, V vocabulary.

    tokens ─ encoder (window) ─┬───────────────── skip ──────────────┬─ decoder (window) ─ norm ─ head
                               └ groups ─ latents ─ latent layers ─┬─┴ latents of the group before
                                                                   └── predicted concepts: the plan

- a token of group c receives latents and plan of group c - 1, the last one complete before its own. Fresh tokens reach
  it through the encoder only, so no concept ever tells a token what follows it
- one code path: the whole sequence is a chunk after nothing. The cache holds what is left over between chunks
- token layers have the seed's names and shapes, so that they can start as the seed's first and last layers; what is new
  writes little at first, and the model starts as the seed with a window
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from schemas.compose_model import CentralConfig
from stages.nn.attention import Layer, RMSNorm, StackCache, View, initialise
from stages.nn.concepts import ConceptHeads, PlanReader, concept_loss, concepts_of
from stages.nn.decoder import Decoder
from stages.nn.latents import Reducer, Upsampler

# (site, states [B, N, D], index [N] of the last token each has seen) -> states [B, N, D]
Read = Callable[[str, Tensor, Tensor], Tensor]

HEAD_SITE = "head"
NOTHING: frozenset[str] = frozenset()


def latent_site(layer: int) -> str:
    """Name of the place after a latent layer."""
    return f"latent_{layer}"


def token_site(layer: int) -> str:
    """Name of the place after a decoder layer."""
    return f"token_{layer}"


@dataclass
class CentralOutput:
    """What one pass gives."""

    logits_BTV: Tensor  # fp32, for the token after each position
    prediction_BMHD: Tensor  # concepts ahead, predicted by the groups that became complete


class CentralCache:
    """What the central model has to keep between chunks of one batch of sequences."""

    def __init__(self, config: CentralConfig) -> None:
        self.seen = 0
        self.encoder = StackCache(config.encoder_layers)
        self.latents = StackCache(config.latent_layers)
        self.decoder = StackCache(config.decoder_layers)
        self.open_BTD: Tensor | None = None  # encoder states of the group that is not complete
        self.latent_BMKD: Tensor | None = None  # of the last complete group
        self.plan_BMHD: Tensor | None = None


class CentralModel(nn.Module):
    """A causal language model that reads its past as latents of groups and its future as predicted concepts."""

    def __init__(self, config: CentralConfig) -> None:
        super().__init__()
        self.config = config
        width, heads, eps = config.hidden_size, config.num_attention_heads, config.rms_norm_eps
        latents, length = config.latents_per_group, config.group_length
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.encoder = _layers(config, config.encoder_layers)
        self.reducer = Reducer(width, heads, latents, config.reducer, eps)
        self.latent_layers = _layers(config, config.latent_layers)
        self.latent_norm = RMSNorm(width, eps)
        self.heads = ConceptHeads(width, latents, config.plan_horizon)
        self.start_KD = nn.Parameter(torch.zeros(latents, width))  # what group 0 finds in place of a group before it
        self.start_HD = nn.Parameter(torch.zeros(config.plan_horizon, width))
        self.upsampler = Upsampler(width, heads, latents, length, config.upsampling, eps)
        self.plan_reader = PlanReader(width, heads, config.plan_horizon, length, eps)
        self.decoder = _layers(config, config.decoder_layers)
        self.norm = RMSNorm(width, eps)
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        initialise(self, config.encoder_layers + config.latent_layers + config.decoder_layers)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    @classmethod
    def from_weights(cls, config: CentralConfig, weights: dict[str, Tensor]) -> Self:
        """A model with the given weights (as `weights` returns them).

        Raises RuntimeError when names or shapes do not fit `config`.
        """
        model = cls(config)
        model.load_weights(weights)
        return model

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Take weights as `weights` returns them. Raises RuntimeError when names or shapes do not fit."""
        if self.config.tie_word_embeddings:
            weights = {**weights, "lm_head.weight": weights["embed_tokens.weight"]}
        self.load_state_dict(weights)

    def weights(self) -> dict[str, Tensor]:
        """The weights to save: a tied output layer is left out."""
        state = self.state_dict()
        if self.config.tie_word_embeddings:
            del state["lm_head.weight"]
        return state

    @torch.no_grad()
    def start_from(self, seed: Decoder) -> None:
        """Copy embedding, head, final norm and token layers from a seed of the same width.

        The encoder gets the seed's first layers and the decoder its last, none twice.
        """
        first = min(len(self.encoder), len(seed.model.layers))
        last = min(len(self.decoder), len(seed.model.layers) - first)
        pairs: list[tuple[nn.Module, nn.Module]] = [
            (self.embed_tokens, seed.model.embed_tokens),
            (self.lm_head, seed.lm_head),
            (self.norm, seed.model.norm),
            *zip(self.encoder[:first], seed.model.layers[:first], strict=True),
            *zip(self.decoder[len(self.decoder) - last :], seed.model.layers[-last:] if last else [], strict=True),
        ]
        for own, other in pairs:
            own.load_state_dict(other.state_dict())

    def new_cache(self) -> CentralCache:
        """An empty cache for `forward`."""
        return CentralCache(self.config)

    def forward(
        self,
        ids_BT: Tensor,
        cache: CentralCache | None = None,
        read: Read | None = None,
        ablate: frozenset[str] = NOTHING,
        *,
        last: bool = False,
    ) -> CentralOutput:
        """Logits for the token after each position of `ids_BT`, the tokens after those the cache has seen.

        `last`: for the token after the last position only; of a long text, all logits are larger than the model.
        `read` lets the states of every site be changed by what experts know. `ablate` leaves out what "latents" or
        "plan" give to tokens; for "bridges", give no `read`.
        """
        cache = self.new_cache() if cache is None else cache
        start, count = cache.seen, ids_BT.shape[1]
        token_T = torch.arange(start, start + count, device=ids_BT.device)
        x_BTD = self._tokens(self.encoder, self.embed_tokens(ids_BT), token_T, cache.encoder)
        memory_BMKD, plan_BMHD = self._think(x_BTD, cache, read)
        if "latents" not in ablate:
            x_BTD = x_BTD + self.upsampler(x_BTD, start, memory_BMKD)
        if "plan" not in ablate:
            x_BTD = x_BTD + self.plan_reader(x_BTD, start, plan_BMHD)
        x_BTD = self.norm(self._tokens(self.decoder, x_BTD, token_T, cache.decoder, read))
        if last:
            x_BTD, token_T = x_BTD[:, -1:], token_T[-1:]
        if read is not None:
            x_BTD = read(HEAD_SITE, x_BTD, token_T)
        cache.seen += count
        return CentralOutput(self.lm_head(x_BTD).float(), plan_BMHD[:, 1:])

    def _tokens(
        self, layers: nn.ModuleList, x_BTD: Tensor, token_T: Tensor, cache: StackCache, read: Read | None = None
    ) -> Tensor:
        config = self.config
        view = View(
            token_T,
            config.head_dim,
            config.rope_theta,
            cache=cache,
            window=config.token_window,
            scaling=config.rope_scaling,
        )
        for index, layer in enumerate(layers):
            x_BTD = layer(x_BTD, view, view.layer_cache(index))
            if read is not None and index < len(layers) - 1:  # after the last layer comes the head's site
                x_BTD = read(token_site(index), x_BTD, token_T)
        return x_BTD

    def _think(self, x_BTD: Tensor, cache: CentralCache, read: Read | None) -> tuple[Tensor, Tensor]:
        """Latents and plans of the groups from the last one complete before this chunk to the last complete in it."""
        length, batch = self.config.group_length, len(x_BTD)
        if cache.latent_BMKD is None or cache.plan_BMHD is None:
            cache.latent_BMKD = self.start_KD.expand(batch, 1, -1, -1)
            cache.plan_BMHD = self.start_HD.expand(batch, 1, -1, -1)
        memory_BMKD, plan_BMHD = cache.latent_BMKD, cache.plan_BMHD
        if cache.open_BTD is not None:
            x_BTD = torch.cat([cache.open_BTD, x_BTD], 1)
        groups, first = x_BTD.shape[1] // length, cache.seen // length
        cache.open_BTD = x_BTD[:, groups * length :]
        if groups:
            x_BMGD = x_BTD[:, : groups * length].unflatten(1, (groups, length))
            group_M = torch.arange(first, first + groups, device=x_BTD.device)
            latent_BMKD = self._latents(self.reducer(x_BMGD), group_M, cache.latents, read)
            memory_BMKD = torch.cat([memory_BMKD, latent_BMKD], 1)
            plan_BMHD = torch.cat([plan_BMHD, self.heads(latent_BMKD)], 1)
        cache.latent_BMKD, cache.plan_BMHD = memory_BMKD[:, -1:], plan_BMHD[:, -1:]
        return memory_BMKD, plan_BMHD

    def _latents(self, x_BMKD: Tensor, group_M: Tensor, cache: StackCache, read: Read | None) -> Tensor:
        config = self.config
        group_N = group_M.repeat_interleave(x_BMKD.shape[2])
        end_N = (group_N + 1) * config.group_length - 1
        view = View(
            group_N,
            config.head_dim,
            config.rope_theta,
            cache=cache,
            window=config.latent_window,
            square=False,
            per_position=x_BMKD.shape[2],
        )
        x_BND = x_BMKD.flatten(1, 2)
        for index, layer in enumerate(self.latent_layers):
            x_BND = layer(x_BND, view, view.layer_cache(index))
            if read is not None:
                x_BND = read(latent_site(index), x_BND, end_N)
        return self.latent_norm(x_BND).view_as(x_BMKD)

    def concept_loss(self, row_BT: Tensor, prediction_BMHD: Tensor) -> Tensor:
        """Mean error of the predicted concepts against the complete groups of `row_BT`."""
        config = self.config
        concept_BMD = concepts_of(self.embed_tokens(row_BT), config.group_length)
        return concept_loss(prediction_BMHD, concept_BMD, config.concept_loss)


def _layers(config: CentralConfig, count: int) -> nn.ModuleList:
    return nn.ModuleList(
        Layer(
            config.hidden_size,
            config.intermediate_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.rms_norm_eps,
            head_dim=config.head_dim,
            kind=config.model_type,
        )
        for _ in range(count)
    )


class CentralLoss(nn.Module):
    """Mean cross-entropy of the next token in nats, plus the weighted error of the predicted concepts."""

    def __init__(self, central: CentralModel) -> None:
        super().__init__()
        self.central = central

    def forward(self, row_BT: Tensor) -> dict[str, Tensor]:
        """`row_BT`: T = sequence length + 1 token ids; every token but the first is predicted."""
        out = self.central(row_BT[:, :-1])
        return losses_of(self.central, out, row_BT)


def losses_of(central: CentralModel, out: CentralOutput, row_BT: Tensor) -> dict[str, Tensor]:
    """`loss`, which is optimised, and its parts `token_loss` and `concept_loss`."""
    token = F.cross_entropy(out.logits_BTV.flatten(0, 1), row_BT[:, 1:].flatten())
    concept = central.concept_loss(row_BT, out.prediction_BMHD)
    return {
        "loss": token + central.config.concept_weight * concept,
        "token_loss": token.detach(),
        "concept_loss": concept.detach(),
    }
