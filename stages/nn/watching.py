"""What the gates inside a decoder answered while it ran.

Shape letters: B batch, T tokens, L layers, S slots: the seed and each expert, V vocabulary.

- what pads a batch counts as asking too; texts of like length share a batch, so that is little
"""

import torch
from torch import Tensor

from stages.nn.decoder import token_log_probs
from stages.nn.routed import RoutedDecoder


class Watched:
    """Runs a routed decoder, and keeps how many tokens asked which slot at each gate."""

    def __init__(self, decoder: RoutedDecoder) -> None:
        self._decoder = decoder
        self._asked: dict[str, Tensor] = {}
        self._tokens = 0

    def __call__(self, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, T, V], and weights [B, T, L, S] of each layer, the mean over its gates."""
        logits_BTV, layers = self._decoder(ids_BT), dict[str, list[Tensor]]()
        for name, told_BTS in self._decoder.gates.told.items():
            layers.setdefault(name.split(".")[2], []).append(told_BTS.exp())
            asked_S = (told_BTS > -torch.inf).sum((0, 1))
            self._asked[name] = self._asked[name] + asked_S if name in self._asked else asked_S
        self._tokens += ids_BT.numel()
        return logits_BTV, torch.stack([torch.stack(each).mean(0) for each in layers.values()], 2)

    def scores_and_weights(self, ids_BT: Tensor, target_BT: Tensor) -> Tensor:
        """Log-probabilities of the targets, then the weights: [B, T, 1 + L S]."""
        logits_BTV, weight_BTLS = self(ids_BT)
        return torch.cat([token_log_probs(logits_BTV, target_BT)[..., None], weight_BTLS.flatten(2)], -1)

    def asked(self) -> dict[str, Tensor]:
        """The share of tokens that asked each slot [S], by gate."""
        return {name: asked_S / self._tokens for name, asked_S in self._asked.items()}
