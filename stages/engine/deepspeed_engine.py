"""DeepSpeed, in process: one device or many, ZeRO 0 to 3.

- the optimizer is that of plain torch, and the learning rate comes with every step: DeepSpeed's own are not used
- its own checkpoints are pickles and are not used either: what ZeRO keeps is read through its `safe_` functions, and
  written through what these call
"""

import contextlib
import math
import os
import warnings
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from schemas.failures import UsageFailure, on_one_line
from schemas.strict import explain
from schemas.training import TrainingConfig
from stages.engine.deepspeed_config import deepspeed_config
from stages.engine.optimizer import (
    AVERAGES,
    Outcome,
    Parts,
    averages_of,
    averages_of_group,
    choose_optimizer,
    mean_parts,
    poisoned,
    read_state,
    trained,
    write_state,
)
from stages.engine.precision import LossScale, choose_precision
from stages.engine.processes import Place, join_processes
from stages.engine.sharded_muon import ShardedMuon

IN_USE = -1  # what ZeRO 3 lets go of is in use by no module; this is the number of none


class DeepSpeedEngine:
    """DeepSpeed, in process: one device or many, ZeRO 0 to 3."""

    name = "deepspeed"

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        config: TrainingConfig,
        scale: LossScale,
        place: Place,
    ) -> None:
        deepspeed = load_deepspeed(place)
        join_processes(place)
        self._stage = config.zero_stage
        self._clipping = config.gradient_clipping
        self._scale = scale
        # Found by parameter, in whose place ZeRO 1 to 3 put their pieces.
        self._averages = {name: averages_of(p, optimizer) for name, p in trained(module).items()}
        linear = functional.linear
        told = deepspeed_config(config, choose_precision(config, place), choose_optimizer(config, module), place.world)
        try:
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                model=module, optimizer=optimizer, dist_init_required=False, config=told
            )
        except (ValidationError, deepspeed.DeepSpeedConfigError) as error:  # of the user's file: our part is tested
            reason = explain(error, "") if isinstance(error, ValidationError) else f": {error}"
            raise UsageFailure(on_one_line(f"--deepspeed: DeepSpeed refuses its settings{reason}")) from error
        if place.world == 1 and not self._stage:
            # A mean over one process, for which all gradients would be copied into one tensor and back.
            self._engine.enable_backward_allreduce = False
        # ZeRO 3 replaces this function for the whole process, and never puts it back.
        self._linear, functional.linear = functional.linear, linear
        self.module = module
        self._lay_out(optimizer)
        self._start_averages()
        self._mark_whole()

    def step(self, micro_batches: list[Tensor], rate: float) -> Outcome:
        """See Engine."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._gather_whole()
        if self._stage:  # these optimizers know the scale: they raise the loss and lower the gradient themselves
            self._optimizer.loss_scale = self._scale.value
        parts = []
        for rows in micro_batches[:-1]:
            parts.append(self._backward(rows))
            self._engine.step()  # counts the micro-batch
        parts.append(self._backward(micro_batches[-1]))
        if self._stage:  # with ZeRO, DeepSpeed itself leaves out a step whose gradient is not finite
            self._engine.step()
            norm, applied = float(self._engine.get_global_grad_norm()), not self._optimizer.overflow
            return Outcome(mean_parts(parts), norm, applied, self._scale.update(applied))
        self._scale.lower(trained(self.module).values())
        norm = float(nn.utils.clip_grad_norm_(trained(self.module).values(), self._clipping))
        if not (applied := math.isfinite(norm)):
            for parameter in trained(self.module).values():
                parameter.grad = None  # optimizers pass over what has no gradient
        self._engine.step()
        return Outcome(mean_parts(parts), norm, applied, self._scale.update(applied))

    def _backward(self, rows: Tensor) -> Parts:
        linear, functional.linear = functional.linear, self._linear
        try:
            parts: Parts = self._engine(rows)
            loss = poisoned(parts["loss"])
            self._engine.backward(loss if self._stage else self._scale.raised(loss))
        finally:
            functional.linear = linear
        return parts

    def state(self) -> dict[str, Tensor]:
        """See Engine."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        state = self._scale.state()
        for name, parameter in trained(self.module).items():
            if self._stage:
                state[f"weight/{name}"] = safe_get_full_fp32_param(parameter).view(_full_shape(parameter)).clone()
                for key in self._averages[name]:
                    moment = safe_get_full_optimizer_state(parameter, key)
                    state[f"{key}/{name}"] = moment.view(_full_shape(parameter)).clone()
            else:
                state.update(read_state(name, parameter, self._optimizer))
        return state

    def load_state(self, state: dict[str, Tensor], steps: int) -> None:
        """See Engine."""
        self._scale.load_state(state)
        for name, parameter in trained(self.module).items():
            if not self._stage:
                write_state(name, parameter, self._optimizer, state, steps)
                continue
            weight = state[f"weight/{name}"].to(parameter.device)
            self._put(parameter, weight)
            for key in self._averages[name]:
                self._put(parameter, state[f"{key}/{name}"].to(parameter.device), key)
            with self._gathered(parameter):
                parameter.data.copy_(weight)
        self._set_step(steps)

    def _put(self, parameter: nn.Parameter, whole: Tensor, key: str | None = None) -> None:
        """Write the fp32 weight, or an average of it, where ZeRO keeps it.

        ZeRO 3 has pieces of equal length, the last ones filled up, for which DeepSpeed looks in the whole tensor too.
        """
        if self._stage < 3:
            getattr(parameter, "set_full_hp_param")(whole, key)  # noqa: B009  # for mypy, a parameter has no such thing
            return
        length = getattr(parameter, "ds_tensor").numel()  # noqa: B009
        group = getattr(parameter, "ds_process_group", self._optimizer.dp_process_group)
        start = length * torch.distributed.get_rank(group)
        piece = whole.flatten()[start : start + length]
        self._optimizer.set_local_hp_param(functional.pad(piece, (0, length - len(piece))), parameter, key)

    def _mark_whole(self) -> None:
        """Have ZeRO 3 leave whole what is neither a linear map's nor an embedding's.

        It brings a parameter together for the forward pass of the module it belongs to, and a learned vector is read by
        others too: by the level, say, whose positions its upsampler has. These are few numbers.
        """
        if self._stage < 3:
            return
        whole = self._optimizer.persistent_parameters
        for part in self.module.modules():
            for parameter in () if isinstance(part, (nn.Linear, nn.Embedding)) else part.parameters(recurse=False):
                if not getattr(parameter, "ds_persist"):  # noqa: B009  # for mypy, a parameter has no such thing
                    setattr(parameter, "ds_persist", True)  # noqa: B010
                    whole.append(parameter)

    def _gather_whole(self) -> None:
        """Bring together what stays whole, and keep it.

        DeepSpeed does so between two steps, but not before the first, in which it lets go of everything after the
        forward pass of its module: a gradient then finds no parameter it fits, where that module gives no tensors.
        """
        if self._stage < 3 or not (whole := self._optimizer.persistent_parameters):
            return
        whole[0].all_gather(whole)
        for parameter in whole:
            parameter.ds_active_sub_modules.add(IN_USE)

    def _gathered(self, parameter: nn.Parameter) -> contextlib.AbstractContextManager[Any]:
        """The whole parameter, to be written to: ZeRO 3 keeps only a part of it on each process."""
        if self._stage < 3:
            return contextlib.nullcontext()
        from deepspeed.runtime.zero import GatheredParameters

        return GatheredParameters(parameter, modifier_rank=0)

    def _lay_out(self, optimizer: Optimizer) -> None:
        """Tell Muon where its matrices lie in the row that ZeRO 1 and 2 have made of them."""
        for part in getattr(optimizer, "parts", [optimizer]):
            if isinstance(part, ShardedMuon):
                part.lay_out(self._optimizer.bit16_groups_flat[0])  # its group is the first

    def _start_averages(self) -> None:
        """Give the optimizer its averages before the first step, all zero, at step 0.

        ZeRO 1 and 2 map them to parameters once, after the step of the first parameter group, when those of the
        second do not exist yet; and they have to exist for a checkpoint to be loaded into them.
        """
        if not self._stage:
            return
        inner = self._optimizer.optimizer
        pieces = [(p, averages_of_group(group)) for group in inner.param_groups for p in group["params"]]
        if self._stage == 3:
            pieces = [(piece, AVERAGES) for piece in self._optimizer.fp32_partitioned_groups_flat]
        for piece, keys in pieces:
            inner.state[piece] = {key: torch.zeros_like(piece) for key in keys}
            if keys == AVERAGES:
                inner.state[piece]["step"] = torch.zeros((), device=piece.device)
        if self._stage < 3:
            self._optimizer._lazy_init_hp_params_optimizer_state()

    def _set_step(self, steps: int) -> None:
        inner = getattr(self._optimizer, "optimizer", self._optimizer)
        for moments in inner.state.values():
            if "step" in moments:
                moments["step"].fill_(float(steps))


def _full_shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def load_deepspeed(place: Place) -> Any:
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
