"""The decoder that seeds, experts and the dense baseline are: a Llama, a Mistral, a Qwen2 or a Qwen3.

Shape letters: B batch, T new positions, D model width, V vocabulary.

- its state_dict has Hugging Face's names, so a saved decoder loads in `transformers` unchanged
- `hidden_states` follows Hugging Face's convention: embeddings, every layer's output, the last one after the final norm
"""

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from schemas.decoder import DecoderConfig
from stages.nn.attention import Layer, RMSNorm, StackCache, View, initialise


class DecoderBody(nn.Module):
    """Everything below the output layer; called `model` in the checkpoint."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Layer(
                config.hidden_size,
                config.intermediate_size,
                config.num_attention_heads,
                config.num_key_value_heads,
                config.rms_norm_eps,
                head_dim=config.head_dim,
                kind=config.model_type,
            )
            for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Decoder(nn.Module):
    """A causal language model. `config` says its shape.

    `separator`: the token that begins a document; where it is set, no position sees a document before its own (in
    passes without a cache).
    """

    separator: int | None = None

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = DecoderBody(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        initialise(self, config.num_hidden_layers)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @classmethod
    def from_weights(cls, config: DecoderConfig, weights: dict[str, Tensor]) -> Self:
        """A decoder with the given weights, frozen and in evaluation mode.

        Raises RuntimeError when names or shapes do not fit `config`.
        """
        with torch.device("meta"):
            decoder = cls(config)
        if config.tie_word_embeddings:
            weights = {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]}
        decoder.load_state_dict(weights, assign=True)
        if config.tie_word_embeddings:
            decoder.lm_head.weight = decoder.model.embed_tokens.weight
        return decoder.eval().requires_grad_(False)

    def weights(self) -> dict[str, Tensor]:
        """The weights to save: a tied output layer is left out, as Hugging Face does."""
        state = self.state_dict()
        if self.config.tie_word_embeddings:
            del state["lm_head.weight"]
        return state

    def new_cache(self) -> StackCache:
        """An empty key/value cache for `hidden_states` and `forward`."""
        return StackCache(self.config.num_hidden_layers)

    def hidden_states(self, ids_BT: Tensor, cache: StackCache | None = None, depth: int | None = None) -> list[Tensor]:
        """Hidden states [B, T, D]: the embeddings, then the output of each layer, the last one normed.

        `depth`: stop after so many layers (then none is normed). With `cache`, `ids_BT` are the tokens after those the
        cache has seen.
        """
        view = self._view(ids_BT, cache)
        x_BTD = self.model.embed_tokens(ids_BT)
        states = [x_BTD]
        for index, layer in enumerate(self.model.layers[:depth]):
            x_BTD = layer(x_BTD, view, view.layer_cache(index))
            states.append(x_BTD)
        if depth is None or depth >= len(self.model.layers):
            states[-1] = self.model.norm(x_BTD)
        return states

    def _view(self, ids_BT: Tensor, cache: StackCache | None) -> View:
        config, seen = self.config, 0 if cache is None else cache.seen
        end = seen + ids_BT.shape[1]
        position_T = torch.arange(seen, end, device=ids_BT.device)
        window = config.sliding_window
        if window is not None and window >= end:  # nothing is out of sight yet, so the kernel without a mask will do
            window = None
        return View(
            position_T,
            config.head_dim,
            config.rope_theta,
            cache=cache,
            window=window,
            scaling=config.rope_scaling,
            document_BT=None if self.separator is None or cache is not None else (ids_BT == self.separator).cumsum(1),
        )

    def forward(self, ids_BT: Tensor, cache: StackCache | None = None) -> Tensor:
        """Logits [B, T, V] in fp32 for the token after each position."""
        return self.lm_head(self.hidden_states(ids_BT, cache)[-1]).float()


class NextTokenLoss(nn.Module):
    """Mean cross-entropy of the next token, in nats: what a decoder is trained to lower."""

    worth_compiling = True  # one graph of large products; gates and composed models have many, of changing shapes

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, row_BT: Tensor) -> dict[str, Tensor]:
        """`row_BT`: T = sequence length + 1 token ids; every token but the first is predicted."""
        logits_BTV = self.decoder(row_BT[:, :-1])
        return {"loss": F.cross_entropy(logits_BTV.flatten(0, 1), row_BT[:, 1:].flatten())}


def token_log_probs(logits_BTV: Tensor, target_BT: Tensor) -> Tensor:
    """Log-probabilities [B, T] in nats of the targets; fp32."""
    return -F.cross_entropy(logits_BTV.float().flatten(0, 1), target_BT.flatten(), reduction="none").view_as(target_BT)
