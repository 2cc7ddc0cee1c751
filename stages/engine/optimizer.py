"""The optimizer over what is trained, what a step of it came to, and its state under the names of a checkpoint."""

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from schemas.failures import UsageFailure
from schemas.training import TrainingConfig
from stages.engine.muon import Muon
from stages.engine.sharded_muon import ShardedMuon

AVERAGES = ("exp_avg", "exp_avg_sq")  # AdamW's, by the names torch gives them

RATE = 0.0  # until the first step: each brings its own

Parts = dict[str, Tensor]  # "loss", which is optimised, and whatever else the module wants logged


@dataclass(frozen=True)
class Outcome:
    """What one step came to on this process."""

    parts: Parts  # means over this process's rows
    norm: float  # of the gradient over all processes, before clipping
    applied: bool  # false when the gradient was not finite: weights, averages and their step are as before
    rescaled: bool  # it was not finite because the loss scale of fp16 was too large, which is ordinary


def poisoned(loss: Tensor) -> Tensor:
    """The loss; where it is not finite, one whose gradient is not either.

    So the gradient alone, which all processes share, tells whether to step: an infinite cross-entropy can have a finite
    one. A finite loss keeps every bit.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


def choose_optimizer(config: TrainingConfig, module: nn.Module) -> str:
    """What `auto` stands for: Muon where there are linear maps for it, and it can, unless --deepspeed names AdamW.

    Raises UsageFailure where Muon is asked for and cannot be.
    """
    inside, hindrance = _linear_maps(module), _hindrance(config)
    if config.optimizer == "auto":
        table = json.loads(config.deepspeed or "{}").get("optimizer")
        named = isinstance(table, dict) and table.get("type") == "AdamW"
        return "muon" if inside and not hindrance and not named else "adamw"
    if config.optimizer == "muon" and hindrance:
        raise UsageFailure(f"--optimizer muon {hindrance}, or use --optimizer adamw")
    if config.optimizer == "muon" and not inside:
        raise UsageFailure("--optimizer muon: what is trained has no linear maps inside: use adamw")
    return config.optimizer


def _hindrance(config: TrainingConfig) -> str:
    """Why Muon cannot train anything; empty where it can."""
    if config.zero_stage == 3:
        return "needs whole matrices, of which ZeRO 3 gives every process a part: use --zero-stage 2"
    if config.offload_optimizer != "none":
        return "multiplies matrices, which is slow on a processor: leave out --offload-optimizer cpu"
    return ""


def build_optimizer(module: nn.Module, config: TrainingConfig) -> Optimizer:
    """AdamW, or Muon and AdamW. Weight decay only on matrices: a norm's scale or a gate has no reason to be small."""
    parameters = trained(module).values()
    if choose_optimizer(config, module) == "adamw":
        return _adamw(parameters, config)
    kind = ShardedMuon if config.zero_stage else Muon
    inside = _linear_maps(module)
    muon, among = kind(inside, RATE, config.weight_decay), {id(parameter) for parameter in inside}
    rest = [parameter for parameter in parameters if id(parameter) not in among]
    return Together(muon, _adamw(rest, config)) if rest else muon


class Together(Optimizer):
    """Optimizers of different parameters as one: their groups and states are its own."""

    def __init__(self, *parts: Optimizer) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts
        for part in parts:
            part.state = self.state

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of each."""
        for part in self.parts:
            part.step()


def numbers_kept(module: nn.Module, config: TrainingConfig) -> int:
    """How many numbers the optimizers keep of what is trained: AdamW two for each weight, Muon one."""
    by_muon = _linear_maps(module) if choose_optimizer(config, module) == "muon" else []
    return 2 * sum(p.numel() for p in trained(module).values()) - sum(p.numel() for p in by_muon)


def _adamw(parameters: Collection[nn.Parameter], config: TrainingConfig) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=RATE,
        betas=(config.adam_beta1, config.adam_beta2),
        fused=True,
    )


def _linear_maps(module: nn.Module) -> list[nn.Parameter]:
    """Weights of linear maps, but of no output layer: its rows are tokens, as an embedding's are (Jordan 2024)."""
    embedded = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    linear = {id(part.weight) for part in module.modules() if isinstance(part, nn.Linear)} - embedded
    named = trained(module).items()
    return [p for name, p in named if id(p) in linear and not name.endswith("lm_head.weight")]


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by their names in a checkpoint."""
    return {name.removeprefix("module."): p for name, p in module.named_parameters() if p.requires_grad}


def mean_parts(parts: list[Parts]) -> Parts:
    """The mean of each loss over the micro-batches of a step."""
    return {name: torch.stack([part[name].detach().float() for part in parts]).mean() for name in parts[0]}


def read_state(name: str, parameter: nn.Parameter, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """A parameter that is whole, and its averages, under the names of a checkpoint."""
    yield f"weight/{name}", parameter.detach()
    for key in averages_of(parameter, optimizer):  # none before the first step that was applied
        yield f"{key}/{name}", optimizer.state[parameter].get(key, torch.zeros_like(parameter))


def write_state(name: str, parameter: nn.Parameter, optimizer: Optimizer, state: dict[str, Tensor], steps: int) -> None:
    """The inverse of `read_state`."""
    parameter.data.copy_(state[f"weight/{name}"])
    keys = averages_of(parameter, optimizer)
    averages = {key: state[f"{key}/{name}"].to(parameter.device).clone() for key in keys}
    if keys == AVERAGES:
        averages["step"] = torch.tensor(float(steps), device=parameter.device)
    optimizer.state[parameter] = averages


def averages_of(parameter: nn.Parameter, optimizer: Optimizer) -> tuple[str, ...]:
    """The names of what the optimizer keeps for a parameter."""
    (group,) = (group for group in optimizer.param_groups if any(p is parameter for p in group["params"]))
    return averages_of_group(group)


def averages_of_group(group: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of what the optimizer keeps for each parameter of a group."""
    return AVERAGES if "betas" in group else ("momentum_buffer",)
