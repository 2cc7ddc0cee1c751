"""Floating point operations of a forward pass, counted by running it once under torch's counter.

- attention is counted in full (not halved for the causal mask), for every model alike
- a training step on a token is taken as three forward passes: one forward, two backward
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from stages.nn.decoder import Decoder

BACKWARD_AND_FORWARD = 3


def forward_flops(forward: Callable[[Tensor], Any], length: int) -> float:
    """Operations per token of `forward(ids [1, length])`."""
    ids = torch.zeros(1, length, dtype=torch.long)
    # The counter knows matrix products; the fused CPU attention is unknown to it and would count as nothing.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        forward(ids)
    return counter.get_total_flops() / length


class DecoderCosts:
    """FLOPs of a run's decoders, which are all of one shape: per token, and of training everything they are made of."""

    def __init__(
        self, decoder: Decoder, length: int, gate_layer: int | None, seed: int, experts: int, dense: int
    ) -> None:
        """`seed`, `experts` (all together), `dense`: tokens they were trained on; the latter two from the seed on."""
        self.forward = forward_flops(decoder, length)
        self.gates = 0.0  # of the seed, read up to the layer the gates look at
        if gate_layer is not None:
            self.gates = forward_flops(lambda ids: decoder.hidden_states(ids, depth=gate_layer), length)
        token = BACKWARD_AND_FORWARD * self.forward
        self.seed, self.experts, self.dense = token * seed, token * (seed + experts), token * (seed + dense)
