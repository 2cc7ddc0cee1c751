"""What one forward and backward pass of a model costs, found out without computing it.

- the pass runs on tensors that have shapes and no content, so a model of any size costs no memory and little time
- operations are counted as in flops.py: matrix products, attention in full
- memory for the backward pass is what autograd keeps, each storage once: a formula such as Korthikanti et al. (2022),
  equation 2, says the same for a GPT with dropout, but knows no central model, no frozen experts and no autocast
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class PassCost:
    """Of one micro-batch."""

    parameters: int  # all that are there, frozen ones too
    trained: int
    flops: float  # forward and backward
    kept: int  # bytes of activations between forward and backward, and of the largest gradients of one of them


def cost_of_pass(make: Callable[[], nn.Module], rows: int, length: int, *, bf16: bool) -> PassCost:
    """Cost of `make()(ids)["loss"].backward()` for int64 ids [rows, length + 1]."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        module = make()
        ids_BT = torch.zeros(rows, length + 1, dtype=torch.long)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            module(ids_BT)["loss"].backward()
        parameters = {id(parameter): parameter for parameter in module.parameters()}.values()
        return PassCost(
            parameters=sum(parameter.numel() for parameter in parameters),
            trained=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
            flops=float(counter.get_total_flops()),
            kept=_kept(module, ids_BT, bf16),
        )


def _kept(module: nn.Module, ids_BT: Tensor, bf16: bool) -> int:
    own = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []  # else a freed storage would lend its number to another

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            sizes[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        loss = module(ids_BT)["loss"]
    del loss
    return sum(sizes.values()) + 2 * max(sizes.values(), default=0)
