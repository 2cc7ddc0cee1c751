"""The central concept model: token layers around levels of latents that think in groups and plan the next concepts.

Shape letters: B batch, T new tokens, G group length, M groups, K latents per group, N states of a site, D model width,
E concept width, H horizon, V vocabulary.

    tokens ─ encoder (window) ─┬───────────────── skip ──────────────┬─ decoder (window) ─ norm ─ head
                               └ groups ─ latents ─ latent layers ─┬─┴ latents of the group before
                                                                   └── predicted concepts: the plan

- a token of group c receives latents and plan of group c - 1, the last one complete before its own. Fresh tokens reach
  it through the encoder only, so no concept ever tells a token what follows it
- what lies between encoder and decoder is a level (levels.py); levels above it group its latents in the same way. The
  model is its own first level, not the owner of one, so that the weights of a model of one level have no prefix
- one code path: the whole sequence is a chunk after nothing. The cache holds what is left over between chunks
- token layers have the seed's names and shapes, so that they can start as the seed's first and last layers; what is new
  writes little at first, and the model starts as the seed with a window
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from schemas.central import CentralConfig
from stages.nn.attention import Layer, RMSNorm, StackCache, View, initialise
from stages.nn.concepts import concept_loss, concepts_of, latent_loss
from stages.nn.decoder import Decoder
from stages.nn.levels import LATENT_SITES as LATENT_SITES
from stages.nn.levels import NOTHING as NOTHING
from stages.nn.levels import Level, LevelCache, LevelOutput
from stages.nn.levels import Read as Read
from stages.nn.levels import latent_site as latent_site

HEAD_SITE = "head"


def token_site(layer: int) -> str:
    """Name of the place after a decoder layer."""
    return f"token_{layer}"


@dataclass
class CentralOutput:
    """What one pass gives."""

    logits_BTV: Tensor  # fp32, for the token after each position
    levels: list[LevelOutput]  # from the first as far up as groups became complete

    @property
    def prediction_BMHE(self) -> Tensor:
        """Concepts ahead, predicted by the groups of the first level that became complete."""
        return self.levels[0].prediction_BMHE


class CentralCache(LevelCache):
    """What the central model has to keep between chunks of one batch of sequences."""

    def __init__(self, config: CentralConfig) -> None:
        super().__init__(config, 1)
        self.encoder = StackCache(config.encoder_layers)
        self.decoder = StackCache(config.decoder_layers)


class CentralModel(Level):
    """A causal language model that reads its past as latents of groups and its future as predicted concepts."""

    def __init__(self, config: CentralConfig) -> None:
        nn.Module.__init__(self)  # the parts of the level come in the order of the computation, and of the weights
        width, eps = config.hidden_size, config.rms_norm_eps
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.encoder = _layers(config, config.encoder_layers)
        self.add_level(config, 1)
        self.decoder = _layers(config, config.decoder_layers)
        self.norm = RMSNorm(width, eps)
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        initialise(self, sum(isinstance(part, Layer) for part in self.modules()))
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
        "plan" give to tokens (more in `Level.think`); for "bridges", give no `read`.
        """
        x_BTD, levels = self.states(ids_BT, cache, read, ablate, last=last)
        return CentralOutput(self.lm_head(x_BTD).float(), levels)

    def states(
        self,
        ids_BT: Tensor,
        cache: CentralCache | None = None,
        read: Read | None = None,
        ablate: frozenset[str] = NOTHING,
        *,
        last: bool = False,
    ) -> tuple[Tensor, list[LevelOutput]]:
        """As `forward`, but for the output layer: the states [B, T, D] it reads, and what the levels give."""
        cache = self.new_cache() if cache is None else cache
        token_T = torch.arange(cache.seen, cache.seen + ids_BT.shape[1], device=ids_BT.device)
        x_BTD = self._tokens(self.encoder, self.embed_tokens(ids_BT), token_T, cache.encoder)
        x_BTD, levels = self.think(x_BTD, cache, read, ablate)
        x_BTD = self.norm(self._tokens(self.decoder, x_BTD, token_T, cache.decoder, read))
        if last:
            x_BTD, token_T = x_BTD[:, -1:], token_T[-1:]
        if read is not None:
            x_BTD = read(HEAD_SITE, x_BTD, token_T)
        return x_BTD, levels

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

    def begun(self, row_BT: Tensor) -> Tensor:
        """Rows as they are; in training with a random phase, as `shifted` gives them."""
        if not self.training or not self.config.random_phase:
            return row_BT
        return shifted(row_BT, self.config.span(len(self.config.all_levels)))

    def concept_loss(self, row_BT: Tensor, *prediction_BMHE: Tensor) -> Tensor:
        """Mean over levels of the error of the predicted concepts against the complete groups of `row_BT`.

        `prediction_BMHE`: of each level from the first on.
        """
        concept_BME, errors = self.embed_tokens(row_BT), []
        for shape, level_BMHE in zip(self.config.all_levels, prediction_BMHE, strict=False):
            concept_BME = concepts_of(concept_BME, shape.group_length)
            errors.append(concept_loss(level_BMHE, concept_BME, self.config.concept_loss))
        return torch.stack(errors).mean()


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
    """Mean cross-entropy of the next token in nats, plus the weighted errors of what else the model predicts."""

    def __init__(self, central: CentralModel) -> None:
        super().__init__()
        self.central = central

    def forward(self, row_BT: Tensor) -> dict[str, Tensor]:
        """`row_BT`: T = sequence length + 1 token ids; every token but the first is predicted."""
        row_BT = self.central.begun(row_BT)
        out = self.central(row_BT[:, :-1])
        token = F.cross_entropy(out.logits_BTV.flatten(0, 1), row_BT[:, 1:].flatten())
        return losses_of(self.central, token, out.levels, row_BT)


def shifted(row_BT: Tensor, span: int) -> Tensor:
    """Each row from a random one of its first `span` tokens on, and all of them `span` - 1 tokens shorter.

    Groups count from a row's first token, in training as in use, so a model never meets a group in another phase than
    it was trained in: what this gives is the same text under other groups, where epochs repeat it, at the price of
    the tokens left out. The start depends on the row's content and on torch's seed, which the training loop sets by
    step: micro-batches and processes do not matter.
    """
    batch, length = row_BT.shape
    place_T = torch.arange(1, length + 1, device=row_BT.device)
    content_B = (row_BT * place_T).sum(1) + torch.initial_seed() % 2**31
    start_B = (content_B * 6364136223846793005 >> 33) % span  # Knuth's multiplier: its high bits are well mixed
    return row_BT.gather(1, start_B[:, None] + torch.arange(length - span + 1, device=row_BT.device).expand(batch, -1))


def losses_of(central: CentralModel, token: Tensor, levels: Sequence[LevelOutput], row_BT: Tensor) -> dict[str, Tensor]:
    """`loss`, which is optimised, and its parts `token_loss`, `concept_loss` and, where it counts, `latent_loss`."""
    config = central.config
    concept = central.concept_loss(row_BT, *(level.prediction_BMHE for level in levels))
    parts = {"token_loss": token.detach(), "concept_loss": concept.detach()}
    loss = token + config.concept_weight * concept
    if config.latent_weight:
        pairs = [(level.expected_BMKD, level.latent_BMKD) for level in levels]
        errors = [latent_loss(made, true) for made, true in pairs if made is not None and true is not None]
        if errors:
            latent = torch.stack(errors).mean()
            loss, parts["latent_loss"] = loss + config.latent_weight * latent, latent.detach()
    return {"loss": loss, **parts}
