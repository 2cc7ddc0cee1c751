"""The optimizer over what is trained, what a step of it came to, and its state under the names of a checkpoint."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from schemas.training import TrainingConfig

AVERAGES = ("exp_avg", "exp_avg_sq")  # AdamW's, by the names torch gives them

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


def build_optimizer(module: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
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


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by their names in a checkpoint."""
    return {name.removeprefix("module."): p for name, p in module.named_parameters() if p.requires_grad}


def mean_parts(parts: list[Parts]) -> Parts:
    """The mean of each loss over the micro-batches of a step."""
    return {name: torch.stack([part[name].detach().float() for part in parts]).mean() for name in parts[0]}


def read_state(name: str, parameter: nn.Parameter, optimizer: torch.optim.AdamW) -> Iterator[tuple[str, Tensor]]:
    """A parameter that is whole, and its averages, under the names of a checkpoint."""
    yield f"weight/{name}", parameter.detach()
    for key in AVERAGES:  # none before the first step that was applied
        yield f"{key}/{name}", optimizer.state[parameter].get(key, torch.zeros_like(parameter))


def write_state(
    name: str, parameter: nn.Parameter, optimizer: torch.optim.AdamW, state: dict[str, Tensor], steps: int
) -> None:
    """The inverse of `read_state`."""
    parameter.data.copy_(state[f"weight/{name}"])
    averages = {key: state[f"{key}/{name}"].to(parameter.device).clone() for key in AVERAGES}
    optimizer.state[parameter] = {"step": torch.tensor(float(steps), device=parameter.device), **averages}
