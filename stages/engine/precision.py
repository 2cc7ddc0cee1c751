"""The precision of the forward pass: weights stay fp32, under every engine alike.

- bf16 is torch's autocast, so there is one numerics to trust
"""

import torch
from torch import Tensor, nn

from schemas.training import TrainingConfig
from stages.engine.optimizer import Parts
from stages.engine.processes import Place, bf16_is_fast


class Autocast(nn.Module):
    """A module whose forward pass runs in the chosen precision."""

    def __init__(self, module: nn.Module, device: torch.device, precision: str) -> None:
        super().__init__()
        self.module = module
        self._device_type = device.type
        self._bf16 = precision == "bf16"

    def forward(self, batch: Tensor) -> Parts:
        """The module's losses."""
        with torch.autocast(self._device_type, torch.bfloat16, enabled=self._bf16):
            return self.module(batch)


def choose_precision(config: TrainingConfig, place: Place) -> str:
    """The precision `auto` stands for on this device."""
    if config.precision != "auto":
        return config.precision
    return "bf16" if bf16_is_fast(place.device) else "fp32"
