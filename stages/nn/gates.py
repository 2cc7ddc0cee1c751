"""PHATGOOSE gates: one vector per expert reads a hidden state and tells when the expert is worth asking.

Shape letters: B batch, T tokens, D width of the state read, X experts.

- the paper gates LoRA updates inside one model (see `stages.nn.routed`); where an expert is a whole model, its gate
  mixes probabilities: p = (1 - g) p_seed + g p_expert with g = sigmoid(v · u)
- while training, the weights are a softmax of v · u in which the seed has a slot of score 0. With one expert that is
  (1 - g, g): `independent` gates (Muqeeth et al. 2024, section 3) are trained so, each on its own expert and cluster;
  at use their scores are v̂ · û / sqrt(D) of the normalised vectors, without a slot for "none of them"
- `joint`: the same vectors and a bias, all experts present, and the seed's slot kept at use
- `contrastive`: a vector and a bias tell the expert's own cluster from the others, by the seed's states alone
- `mean-activation`: the mean state of the expert's cluster, used like an independent vector; nothing is trained
- `arrow` (Ostapenko et al. 2024): the direction a module's change reads most, whose sign says nothing: |v · u|
- whole experts' gates read normalised states (no learned scale) while training too, so that vectors of different
  experts compare on equal terms
"""

from dataclasses import dataclass
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from schemas.train_gates import GateMode, Selection
from stages.nn.attention import StackCache
from stages.nn.decoder import Decoder
from stages.nn.fading import fading_sums

ALL = Selection()
BIASED = ("joint", "contrastive")  # modes in which a gate at the input of an expert has a bias


def normalise(x_BTD: Tensor) -> Tensor:
    """LayerNorm without learned scale, in fp32, its eps relative: a tiny vector is normalised like a large one."""
    centred_BTD = x_BTD.float() - x_BTD.float().mean(-1, keepdim=True)
    return centred_BTD * torch.rsqrt(centred_BTD.square().mean(-1, keepdim=True).clamp_min(1e-30))


class Gates(nn.Module):
    """The gates of X experts at one place."""

    def __init__(self, vectors_XD: Tensor, bias_X: Tensor | None, mode: GateMode) -> None:
        super().__init__()
        if mode not in get_args(GateMode):
            raise ValueError(f"{mode!r} is no mode of gates")
        # One parameter per expert: a vector gets no weight decay, which a matrix would.
        self.vectors = nn.ParameterList([vector_D.clone() for vector_D in vectors_XD])
        self.bias = None if bias_X is None or mode not in BIASED else nn.Parameter(bias_X.clone())
        self.mode = mode

    def stacked(self) -> Tensor:
        """The vectors [X, D] in fp32."""
        return torch.stack(list(self.vectors)).float()

    def tensors(self) -> dict[str, Tensor]:
        """What is saved: `vectors` [X, D], and `bias` [X] where there is one."""
        bias = {} if self.bias is None else {"bias": self.bias.detach()}
        return {"vectors": self.stacked().detach(), **bias}

    def scores(self, u_BTD: Tensor) -> Tensor:
        """Raw scores [B, T, X] of the training formulas: v · u + bias."""
        score_BTX = u_BTD.float() @ self.stacked().T
        return score_BTX if self.bias is None else score_BTX + self.bias.float()

    def training_log_weights(self, u_BTD: Tensor) -> Tensor:
        """Log weights [B, T, X + 1] while training, of the seed and of all experts."""
        return F.pad(self.scores(u_BTD), (1, 0)).log_softmax(-1)

    def log_weights(self, u_BTD: Tensor, selection: Selection = ALL) -> Tensor:
        """Log weights [B, T, X + 1] at use; slot 0 is the seed ("none of them").

        Only selected experts have weight. The seed's slot takes part where the mode has one, and otherwise where no
        expert is selected.
        """
        score_BTX = self.scores_at_use(u_BTD)
        slot = 0.0 if self.mode == "joint" else -torch.inf
        score_BTS = F.pad(score_BTX, (1, 0), value=slot)
        openness_BTX = None if selection.threshold is None else self._openness(u_BTD, score_BTS)
        kept_BTX = select(score_BTS, openness_BTX, selection)
        none_BT1 = ~kept_BTX.any(-1, keepdim=True)
        kept_BTS = torch.cat([none_BT1 | (slot == 0.0), kept_BTX], -1)
        score_BTS = torch.where(none_BT1, F.pad(score_BTX, (1, 0)), score_BTS)
        return score_BTS.masked_fill(~kept_BTS, -torch.inf).log_softmax(-1)

    def scores_at_use(self, u_BTD: Tensor) -> Tensor:
        """Scores [B, T, X] of which the weights are a softmax."""
        if self.mode in ("joint", "contrastive"):
            return self.scores(u_BTD)
        if self.mode == "arrow":
            return self.scores(u_BTD).abs()
        return normalise(u_BTD) @ normalise(self.stacked()).T / u_BTD.shape[-1] ** 0.5

    def _openness(self, u_BTD: Tensor, score_BTS: Tensor) -> Tensor:
        """What a threshold is compared with [B, T, X]: an independent gate's sigmoid, else a share of the softmax."""
        if self.mode == "independent":
            return self.scores(u_BTD).sigmoid()
        return score_BTS.softmax(-1)[..., 1:]


def select(score_BTS: Tensor, openness_BTX: Tensor | None, selection: Selection) -> Tensor:
    """Which experts are asked, bool [B, T, X], of scores with the seed's slot [B, T, X + 1].

    `openness_BTX`: what a threshold is compared with, where there is one.
    """
    kept_BTX = torch.ones_like(score_BTS[..., 1:], dtype=torch.bool)
    experts = kept_BTX.shape[-1]
    if selection.threshold is not None and openness_BTX is not None:
        kept_BTX = openness_BTX >= selection.threshold
    if selection.top_p is not None:
        share_BTS, order_BTS = score_BTS.softmax(-1).sort(dim=-1, descending=True, stable=True)
        before_BTS = share_BTS.cumsum(-1) - share_BTS
        within_BTS = torch.zeros_like(score_BTS, dtype=torch.bool).scatter(-1, order_BTS, before_BTS < selection.top_p)
        kept_BTX = kept_BTX & within_BTS[..., 1:]
    if selection.top_k is not None and selection.top_k < experts:
        # By place, not by a score to reach, under which equal scores would all stay.
        best_BTK = score_BTS[..., 1:].topk(selection.top_k, -1).indices
        kept_BTX = kept_BTX & torch.zeros_like(kept_BTX).scatter(-1, best_BTK, True)
    return kept_BTX


class ExpertGates(Gates):
    """Gates at the input of each expert, reading the seed's hidden states after `layer` layers.

    They read the fading sum of a document's states so far, each normalised: what a text is about is in all of it, and
    with a memory of 0, as in the paper, a gate has to guess it from one token's state.
    """

    def __init__(
        self, vectors_XD: Tensor, bias_X: Tensor | None, mode: GateMode, layer: int, memory: float, end_of_text: int
    ) -> None:
        """`memory`: share of the past that is kept per token; `end_of_text`: id of the token before each document."""
        super().__init__(vectors_XD, bias_X, mode)
        self.layer = layer
        self.memory = memory
        self.end_of_text = end_of_text

    @classmethod
    def closed(
        cls, experts: int, width: int, mode: GateMode, layer: int, memory: float, end_of_text: int
    ) -> "ExpertGates":
        """Gates at their start: all zero, so g is a half and all experts are equal."""
        return cls(torch.zeros(experts, width), torch.zeros(experts), mode, layer, memory, end_of_text)

    @classmethod
    def from_tensors(
        cls, tensors: dict[str, Tensor], mode: GateMode, layer: int, memory: float, end_of_text: int
    ) -> "ExpertGates":
        """Gates with the tensors `<mode>.vectors` and, where there is one, `<mode>.bias`; frozen."""
        gates = cls(tensors[f"{mode}.vectors"], tensors.get(f"{mode}.bias"), mode, layer, memory, end_of_text)
        return gates.requires_grad_(False)

    def scores(self, u_BTD: Tensor) -> Tensor:
        """Raw scores [B, T, X]: v · û + bias."""
        return super().scores(normalise(u_BTD))

    def remembered(self, u_BTD: Tensor, ids_BT: Tensor, before_BD: Tensor | None = None) -> Tensor:
        """What the gates read at each token [B, T, D]: the sum of the normalised states up to it.

        `u_BTD`: the seed's states at the tokens `ids_BT`. `before_BD`: what was read at the token before the first.
        """
        return fading_sums(normalise(u_BTD), self.memory, ids_BT == self.end_of_text, before_BD)

    def read(self, seed: Decoder, ids_BT: Tensor) -> Tensor:
        """`remembered` of a text from its first token on, normalised."""
        return normalise(self.remembered(seed.hidden_states(ids_BT, depth=self.layer)[-1], ids_BT))


@dataclass
class GateCache:
    """The seed's caches, and what the gates read at the last token."""

    seed: StackCache
    read_BD: Tensor | None = None


class SeedGate(nn.Module):
    """The expert-level gates, which read an early hidden state of the seed."""

    def __init__(self, seed: Decoder, gates: ExpertGates) -> None:
        super().__init__()
        self.seed = seed
        self.gates = gates

    def new_cache(self) -> GateCache:
        """An empty cache."""
        return GateCache(self.seed.new_cache())

    def forward(self, ids_BT: Tensor, cache: GateCache | None = None) -> Tensor:
        """Log-weights [B, T, X]. The slot "none of them" is left out: a bridge decides itself how far it opens."""
        cache = self.new_cache() if cache is None else cache
        u_BTD = self.seed.hidden_states(ids_BT, cache.seed, self.gates.layer)[-1]
        read_BTD = self.gates.remembered(u_BTD, ids_BT, cache.read_BD)
        cache.read_BD = read_BTD[:, -1]
        return self.gates.log_weights(read_BTD)[..., 1:]
