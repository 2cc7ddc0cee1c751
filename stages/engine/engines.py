"""What performs an optimizer step: plain torch on one device, or DeepSpeed over many. Both give the same numbers.

- weights stay fp32; bf16 is torch's autocast inside the forward pass, under both engines alike, so there is one
  numerics to trust, and a checkpoint is the weights and AdamW's two averages, whatever the engine, the ZeRO stage or
  the number of processes
- the learning rate comes with every step: DeepSpeed's own schedulers are not used
"""

import contextlib
import copy
import importlib.util
import os
import warnings
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from schemas.failures import UsageFailure
from schemas.training import TrainingConfig
from stages.engine.processes import Place, bf16_is_fast, join_processes

AVERAGES = ("exp_avg", "exp_avg_sq")  # AdamW's, by the names torch gives them

Parts = dict[str, Tensor]  # "loss", which is optimised, and whatever else the module wants logged


class Engine(Protocol):
    """One optimizer step at a time, and the state that resuming needs."""

    name: str

    def step(self, micro_batches: list[Tensor], rate: float) -> tuple[Parts, float]:
        """Train on this process's rows of one step; returns their mean losses and the norm of the gradient."""

    def state(self) -> dict[str, Tensor]:
        """Weights (`weight/…`) and averages (`exp_avg/…`, `exp_avg_sq/…`) of what is trained, whole on each process."""

    def load_state(self, state: dict[str, Tensor], steps: int) -> None:
        """Continue from `state`, reached after `steps` steps."""


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
    optimizer = _optimizer(wrapped, config)
    return (
        TorchEngine(wrapped, optimizer, config)
        if name == "torch"
        else DeepSpeedEngine(wrapped, optimizer, config, place)
    )


def _optimizer(module: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW; weight decay only on matrices: a norm's scale or a gate has no reason to be small."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        fused=True,
    )


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name.removeprefix("module."): p for name, p in module.named_parameters() if p.requires_grad}


def _mean(parts: list[Parts]) -> Parts:
    return {name: torch.stack([part[name].detach().float() for part in parts]).mean() for name in parts[0]}


def _read_state(name: str, parameter: nn.Parameter, optimizer: torch.optim.AdamW) -> Iterator[tuple[str, Tensor]]:
    """A parameter that is whole, and its averages, under the names of a checkpoint."""
    yield f"weight/{name}", parameter.detach()
    for key in AVERAGES:
        yield f"{key}/{name}", optimizer.state[parameter][key]


def _write_state(
    name: str, parameter: nn.Parameter, optimizer: torch.optim.AdamW, state: dict[str, Tensor], steps: int
) -> None:
    """The inverse of `_read_state`."""
    parameter.data.copy_(state[f"weight/{name}"])
    averages = {key: state[f"{key}/{name}"].to(parameter.device).clone() for key in AVERAGES}
    optimizer.state[parameter] = {"step": torch.tensor(float(steps), device=parameter.device), **averages}


class TorchEngine:
    """One device, nothing between torch and the model."""

    name = "torch"

    def __init__(self, module: nn.Module, optimizer: torch.optim.AdamW, config: TrainingConfig) -> None:
        self.module = module
        self.optimizer = optimizer
        self._clipping = config.gradient_clipping

    def step(self, micro_batches: list[Tensor], rate: float) -> tuple[Parts, float]:
        """See Engine."""
        parts = []
        for rows in micro_batches:
            parts.append(self.module(rows))
            (parts[-1]["loss"] / len(micro_batches)).backward()
        norm = nn.utils.clip_grad_norm_(_trained(self.module).values(), self._clipping)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return _mean(parts), float(norm)

    def state(self) -> dict[str, Tensor]:
        """See Engine."""
        return {
            key: tensor for own in _trained(self.module).items() for key, tensor in _read_state(*own, self.optimizer)
        }

    def load_state(self, state: dict[str, Tensor], steps: int) -> None:
        """See Engine."""
        for name, parameter in _trained(self.module).items():
            _write_state(name, parameter, self.optimizer, state, steps)


class DeepSpeedEngine:
    """DeepSpeed, in process: one device or many, ZeRO 0 to 3."""

    name = "deepspeed"

    def __init__(self, module: nn.Module, optimizer: torch.optim.AdamW, config: TrainingConfig, place: Place) -> None:
        deepspeed = _load_deepspeed(place)
        join_processes(place)
        rows = config.batch_size // place.world
        micro = min(config.micro_batch_size or rows, rows)
        self._stage = config.zero_stage
        self._clipping = config.gradient_clipping
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            dist_init_required=False,
            config={
                "train_batch_size": config.batch_size,
                "train_micro_batch_size_per_gpu": micro,
                "gradient_accumulation_steps": rows // micro,
                # Without ZeRO, DeepSpeed clips but does not tell the norm, so `step` clips.
                "gradient_clipping": config.gradient_clipping if config.zero_stage else 0.0,
                "zero_optimization": {"stage": config.zero_stage},
                "zero_allow_untested_optimizer": True,
                "steps_per_print": 10**9,
            },
        )
        self.module = module
        self._start_averages()

    def step(self, micro_batches: list[Tensor], rate: float) -> tuple[Parts, float]:
        """See Engine."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        parts = []
        norm = 0.0
        for rows in micro_batches:
            parts.append(self._engine(rows))
            self._engine.backward(parts[-1]["loss"])
            if not self._stage and self._engine.is_gradient_accumulation_boundary():
                norm = float(nn.utils.clip_grad_norm_(_trained(self.module).values(), self._clipping))
            self._engine.step()
        return _mean(parts), float(self._engine.get_global_grad_norm()) if self._stage else norm

    def state(self) -> dict[str, Tensor]:
        """See Engine."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        state = {}
        for name, parameter in _trained(self.module).items():
            if self._stage:
                state[f"weight/{name}"] = safe_get_full_fp32_param(parameter).view(_full_shape(parameter)).clone()
                for key in AVERAGES:
                    moment = safe_get_full_optimizer_state(parameter, key)
                    state[f"{key}/{name}"] = moment.view(_full_shape(parameter)).clone()
            else:
                state.update(_read_state(name, parameter, self._optimizer))
        return state

    def load_state(self, state: dict[str, Tensor], steps: int) -> None:
        """See Engine."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        for name, parameter in _trained(self.module).items():
            weight = state[f"weight/{name}"].to(parameter.device)
            if self._stage:
                safe_set_full_fp32_param(parameter, weight)
                for key in AVERAGES:
                    safe_set_full_optimizer_state(parameter, state[f"{key}/{name}"].to(parameter.device), key)
                with self._gathered(parameter):
                    parameter.data.copy_(weight)
            else:
                _write_state(name, parameter, self._optimizer, state, steps)
        self._set_step(steps)

    def _gathered(self, parameter: nn.Parameter) -> contextlib.AbstractContextManager[Any]:
        """The whole parameter, to be written to: ZeRO 3 keeps only a part of it on each process."""
        if self._stage < 3:
            return contextlib.nullcontext()
        from deepspeed.runtime.zero import GatheredParameters

        return GatheredParameters(parameter, modifier_rank=0)

    def _start_averages(self) -> None:
        """Give AdamW its averages before the first step, all zero, at step 0.

        ZeRO 1 and 2 map them to parameters once, after the step of the first parameter group, when those of the
        second do not exist yet; and they have to exist for a checkpoint to be loaded into them.
        """
        if not self._stage:
            return
        inner = self._optimizer.optimizer
        pieces = [p for group in inner.param_groups for p in group["params"]]
        if self._stage == 3:
            pieces = self._optimizer.fp32_partitioned_groups_flat
        for piece in pieces:
            zeros = {key: torch.zeros_like(piece) for key in AVERAGES}
            inner.state[piece] = {"step": torch.zeros((), device=piece.device), **zeros}
        if self._stage < 3:
            self._optimizer._lazy_init_hp_params_optimizer_state()

    def _set_step(self, steps: int) -> None:
        inner = getattr(self._optimizer, "optimizer", self._optimizer)
        for moments in inner.state.values():
            if "step" in moments:
                moments["step"].fill_(float(steps))


def _full_shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def _load_deepspeed(place: Place) -> Any:
    """Import DeepSpeed so that it neither compiles, waits for a stale lock, nor looks for MPI."""
    if place.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", str(place.local))
    with contextlib.redirect_stdout(None):
        import deepspeed
        from deepspeed.utils import logger
    logger.setLevel("ERROR")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")  # of its ZeRO 3
    # On CPU, DeepSpeed compiles a shared-memory all-reduce that only its inference uses; a killed compile leaves a
    # lock on which every later start would wait for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
