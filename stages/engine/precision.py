"""The precision of the forward pass: weights stay fp32, under every engine alike.

- bf16 and fp16 are torch's autocast, so there is one numerics to trust
- fp16 has few exponents: the loss is multiplied by a power of two so that gradients do not vanish, and the gradient
  divided by it, which is exact. Its state is part of a checkpoint, so a resumed run overflows where the whole one does
"""

from collections.abc import Iterable

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
        self._dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)

    def forward(self, batch: Tensor) -> Parts:
        """The module's losses."""
        with torch.autocast(self._device_type, self._dtype or torch.bfloat16, enabled=self._dtype is not None):
            return self.module(batch)


def choose_precision(config: TrainingConfig, place: Place) -> str:
    """The precision `auto` stands for on this device."""
    if config.precision != "auto":
        return config.precision
    return "bf16" if bf16_is_fast(place.device) else "fp32"


class LossScale:
    """Dynamic loss scaling for fp16 (Micikevicius et al. 2018, section 3.2); 1 for the other precisions.

    Halved by a gradient that is not finite, doubled after `PATIENCE` steps without one: the constants are torch's
    GradScaler's.
    """

    START = 2.0**16
    PATIENCE = 2000

    def __init__(self, precision: str) -> None:
        self.active = precision == "fp16"
        self.value = self.START if self.active else 1.0
        self._clean = 0  # steps since the last change

    def raised(self, loss: Tensor) -> Tensor:
        """The loss times the scale."""
        return loss * self.value if self.active else loss

    def lower(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divide the gradients by the scale, in place."""
        if self.active:
            torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], 1 / self.value)

    def update(self, finite: bool) -> bool:
        """Take in whether the gradient was finite; returns whether the scale was too large."""
        if not self.active:
            return False
        if not finite:
            lowered, self.value, self._clean = self.value > 1, max(1.0, self.value / 2), 0
            return lowered
        self._clean += 1
        if self._clean == self.PATIENCE:
            self.value, self._clean = self.value * 2, 0
        return False

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint needs."""
        return {"loss_scale": torch.tensor([self.value, self._clean], dtype=torch.float64)} if self.active else {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from `state`."""
        if self.active:
            self.value, self._clean = float(state["loss_scale"][0]), int(state["loss_scale"][1])
