"""What a composed model is trained to lower, and how the experts' part of it is kept for the next training.

Shape letters: B rows, T tokens, X experts, E expert width, F priors per expert.

- experts and gates are frozen: of the same rows they make the same, whatever reads them. Where features are kept, a
  step that meets rows it has met runs neither, and computes with the very numbers of that pass
- rows go by what they hold and by the precision of the pass; of the states, only layers that some bridge reads are kept
"""

import hashlib
from typing import Protocol

import torch
from torch import Tensor, nn

from stages.nn.central import losses_of
from stages.nn.composed import ComposedModel
from stages.nn.experts import ExpertStates


class Features(Protocol):
    """Where tensors are kept by a name that says what they are of."""

    def read(self, name: str) -> dict[str, Tensor] | None:
        """Those of this name, or None."""

    def keep(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Keep them, or not, where there is no room."""


class ComposedLoss(nn.Module):
    """What the composed model is trained to lower: the central model's loss, with experts read."""

    def __init__(self, composed: ComposedModel, features: Features | None = None) -> None:
        super().__init__()
        self.composed = composed
        self.features = features

    def forward(self, row_BT: Tensor) -> dict[str, Tensor]:
        """`row_BT`: T = sequence length + 1 token ids; every token but the first is predicted."""
        row_BT = self.composed.central.begun(row_BT)
        ids_BT, target_BT = row_BT[:, :-1], row_BT[:, 1:]
        experts = None if self.features is None else self._of_experts(row_BT, self.features)
        log_prob_BT, levels = self.composed.log_probs(ids_BT, target_BT, experts=experts)
        return losses_of(self.composed.central, -log_prob_BT.mean(), levels, row_BT)

    def _of_experts(self, row_BT: Tensor, features: Features) -> ExpertStates:
        """What the experts make of rows, read or computed."""
        name, layers = name_of(row_BT, next(self.composed.experts.parameters()).dtype), self._layers()
        kept = features.read(name)
        if kept is not None:
            return _replayed({key: tensor.to(row_BT.device) for key, tensor in kept.items()}, layers)
        composed = self.composed
        experts = composed.consult(row_BT[:, :-1], composed.new_cache(), None, row_BT[:, 1:])
        features.keep(name, _recorded(experts, layers))
        return experts

    def _layers(self) -> list[list[int | None]]:
        """By expert, for each of its states: its number where a bridge reads it, else None."""
        depths, found = self.composed.bridges.depths_read(), []
        for decoder in self.composed.decoders:
            last = decoder.config.num_hidden_layers
            read = {round(depth * last) for depth in depths}
            found.append([layer if layer in read else None for layer in range(last + 1)])
        return found


def name_of(row_BT: Tensor, weights: torch.dtype) -> str:
    """Of rows, where they are computed, and the precision: what decides the bits of what is made of them."""
    kind = row_BT.device.type
    half = str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else "no autocast"
    content = row_BT.cpu().contiguous().numpy().tobytes()
    return hashlib.sha256(f"{kind} {weights} {half} {tuple(row_BT.shape)} ".encode() + content).hexdigest()


def _recorded(experts: ExpertStates, layers: list[list[int | None]]) -> dict[str, Tensor]:
    tensors = {"prior": experts.prior_BTXF}
    if experts.target_BTX is not None:
        tensors["target"] = experts.target_BTX
    for number, (states, read) in enumerate(zip(experts.state_XLBTE, layers, strict=True)):
        assert states is not None, "all experts are active in training"
        tensors |= {f"state.{number}.{layer}": states[layer] for layer in read if layer is not None}
    return tensors


def _replayed(tensors: dict[str, Tensor], layers: list[list[int | None]]) -> ExpertStates:
    unread = tensors["prior"].new_zeros(0)
    states: list[list[Tensor] | None] = [
        [unread if layer is None else tensors[f"state.{number}.{layer}"] for layer in read]
        for number, read in enumerate(layers)
    ]
    return ExpertStates(0, states, tensors["prior"], tensors.get("target"))
