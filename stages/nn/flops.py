"""Floating point operations of a forward pass, counted by running it once under torch's counter.

- attention is counted in full (not halved for the causal mask), for every model alike
- a training step on a token is taken as three forward passes: one forward, two backward (Kaplan et al. 2020, 2.1)
- where weights are frozen the backward pass is shorter: what a LoRA expert's training costs is counted by running one
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from schemas.decoder import DecoderConfig
from schemas.train_experts import LoraConfig
from schemas.train_gates import GateMode, GatesMetrics
from stages.nn.decoder import Decoder
from stages.nn.lora import add_adapters

BACKWARD_AND_FORWARD = 3


def forward_flops(forward: Callable[[Tensor], Any], length: int) -> float:
    """Operations per token of `forward(ids [1, length])`."""
    ids = torch.zeros(1, length, dtype=torch.long)
    # The counter knows matrix products; the fused CPU attention is unknown to it and would count as nothing.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
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
        dense: int,
        lora: LoraConfig | None = None,
    ) -> None:
        """`seed`, `experts` (all together), `dense`: tokens they were trained on; the latter two from the seed on."""
        self.forward = forward_flops(decoder, length)
        self.gates = 0.0  # of the seed, read up to the layer the gates look at
        if gate_layer is not None:
            self.gates = forward_flops(lambda ids: decoder.hidden_states(ids, depth=gate_layer), length)
        token = BACKWARD_AND_FORWARD * self.forward
        self.seed, self.experts, self.dense = token * seed, token * (seed + experts), token * (seed + dense)
        self._size = sum(weight.numel() for weight in decoder.parameters())
        self._adapters: int | None = None
        if lora:
            self._adapters, expert_token = adapter_costs(decoder.config, lora, length)
            self.experts = self.seed + expert_token * experts

    def gate_training(self, gates: GatesMetrics, mode: GateMode) -> float:
        """Of all gates of a mode: forward passes of what they read, and of the models they weigh."""
        models = {"independent": 2, "joint": 1 + gates.experts}
        token = models[mode] * self.forward if mode in models else self.gates
        return token * sum(run.tokens for run in gates.runs if run.mode == mode)

    def weights(self, models: float, experts: float) -> int:
        """Different weights in so many models, `experts` of them experts: those of LoRA share the seed's."""
        if self._adapters is None:
            return round(models * self._size)
        return round(self._size + experts * self._adapters)
