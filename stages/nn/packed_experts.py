"""The experts and the gate of a composed model, packed for writing: one token of each of some texts at a time.

Shape letters: N texts, X experts, L states of an expert, E expert width, V vocabulary, F kinds of evidence.

- all experts are one stack (`stages.nn.packed_stack`), so they must be of one shape
- only states that some bridge reads are kept, and the last
- what is computed is `Experts.forward` and `SeedGate.forward`, up to rounding
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.nn.decoder import Decoder
from stages.nn.experts import FADING, ExpertCache, Experts
from stages.nn.gates import GateCache, SeedGate, normalise
from stages.nn.packed_stack import PackedStack, StackRoom, Step


@dataclass
class ReadStates:
    """What the experts made of one token of each of some texts."""

    state_LXNE: dict[int, Tensor]  # by number: 0 is the embeddings, the last one is normed
    layers: int
    prior_NXF: Tensor

    def at_depth(self, depth: float) -> Tensor:
        """States [X, N, E] after that share of the layers."""
        return self.state_LXNE[round(depth * self.layers)]


class PackedExperts:
    """Some experts of a composed model, for up to `texts` texts."""

    def __init__(
        self, experts: Experts, active: Sequence[int], depths: Collection[float], texts: int, *, predict: bool
    ) -> None:
        """`active`: those that read. `depths`: what is read of them, and `predict`: also what they predict."""
        decoders = [experts.decoders[number] for number in active]
        config = decoders[0].config
        self.kinds, self.layers, self.eps = experts.kinds, config.num_hidden_layers, config.rms_norm_eps
        self._kept = {round(depth * self.layers) for depth in depths}
        self._decoders = decoders
        self._stack = PackedStack([list(decoder.model.layers) for decoder in decoders], config.rope_theta)
        self._norm_X1E = torch.stack([decoder.model.norm.weight.detach() for decoder in decoders])[:, None]
        self._heads_EV = [_across(decoder) for decoder in decoders] if predict or self.kinds else []
        self._fading_F = self._norm_X1E.new_tensor(FADING[: self.kinds])
        self.room = self._stack.new_room(texts)
        width, words = config.hidden_size, config.vocab_size if self._heads_EV else 0
        self.last_NXE = self._norm_X1E.new_zeros((texts, len(decoders), width))
        # Log-probabilities after the last token.
        self.next_XNV = self._norm_X1E.new_zeros((len(decoders), texts, words))
        self.evidence_NXF = self._norm_X1E.new_zeros((texts, len(decoders), self.kinds))

    def take(self, text: int, caches: Sequence[ExpertCache]) -> None:
        """Go on where a text was read by the experts unpacked, or with a text of which nothing is read."""
        self.evidence_NXF[text], self.next_XNV[:, text] = 0.0, 0.0  # nothing predicts a first token: all alike
        for number, (decoder, cache) in enumerate(zip(self._decoders, caches, strict=True)):
            self.room.take(text, number, cache.layers)
            if cache.last_BE is not None:
                self.last_NXE[text, number] = cache.last_BE[0]
                if self._heads_EV:
                    self.next_XNV[number, text] = cache.predicted(decoder)[0]
            if cache.evidence_BF is not None:
                self.evidence_NXF[text, number] = cache.evidence_BF[0]

    def give_back(self, text: int, length: int, caches: Sequence[ExpertCache]) -> None:
        """The inverse of `take`, for a text of `length`."""
        for number, cache in enumerate(caches):
            self.room.give_back(text, number, length, cache.layers)
            cache.last_BE = self.last_NXE[text, number, None].clone()
            cache.next_BV = self.next_XNV[number, text, None].clone() if self._heads_EV else None
            cache.evidence_BF = self.evidence_NXF[text, number, None].clone() if self.kinds else None

    def move(self, source: int, target: int) -> None:
        """Put what is known of one text in the place of another."""
        self.room.move(source, target)
        for each in (self.last_NXE, self.evidence_NXF):
            each[target] = each[source]
        self.next_XNV[:, target] = self.next_XNV[:, source]

    def step(self, id_N: Tensor, step: Step) -> tuple[ReadStates, Tensor]:
        """Read one token of each text: states with the evidence as their priors, and the mean log-likelihood [N]."""
        texts = len(id_N)
        evidence_NXF, mean_N = self.evidence_NXF[:texts], self.evidence_NXF.new_zeros(texts)
        if self.kinds:
            likelihood_XN = self.next_XNV[:, :texts].gather(2, id_N[None, :, None].expand(self._count, -1, -1))[..., 0]
            mean_N = likelihood_XN.mean(0)
            evidence_NXF = evidence_NXF * self._fading_F + (likelihood_XN - mean_N).T[..., None]
            self.evidence_NXF[:texts] = evidence_NXF
        x_XNE = torch.stack([F.embedding(id_N, decoder.model.embed_tokens.weight) for decoder in self._decoders])
        states = {0: x_XNE}

        def keep(number: int, x_XNE: Tensor) -> None:
            if number in self._kept and number < self.layers:
                states[number] = x_XNE.clone()

        x_XNE = self._stack.step(x_XNE, step, self.room, keep)
        last_XNE = states[self.layers] = F.rms_norm(x_XNE, x_XNE.shape[-1:], None, self.eps) * self._norm_X1E
        self.last_NXE[:texts] = last_XNE.transpose(0, 1)
        for number, head_EV in enumerate(self._heads_EV):
            torch.log_softmax(torch.mm(last_XNE[number], head_EV), -1, out=self.next_XNV[number, :texts])
        return ReadStates(states, self.layers, evidence_NXF), mean_N

    @property
    def _count(self) -> int:
        return len(self._decoders)


def _across(decoder: Decoder) -> Tensor:
    """The output layer as [E, V]."""
    return decoder.lm_head.weight.detach().T.contiguous()


class PackedGate:
    """The expert-level gates and the seed's layers below them, for up to `texts` texts."""

    def __init__(self, gate: SeedGate, texts: int) -> None:
        seed, self._gates = gate.seed, gate.gates
        layers = list(seed.model.layers)[: self._gates.layer]
        self._embed_VD = seed.model.embed_tokens.weight.detach()
        self._norm = seed.model.norm if len(layers) == len(seed.model.layers) else None
        self._stack = PackedStack([layers], seed.config.rope_theta)
        self.room: StackRoom = self._stack.new_room(texts)
        self.read_ND = self._embed_VD.new_zeros((texts, self._embed_VD.shape[1]))

    def take(self, text: int, cache: GateCache) -> None:
        """Go on where a text was read by the gate unpacked."""
        self.room.take(text, 0, cache.seed)
        self.read_ND[text] = 0.0 if cache.read_BD is None else cache.read_BD[0]

    def give_back(self, text: int, length: int, cache: GateCache) -> None:
        """The inverse of `take`, for a text of `length`."""
        self.room.give_back(text, 0, length, cache.seed)
        cache.read_BD = self.read_ND[text, None].clone()

    def move(self, source: int, target: int) -> None:
        """Put what is known of one text in the place of another."""
        self.room.move(source, target)
        self.read_ND[target] = self.read_ND[source]

    def step(self, id_N: Tensor, step: Step) -> Tensor:
        """Log-weights [N, X] after one more token of each text."""
        x_ND = self._stack.step(F.embedding(id_N, self._embed_VD)[None], step, self.room)[0]
        x_ND = x_ND if self._norm is None else self._norm(x_ND)
        read_ND = self.read_ND[: len(id_N)]
        kept_N1 = (id_N != self._gates.end_of_text)[:, None] * self._gates.memory
        read_ND.mul_(kept_N1).add_(normalise(x_ND))
        return self._gates.log_weights(read_ND[:, None])[:, 0, 1:].float()
