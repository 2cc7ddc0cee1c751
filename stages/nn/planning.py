"""What one forward and backward pass of a model costs, found out without computing it.

- the pass runs on tensors that have shapes and no content, so a model of any size costs no memory and little time
- operations are counted as in flops.py: matrix products, attention in full
- memory for the backward pass is what autograd keeps, each storage once: a formula such as Korthikanti et al. (2022),
  equation 2, says the same for a GPT with dropout, but knows no central model, no frozen experts and no autocast
- activation checkpointing is counted as it runs: layers keep their inputs, and one at a time is computed once more
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class PassCost:
    """Of one micro-batch."""

    parameters: int  # all that are there, frozen ones too
    trained: int
    optimizer: int  # numbers that the optimizer keeps of them
    flops: float  # forward and backward, with what is computed twice
    kept: int  # bytes of activations between forward and backward, and of the largest gradients of one of them
    copies: int  # bytes of the weights in half precision, which autocast makes and keeps with them


@dataclass
class Kept:
    """Bytes by storage, of what autograd keeps and of autocast's copies of the weights."""

    activations: dict[int, int] = field(default_factory=dict)
    copies: dict[int, int] = field(default_factory=dict)
    largest: int = 0  # of all activations
    inside: int = 0  # activations of the layer that has most
    largest_inside: int = 0  # of those


def cost_of_pass(
    make: Callable[[], nn.Module],
    rows: int,
    length: int,
    *,
    half: bool,
    recompute: bool = False,
    numbers_kept: Callable[[nn.Module], int] = lambda module: 0,
) -> PassCost:
    """Cost of `make()(ids)["loss"].backward()` for int64 ids [rows, length + 1].

    half: under autocast, to bf16 or fp16; both have two bytes
    recompute: with activation checkpointing
    numbers_kept: by the optimizer, of such a module
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        module = make()
        ids_BT = torch.zeros(rows, length + 1, dtype=torch.long)
        whole = _kept(module, ids_BT, half)
        kept = _kept(_recomputing(module), ids_BT, half) if recompute else whole
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            module(ids_BT)["loss"].backward()
        parameters = {id(parameter): parameter for parameter in module.parameters()}.values()
        # The loss has its gradients before the first layer is computed again.
        again = whole.inside + 2 * whole.largest_inside if recompute else 0
        return PassCost(
            parameters=sum(parameter.numel() for parameter in parameters),
            trained=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
            optimizer=numbers_kept(module),
            flops=float(counter.get_total_flops()),
            kept=sum(kept.activations.values()) + max(2 * whole.largest, again),
            copies=sum(whole.copies.values()),  # autocast holds those of trained weights, also where they are not kept
        )


def hollow(make: Callable[[], nn.Module]) -> nn.Module:
    """The module, its weights without content."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        return make()


def _recomputing(module: nn.Module) -> nn.Module:
    for layer in _layers(module):
        setattr(layer, "recompute", True)  # noqa: B010  # for mypy, a module has tensors only
    return module


def _layers(module: nn.Module) -> list[nn.Module]:
    """The parts that can be computed once more."""
    return [layer for layer in module.modules() if hasattr(layer, "recompute")]


def _kept(module: nn.Module, ids_BT: Tensor, half: bool) -> Kept:
    own = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    kept, casts = Kept(), Casts(own)
    alive: list[Tensor] = []  # else a freed storage would lend its number to another
    before: list[set[int]] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            among = kept.copies if storage._cdata in casts.made else kept.activations
            among[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    def enter(*_: Any) -> None:
        before.append({*kept.activations})

    def leave(*_: Any) -> None:
        outside = before.pop()
        sizes = [size for storage, size in kept.activations.items() if storage not in outside]
        kept.inside = max(kept.inside, sum(sizes))
        kept.largest_inside = max(kept.largest_inside, *sizes, 0)

    hooks = [hook for layer in _layers(module) for hook in _around(layer, enter, leave)]
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=half),
        casts,
    ):
        loss = module(ids_BT)["loss"]
    del loss
    for hook in hooks:
        hook.remove()
    kept.largest = max(kept.activations.values(), default=0)
    return kept


def _around(layer: nn.Module, enter: Callable[..., None], leave: Callable[..., None]) -> tuple[Any, Any]:
    return layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)


class Casts(TorchDispatchMode):
    """Notes which storages are weights in another precision."""

    def __init__(self, weights: set[int]) -> None:
        """`weights`: their storages."""
        super().__init__()
        self.made: set[int] = set()
        self._weights = weights
        self._alive: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Computes as without it."""
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self._weights:
            self.made.add(out.untyped_storage()._cdata)
            self._alive.append(out)
        return out
