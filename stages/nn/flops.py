"""Floating point operations of a forward pass, counted by running it once under torch's counter.

- attention is counted in full (not halved for the causal mask or a window), for every model alike
- sums of states (residuals, merged channels, depth-weighted averages) are not: of width D they are a 1/D of a layer
- a training step on a token is taken as three forward passes: one forward, two backward (Kaplan et al. 2020, 2.1)
- where weights are frozen the backward pass is shorter: what a LoRA expert's training costs is counted by running one
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from schemas.decoder import DecoderConfig
from schemas.train_experts import LoraConfig
from schemas.train_gates import GateMode, GatesMetrics, Place
from stages.nn.decoder import Decoder
from stages.nn.lora import add_adapters
from stages.nn.mixture import mean_models_run
from stages.nn.routed import RoutedDecoder

BACKWARD_AND_FORWARD = 3


def forward_flops(forward: Callable[[Tensor], Any], length: int) -> float:
    """Operations per token of `forward(ids [1, length])`."""
    ids = torch.zeros(1, length, dtype=torch.long)
    # The counter knows matrix products; the fused CPU attention is unknown to it and would count as nothing.
    # With gradients off it fails where a module is given a view of a weight that could have one.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        forward(ids)
    return counter.get_total_flops() / length


def adapter_costs(config: DecoderConfig, lora: LoraConfig, length: int) -> tuple[int, float]:
    """Weights of the adapters over a frozen decoder, and operations per token of a step that trains them.

    The step takes about two thirds of a whole one's: gradients of activations flow down to the lowest adapter; of
    frozen weights none are computed.
    """
    with torch.device("meta"):  # shapes are all that counts
        decoder = add_adapters(Decoder(config), lora, seed=0)
        ids = torch.zeros(1, length, dtype=torch.long)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            decoder(ids).sum().backward()
    weights = sum(weight.numel() for weight in decoder.parameters() if weight.requires_grad)
    return weights, counter.get_total_flops() / length


class DecoderCosts:
    """What a run's decoders cost, which are all of one shape: FLOPs per token and of training all they are made of.

    LoRA experts run merged, so a forward pass of one costs what one of the seed does.
    """

    def __init__(
        self,
        decoder: Decoder,
        length: int,
        gate_layer: int | None,
        seed: int,
        experts: int,
        lora: LoraConfig | None = None,
    ) -> None:
        """`seed`, `experts` (all together): tokens they were trained on, the latter from the seed on."""
        self.forward = forward_flops(decoder, length)
        self.gates = 0.0  # of the seed, read up to the layer the gates look at
        if gate_layer is not None:
            self.gates = forward_flops(lambda ids: decoder.hidden_states(ids, depth=gate_layer), length)
        self._token = BACKWARD_AND_FORWARD * self.forward
        self.seed = self._token * seed
        self.experts = self.from_seed(experts)
        self._size = sum(weight.numel() for weight in decoder.parameters())
        self._adapters: int | None = None
        if lora:
            self._adapters, expert_token = adapter_costs(decoder.config, lora, length)
            self.experts = self.seed + expert_token * experts

    def from_seed(self, tokens: int) -> float:
        """Of a decoder, the seed's included, that was trained on so many tokens after it."""
        return self.seed + self._token * tokens

    def steps_of(self, training: float, tokens_per_step: int) -> int:
        """Steps after the seed's that a decoder can take for as many FLOPs as another's training took in all."""
        return max(0, round((training - self.seed) / (self._token * tokens_per_step)))

    def gate_training(self, gates: GatesMetrics, mode: GateMode) -> float:
        """Of the gates at the experts' inputs: forward passes of what they read, and of the models they weigh."""
        models = {"independent": 2, "joint": 1 + gates.experts}
        token = models[mode] * self.forward if mode in models else self.gates
        return token * _tokens(gates, "expert", mode)

    def mixture(
        self, asked_NS: Tensor, experts: int, starts: np.ndarray, training: float | None = None
    ) -> tuple[int, int, float, float]:
        """Of mixing the models asked at each token: stored weights, active ones, training, and FLOPs per token.

        More slots than experts mean gates, which read the seed (slot 0) up to their layer in any case. `starts`:
        numbers of the tokens with which a model begins to read anew.
        """
        expert_NX = asked_NS[:, -experts:]
        flops = mean_models_run(expert_NX.numpy(), starts) * self.forward
        if asked_NS.shape[1] > experts:
            flops += self.forward if bool(asked_NS[:, 0].any()) else self.gates
        active = self.weights(float(asked_NS.float().sum(-1).mean()), float(expert_NX.float().sum(-1).mean()))
        return self.weights(asked_NS.shape[1], experts), active, training or self.experts, flops

    def routed(
        self, decoder: RoutedDecoder, asked: Mapping[str, Tensor], gates: GatesMetrics, place: Place, mode: GateMode
    ) -> tuple[int, int, float, float]:
        """The same of a decoder with experts inside, where each gate's slots are asked by these shares of tokens.

        Gates that are trained with it take a forward and a backward pass, in which no weight but theirs has a gradient.
        """
        beside = decoder.flops_beside(asked)
        token = self.forward
        if mode in ("independent", "joint"):
            share = 1.0 if mode == "joint" else 1 / gates.experts
            every = torch.tensor([1.0, *[share] * gates.experts])
            token = 2 * (self.forward + decoder.flops_beside(dict.fromkeys(asked, every)))
        training = self.experts + token * _tokens(gates, place, mode)
        stored = sum(weight.numel() for weight in decoder.parameters())
        return stored, round(self._size + beside / 2), training, self.forward + beside

    def weights(self, models: float, experts: float) -> int:
        """Different weights in so many models, `experts` of them experts: those of LoRA share the seed's."""
        if self._adapters is None:
            return round(models * self._size)
        return round(self._size + experts * self._adapters)


def _tokens(gates: GatesMetrics, place: Place, mode: GateMode) -> int:
    """Tokens that all gates of a kind were trained on."""
    return sum(run.tokens for run in gates.runs if (run.place, run.mode) == (place, mode))
