"""Muon where ZeRO 1 and 2 divide what is trained among processes.

- ZeRO lays a group's parameters one after another and gives every process an equal piece of the row. Most matrices lie
  whole in one piece; a process makes orthogonal those it holds a part of, so they share the work, and its momentum
  covers its piece
- a matrix over a border is put together from its parts, which are sums with zeros: the same bits everywhere
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stages.engine.muon import MOMENTUM, alike, nearly_orthogonal, update_size


class Matrix(NamedTuple):
    """A matrix in the row."""

    start: int
    shape: torch.Size

    @property
    def end(self) -> int:
        """Where the next one begins, or what fills the row up."""
        return self.start + self.shape.numel()

    def part(self, begin: int, length: int) -> tuple[slice, slice]:
        """What lies in the piece of this `length` from `begin` on: indices into the piece, and into the matrix."""
        first = min(max(self.start, begin), self.end)
        last = max(min(self.end, begin + length), first)
        return slice(first - begin, last - begin), slice(first - self.start, last - self.start)


class ShardedMuon(Optimizer):
    """Every parameter is a matrix until ZeRO puts this process's piece of the row in their place; then `lay_out`.

    Its state is `momentum_buffer`, of the shape of the piece.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        self._parameters = list(parameters)
        super().__init__(self._parameters, {"lr": lr, "weight_decay": weight_decay})
        self._matrices: list[Matrix] = []

    def lay_out(self, row: Tensor) -> None:
        """Find the parameters in the row [all numbers], of which by now they are views. Before the first step."""
        starts = [(p.data_ptr() - row.data_ptr()) // row.element_size() for p in self._parameters]
        self._matrices = sorted(Matrix(start, p.shape) for start, p in zip(starts, self._parameters, strict=True))
        self._parameters = []

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of the piece, if it has a gradient. All processes come here together."""
        (group,) = self.param_groups
        (piece,) = group["params"]
        if piece.grad is None:  # on all processes: ZeRO steps one group at a time, and it is another's turn
            return
        momentum = self.state[piece]["momentum_buffer"]
        momentum.lerp_(piece.grad, 1 - MOMENTUM)
        ahead = piece.grad.lerp(momentum, MOMENTUM)  # Nesterov's
        piece.mul_(1 - group["lr"] * group["weight_decay"])
        begin = torch.distributed.get_rank() * len(piece)
        found = list(self._held(ahead, begin))
        for few in alike([matrix.shape for matrix, _ in found]):
            updates_NRC = nearly_orthogonal(torch.stack([found[number][1] for number in few])).to(piece.dtype)
            for number, update_Z in zip(few, updates_NRC.flatten(1), strict=True):
                matrix = found[number][0]
                here, there = matrix.part(begin, len(piece))
                piece[here].add_(update_Z[there], alpha=-group["lr"] * update_size(matrix.shape))

    def _held(self, ahead: Tensor, begin: int) -> Iterator[tuple[Matrix, Tensor]]:
        """Each matrix of which a part lies in this process's piece, whole. `begin`: where the piece does."""
        for matrix in self._matrices:
            here, there = matrix.part(begin, len(ahead))
            if matrix.start // len(ahead) == (matrix.end - 1) // len(ahead):
                whole = ahead[here]
            else:
                whole = ahead.new_zeros(matrix.shape.numel())
                whole[there] = ahead[here]
                torch.distributed.all_reduce(whole)  # by all, in one order, also by who holds nothing of it
            if here.start < here.stop:
                yield matrix, whole.view(matrix.shape)
