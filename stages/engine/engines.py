"""What performs an optimizer step: plain torch on one device, or DeepSpeed over many. Both give the same numbers.

- a checkpoint is the fp32 weights and what the optimizer keeps of them, AdamW two averages and Muon one, whatever the
  engine, the ZeRO stage or the number of processes; for fp16 also the loss scale
- the learning rate comes with every step
"""

import copy
import importlib.util
from typing import Protocol

from loguru import logger
from torch import Tensor, nn

from schemas.failures import UsageFailure
from schemas.training import TrainingConfig
from stages.engine.compilation import choose_compile
from stages.engine.deepspeed_engine import DeepSpeedEngine, load_deepspeed
from stages.engine.optimizer import Outcome, build_optimizer
from stages.engine.precision import Autocast, LossScale, choose_precision
from stages.engine.processes import Place
from stages.engine.torch_engine import TorchEngine


class Engine(Protocol):
    """One optimizer step at a time, and the state that resuming needs."""

    name: str

    def step(self, micro_batches: list[Tensor], rate: float) -> Outcome:
        """Train on this process's rows of one step; a gradient that is not finite changes nothing."""

    def state(self) -> dict[str, Tensor]:
        """What is trained, whole on each process: weights (`weight/…`) and averages.

        Of AdamW these are `exp_avg/…` and `exp_avg_sq/…`, of Muon `momentum_buffer/…`.
        """

    def load_state(self, state: dict[str, Tensor], steps: int) -> None:
        """Continue from `state`, reached after `steps` steps that were applied."""


def start_engine(module: nn.Module, config: TrainingConfig, place: Place) -> Engine:
    """The engine the settings ask for. Raises UsageFailure when it cannot be had."""
    name = _choose_engine(config, place)
    if config.zero_stage == 3:
        # It takes a module's weights apart, frozen ones too, and never puts them back.
        module = copy.deepcopy(module)
    for layer in module.modules():
        if hasattr(layer, "recompute"):
            setattr(layer, "recompute", config.activation_checkpointing)  # noqa: B010  # for mypy, a module has tensors only
    precision = choose_precision(config, place)
    if precision == "fp16" and place.device.type == "cpu":
        logger.warning("fp16 is emulated on this processor, and slower than fp32: it is of use on GPUs only")
    wrapped = Autocast(module, place.device, precision).to(place.device)
    if choose_compile(config, place, module):
        wrapped.compile()
    optimizer, scale = build_optimizer(wrapped, config), LossScale(precision)
    if name == "torch":
        return TorchEngine(wrapped, optimizer, config, scale)
    return DeepSpeedEngine(wrapped, optimizer, config, scale, place)


def _choose_engine(config: TrainingConfig, place: Place) -> str:
    """DeepSpeed if asked for; for `auto`, if it can be imported or nothing else will do."""
    if config.offload_optimizer != "none" and not config.zero_stage:
        raise UsageFailure(
            "--offload-optimizer cpu needs --zero-stage 1, 2 or 3: without ZeRO there is nothing to move"
        )
    alone = place.world == 1 and not config.zero_stage and config.deepspeed is None
    if config.engine == "torch":
        if not alone:
            raise UsageFailure(
                "--engine torch trains on one device, without ZeRO or a --deepspeed file: use --engine deepspeed"
            )
        return "torch"
    if config.engine == "auto" and alone and importlib.util.find_spec("deepspeed") is None:
        return "torch"
    try:
        load_deepspeed(place)
    except Exception as error:  # whatever its parts raise where a compiler, a driver or a library is not as they like
        reason = f"DeepSpeed cannot be imported here ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        if config.engine == "auto" and alone:
            logger.warning("{}: training with plain torch", reason)
            return "torch"
        raise UsageFailure(f"{reason}: mend it, or train in one process with --engine torch and no ZeRO") from error
    return "deepspeed"
