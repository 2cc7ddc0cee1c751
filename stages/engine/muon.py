"""Muon: momentum made nearly orthogonal, for the linear maps inside a model.

- Jordan 2024, "Muon: an optimizer for hidden layers in neural networks": Nesterov momentum, five Newton–Schulz steps
- updates as large as AdamW's (Liu et al. 2025, "Muon is scalable for LLM training", section 2.2), so that rates and
  weight decay carry over
- torch.optim.Muon takes one matrix at a time, in bf16: here those of one shape go together, and in fp32 where bf16 is
  emulated. benchmarks/bench_muon.py prints what that saves
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stages.engine.processes import bf16_is_fast

MOMENTUM = 0.95
QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan's: steep at zero, and singular values end between 0.7 and 1.2
ROUNDS = 5
LIKE_ADAMW = 0.2  # the usual root mean square of AdamW's updates
TOGETHER = 2**24  # numbers in matrices that are made orthogonal at once: more are no faster, and need memory


class Muon(Optimizer):
    """Every parameter is a matrix. Its state is `momentum_buffer`, of the same shape."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        for group in self.param_groups:
            moving = [p for p in group["params"] if p.grad is not None]
            for few in alike([p.shape for p in moving]):
                self._update([moving[number] for number in few], group["lr"], group["weight_decay"])

    def _update(self, matrices: list[Tensor], rate: float, weight_decay: float) -> None:
        """Of matrices of one shape, which have gradients."""
        gradients = [matrix.grad for matrix in matrices if matrix.grad is not None]
        momenta = [self._momentum(matrix) for matrix in matrices]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        ahead = torch.stack(torch._foreach_lerp(gradients, momenta, MOMENTUM))  # Nesterov's
        size = update_size(matrices[0].shape)
        updates = nearly_orthogonal(ahead).to(matrices[0].dtype).unbind()
        torch._foreach_mul_(matrices, 1 - rate * weight_decay)
        torch._foreach_add_(matrices, updates, alpha=-rate * size)

    def _momentum(self, matrix: Tensor) -> Tensor:
        state = self.state[matrix]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        buffer: Tensor = state["momentum_buffer"]
        return buffer


def nearly_orthogonal(x_NRC: Tensor) -> Tensor:
    """Matrices [N, R, C] with the same singular vectors, and all singular values near 1."""
    tall = x_NRC.shape[1] > x_NRC.shape[2]
    x_NRC = x_NRC.mT if tall else x_NRC
    x_NRC = x_NRC.bfloat16() if bf16_is_fast(x_NRC.device) else x_NRC.float()
    x_NRC = x_NRC / x_NRC.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = QUINTIC
    for _ in range(ROUNDS):
        gram_NRR = x_NRC @ x_NRC.mT
        polynomial_NRR = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=b, alpha=c)
        x_NRC = torch.baddbmm(x_NRC, polynomial_NRR, x_NRC, beta=a)
    return x_NRC.mT if tall else x_NRC


def update_size(shape: torch.Size) -> float:
    """What a nearly orthogonal matrix [R, C] is multiplied by, to be as large as AdamW's updates."""
    return LIKE_ADAMW * float(max(shape)) ** 0.5


def alike(shapes: Sequence[torch.Size]) -> Iterator[list[int]]:
    """The numbers of matrices of one shape, together of at most TOGETHER numbers, or of one matrix."""
    of_shape: dict[torch.Size, list[int]] = {}
    for number, shape in enumerate(shapes):
        of_shape.setdefault(shape, []).append(number)
    for shape, numbers in of_shape.items():
        many = max(1, TOGETHER // shape.numel())
        yield from (numbers[start : start + many] for start in range(0, len(numbers), many))
