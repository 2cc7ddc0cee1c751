"""What performs an optimizer step: plain torch on one device, or DeepSpeed over many. Both give the same numbers.

- a checkpoint is the fp32 weights and AdamW's two averages, whatever the engine, the ZeRO stage or the number of
  processes
- the learning rate comes with every step
"""

import copy
import importlib.util
from typing import Protocol

from torch import Tensor, nn

from schemas.failures import UsageFailure
from schemas.training import TrainingConfig
from stages.engine.deepspeed_engine import DeepSpeedEngine
from stages.engine.optimizer import Outcome, build_optimizer
from stages.engine.precision import Autocast, choose_precision
from stages.engine.processes import Place
from stages.engine.torch_engine import TorchEngine


class Engine(Protocol):
    """One optimizer step at a time, and the state that resuming needs."""

    name: str

    def step(self, micro_batches: list[Tensor], rate: float) -> Outcome:
        """Train on this process's rows of one step; a gradient that is not finite changes nothing."""

    def state(self) -> dict[str, Tensor]:
        """Weights (`weight/…`) and averages (`exp_avg/…`, `exp_avg_sq/…`) of what is trained, whole on each process."""

    def load_state(self, state: dict[str, Tensor], steps: int) -> None:
        """Continue from `state`, reached after `steps` steps that were applied."""


def start_engine(module: nn.Module, config: TrainingConfig, place: Place) -> Engine:
    """The engine the settings ask for. Raises UsageFailure when it cannot be had."""
    name = config.engine
    if name == "auto":
        name = "deepspeed" if importlib.util.find_spec("deepspeed") else "torch"
    if name == "torch" and (place.world > 1 or config.zero_stage):
        raise UsageFailure("--engine torch trains on one device, without ZeRO: use --engine deepspeed")
    if config.zero_stage == 3:
        # It takes a module's weights apart, frozen ones too, and never puts them back.
        module = copy.deepcopy(module)
    wrapped = Autocast(module, place.device, choose_precision(config, place)).to(place.device)
    optimizer = build_optimizer(wrapped, config)
    return (
        TorchEngine(wrapped, optimizer, config)
        if name == "torch"
        else DeepSpeedEngine(wrapped, optimizer, config, place)
    )
