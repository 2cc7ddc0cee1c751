"""What gates are trained to lower, over frozen models.

Shape letters: B batch, T tokens, D width of the state read, X experts, S = X + 1 slots: slot 0 is the seed, M gated
modules.

- at the experts' inputs: the cross-entropy of the mixture of their probabilities; inside a model: that of the model
- a contrastive gate's loss is its own, so gates are what they would be if each were trained alone
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.nn.decoder import Decoder, token_log_probs
from stages.nn.gates import ExpertGates
from stages.nn.routed import RoutedDecoder


class GateLoss(nn.Module):
    """Loss of expert gates over frozen models: cross-entropy of the mixture they make, in nats per token."""

    def __init__(self, gates: ExpertGates, seed: Decoder, experts: Sequence[nn.Module]) -> None:
        """`experts`: one for each gate."""
        super().__init__()
        self.gates = gates
        self.seed = seed
        self.experts = nn.ModuleList(experts)

    def forward(self, row_BT: Tensor) -> dict[str, Tensor]:
        """`row_BT`: T = sequence length + 1 token ids. `open_i`: mean weight of the seed (0) and of each expert."""
        ids_BT, target_BT = row_BT[:, :-1], row_BT[:, 1:]
        with torch.no_grad():
            states = self.seed.hidden_states(ids_BT)
            seed_BT = token_log_probs(self.seed.lm_head(states[-1]), target_BT)
            expert_BTX = torch.stack([token_log_probs(e(ids_BT), target_BT) for e in self.experts], -1)
        weight_BTX = self.gates.training_log_weights(self.gates.remembered(states[self.gates.layer], ids_BT))
        mixture_BT = (weight_BTX + torch.cat([seed_BT[..., None], expert_BTX], -1)).logsumexp(-1)
        return {"loss": -mixture_BT.mean(), **openness(weight_BTX)}


def openness(log_weight_BTX: Tensor) -> dict[str, Tensor]:
    """The mean weight of each slot, as `open_0`, `open_1`, …"""
    share_X = log_weight_BTX.detach().exp().mean((0, 1))
    return {f"open_{slot}": share for slot, share in enumerate(share_X)}


class ContrastiveLoss(nn.Module):
    """Loss of expert gates that tell their own cluster from the others: binary cross-entropy in nats, mean over gates.

    Each gate's loss is its own, so they are what they would be if each were trained alone.
    """

    def __init__(self, gates: ExpertGates, seed: Decoder) -> None:
        super().__init__()
        self.gates = gates
        self.seed = seed

    def forward(self, row_BT: Tensor) -> dict[str, Tensor]:
        """`row_BT`: T = sequence length + 1 token ids and, last, the cluster of the row's documents."""
        with torch.no_grad():
            read_BTD = self.gates.read(self.seed, row_BT[:, :-2])
        return {"loss": contrast(self.gates.scores(read_BTD), row_BT[:, -1])}


def contrast(score_BTX: Tensor, cluster_B: Tensor) -> Tensor:
    """Binary cross-entropy in nats of telling, by each score, whether a row is of the expert's own cluster."""
    own_B1X = cluster_B[:, None, None] == torch.arange(score_BTX.shape[-1], device=cluster_B.device)
    return F.binary_cross_entropy_with_logits(score_BTX, own_B1X.float().expand_as(score_BTX))


class RoutedLoss(nn.Module):
    """Loss of module gates: cross-entropy of the next token in nats."""

    def __init__(self, decoder: RoutedDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, row_BT: Tensor) -> dict[str, Tensor]:
        """`row_BT`: T = sequence length + 1 token ids. `open_i`: mean weight of the seed (0) and of each expert."""
        logits_BTV = self.decoder(row_BT[:, :-1])
        weight_MBTS = torch.stack(list(self.decoder.gates.told.values()))
        loss = F.cross_entropy(logits_BTV.flatten(0, 1), row_BT[:, 1:].flatten())
        return {"loss": loss, **openness(weight_MBTS.flatten(0, 1))}


class RoutedContrastiveLoss(nn.Module):
    """Loss of module gates that tell their own cluster from the others by the seed's states: mean over all gates."""

    def __init__(self, decoder: RoutedDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, row_BT: Tensor) -> dict[str, Tensor]:
        """`row_BT`: T = sequence length + 1 token ids and, last, the cluster of the row's documents."""
        with torch.no_grad():
            heard = self.decoder.listen(row_BT[:, :-2])
        gates = self.decoder.gates.by_name
        losses = [contrast(gates[name].scores(read_BTD), row_BT[:, -1]) for name, read_BTD in heard.items()]
        return {"loss": torch.stack(losses).mean()}
