"""Expert-level PHATGOOSE gates: one vector per expert reads the seed's hidden state and opens or closes the expert.

Shape letters: B batch, T tokens, D seed width, X experts.

- the paper gates LoRA modules inside one model; here the expert is a whole model, and the gate mixes probabilities:
  p = (1 - g) p_seed + g p_expert with g = sigmoid(v · u)
- u is normalised (no learned scale) while training too, so that vectors of different experts compare on equal terms
- `independent` (Muqeeth et al. 2024, section 3): each vector sees its own expert and cluster only; at use the scores
  are v̂ · û / sqrt(D) of the normalised vectors, top-k, softmax. There is no slot for "none of them"
- `joint`: the same vectors and a bias, all experts present, one softmax in which the seed has a slot of score 0
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from schemas.train_gates import GateMode
from stages.nn.decoder import Decoder, token_log_probs


def normalise(x_BTD: Tensor) -> Tensor:
    """LayerNorm without learned scale, in fp32, its eps relative: a tiny vector is normalised like a large one."""
    centred_BTD = x_BTD.float() - x_BTD.float().mean(-1, keepdim=True)
    return centred_BTD * torch.rsqrt(centred_BTD.square().mean(-1, keepdim=True).clamp_min(1e-30))


class ExpertGates(nn.Module):
    """The gates of X experts, reading the seed's hidden state after `layer` layers."""

    def __init__(self, vectors_XD: Tensor, bias_X: Tensor, layer: int, mode: GateMode) -> None:
        super().__init__()
        # One parameter per expert: adding an expert leaves the others' as they are, and a vector gets no weight decay.
        self.vectors = nn.ParameterList([vector_D.clone() for vector_D in vectors_XD])
        self.bias = nn.Parameter(bias_X.clone(), requires_grad=mode == "joint")
        self.layer = layer
        self.mode = mode

    @classmethod
    def closed(cls, experts: int, width: int, layer: int, mode: GateMode) -> "ExpertGates":
        """Gates at their start: all zero, so g is a half and all experts are equal."""
        return cls(torch.zeros(experts, width), torch.zeros(experts), layer, mode)

    def tensors(self) -> dict[str, Tensor]:
        """What is saved: `<mode>.vectors` [X, D], `<mode>.bias` [X]."""
        vectors_XD = torch.stack([vector_D.detach() for vector_D in self.vectors])
        return {f"{self.mode}.vectors": vectors_XD, f"{self.mode}.bias": self.bias.detach()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], layer: int, mode: GateMode) -> "ExpertGates":
        """The inverse of `tensors`, frozen."""
        return cls(tensors[f"{mode}.vectors"], tensors[f"{mode}.bias"], layer, mode).requires_grad_(False)

    def scores(self, u_BTD: Tensor) -> Tensor:
        """Raw scores [B, T, X] of the training formulas: v · û + bias."""
        vectors_XD = torch.stack(list(self.vectors))
        return normalise(u_BTD) @ vectors_XD.float().T + self.bias.float()

    def log_weights(self, u_BTD: Tensor, top_k: int | None = None) -> Tensor:
        """Log of the mixture weights [B, T, X + 1] at use; slot 0 is the seed ("none of them").

        `top_k`: only the k experts of highest score share the weight; the seed's slot always takes part where there is
        one.
        """
        if self.mode == "independent":
            vectors_XD = normalise(torch.stack(list(self.vectors)))
            score_BTX = normalise(u_BTD) @ vectors_XD.T / u_BTD.shape[-1] ** 0.5
            seed_BT1 = torch.full_like(score_BTX[..., :1], -torch.inf)
        else:
            score_BTX = self.scores(u_BTD)
            seed_BT1 = torch.zeros_like(score_BTX[..., :1])
        if top_k is not None and top_k < score_BTX.shape[-1]:
            kept = score_BTX.topk(top_k, -1)  # by place, not by a threshold, under which equal scores would all stay
            score_BTX = torch.full_like(score_BTX, -torch.inf).scatter(-1, kept.indices, kept.values)
        return torch.cat([seed_BT1, score_BTX], -1).log_softmax(-1)


class GateLoss(nn.Module):
    """Loss of the gates over frozen models: cross-entropy of the mixture they make, in nats per token.

    `own`: the one expert whose gate is trained (`independent`); None trains all gates together (`joint`).
    """

    def __init__(self, gates: ExpertGates, seed: Decoder, experts: list[Decoder], own: int | None) -> None:
        super().__init__()
        self.gates = gates
        self.seed = seed
        self.experts = nn.ModuleList(experts)
        self.own = own

    def forward(self, row_BT: Tensor) -> dict[str, Tensor]:
        """`row_BT`: T = sequence length + 1 token ids. `open_i`: mean weight of the seed (0) and of each expert."""
        ids_BT, target_BT = row_BT[:, :-1], row_BT[:, 1:]
        with torch.no_grad():
            states = self.seed.hidden_states(ids_BT)
            seed_BT = token_log_probs(self.seed.lm_head(states[-1]), target_BT)
            expert_BTX = torch.stack([token_log_probs(e(ids_BT), target_BT) for e in self.experts], -1)
        score_BTX = self.gates.scores(states[self.gates.layer])
        if self.own is None:
            weight_BTX = F.pad(score_BTX, (1, 0)).log_softmax(-1)
        else:
            score_BT = score_BTX[..., self.own]
            weight_BTX = torch.stack([F.logsigmoid(-score_BT), F.logsigmoid(score_BT)], -1)
        mixture_BT = (weight_BTX + torch.cat([seed_BT[..., None], expert_BTX], -1)).logsumexp(-1)
        open_X = weight_BTX.detach().exp().mean((0, 1))
        return {"loss": -mixture_BT.mean(), **{f"open_{slot}": share for slot, share in enumerate(open_X)}}
