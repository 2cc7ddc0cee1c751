"""Layers of several models of one shape, side by side, for writing: a step reads one token of each of some texts.

Shape letters: M models, N texts, L layers, D model width, Q queries, keys and values, P pairs of them, H query heads,
K key/value heads, T two (keys and values), S places, E head width, C pairs of a head, F MLP width, W = D + 1.

- as `stages.nn.decoding`, but that each product is one of all models: with few rows a product costs what calling torch
  and reading its weights costs, and the calls are those of one model
- attention knows models as more heads
- with a window the places are a ring, as keys carry their rotation and their order does not matter
- what is read in other ways, such as a prompt, comes from the caches of `stages.nn.attention`, and can go back there
"""

import math
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.nn.attention import Layer, StackCache, rotary_angles
from stages.nn.packing import PackedLayer, unit

FIRST_ROOM = 256  # positions; doubled whenever they are used up

Visit = Callable[[int, Tensor], None]  # number of a layer, from 1 on, and the states after it [M, N, D], to be changed


class Step:
    """One more token of each of some texts, of which `lengths` tokens are read."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths = list(lengths)
        self.text_N = torch.arange(len(lengths), device=device)
        self.place_N = torch.tensor(self.lengths, device=device)
        self._masks: dict[int | None, Tensor | None] = {}

    @cached_property
    def longest(self) -> int:
        """Positions of the longest text, its new one among them."""
        return max(self.lengths) + 1

    def mask(self, window: int | None) -> Tensor | None:
        """Minus infinity [N, 1, 1, S] at the places a text has not filled; None where all have filled all."""
        if window not in self._masks:
            filled = [length + 1 if window is None else min(length + 1, window) for length in self.lengths]
            empty_NS = torch.arange(max(filled), device=self.place_N.device) >= self.place_N.new_tensor(filled)[:, None]
            mask_NS = torch.zeros_like(empty_NS, dtype=torch.float32).masked_fill_(empty_NS, -math.inf)
            self._masks[window] = None if min(filled) == max(filled) else mask_NS[:, None, None]
        return self._masks[window]


class StackRoom:
    """Keys and values of up to `texts` texts in every layer of every model."""

    def __init__(self, kv_LNTMKSE: Tensor, window: int | None) -> None:
        self.kv_LNTMKSE = kv_LNTMKSE
        self.window = window

    def make(self, positions: int) -> None:
        """Have space for so many positions."""
        *rest, room, head_dim = self.kv_LNTMKSE.shape
        if self.window is not None:
            positions = min(positions, self.window)
        if positions <= room:
            return
        while room < positions:
            room *= 2
        old_LNTMKSE = self.kv_LNTMKSE
        self.kv_LNTMKSE = old_LNTMKSE.new_zeros((*rest, room, head_dim))
        self.kv_LNTMKSE[..., : old_LNTMKSE.shape[-2], :] = old_LNTMKSE

    def move(self, source: int, target: int) -> None:
        """Put what one text has read in the place of another."""
        self.kv_LNTMKSE[:, target] = self.kv_LNTMKSE[:, source]

    def take(self, text: int, model: int, cache: StackCache) -> None:
        """Have one text's keys and values of a model, which a cache of that text alone holds."""
        if cache.position_S is None:
            return
        self.make(cache.seen)
        place_S = self._places(cache.position_S)
        for kv_NTMKSE, layer in zip(self.kv_LNTMKSE, cache.layers, strict=False):
            assert layer.k_BKSE is not None and layer.v_BKSE is not None
            kv_NTMKSE[text, 0, model][:, place_S] = _paired(layer.k_BKSE[0])
            kv_NTMKSE[text, 1, model][:, place_S] = layer.v_BKSE[0]

    def give_back(self, text: int, model: int, length: int, cache: StackCache) -> None:
        """Have a cache hold what a text of `length` has read."""
        first = 0 if self.window is None else max(0, length - self.window + 1)
        cache.seen, cache.position_S = length, torch.arange(first, length, device=self.kv_LNTMKSE.device)
        place_S = self._places(cache.position_S)
        for kv_NTMKSE, layer in zip(self.kv_LNTMKSE, cache.layers, strict=False):
            k_KSE, v_KSE = kv_NTMKSE[text, :, model][:, :, place_S]
            layer.k_BKSE, layer.v_BKSE = _halved(k_KSE)[None], v_KSE[None]

    def _places(self, position: Tensor) -> Tensor:
        return position if self.window is None else position % self.window


def _paired(k: Tensor) -> Tensor:
    """Keys in the order of `PackedLayer`: the two numbers that are rotated together are neighbours."""
    return k.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def _halved(k: Tensor) -> Tensor:
    """The inverse of `_paired`."""
    return k.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


class _Layer:
    """Weights of one layer of all models."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        packed = [PackedLayer(layer) for layer in layers]
        self.qkv_MDQ = torch.stack([layer.qkv_DQ for layer in packed])
        biases = [layer.bias_Q for layer in packed if layer.bias_Q is not None]
        self.bias_M1Q = torch.stack(biases)[:, None] if biases else None
        self.out_MED = torch.stack([layer.out_ED for layer in packed])
        self.gate_up_MDF = torch.stack([layer.gate_up_DF for layer in packed])
        self.down_MFD = torch.stack([layer.down_FD for layer in packed])


class PackedStack:
    """The layers of M models, packed. Weights are copied."""

    def __init__(self, models: Sequence[Sequence[nn.Module]], theta: float, window: int | None = None) -> None:
        """`models`: the layers of each, as `packable_layers` wants them, all models alike. `theta`: of the rotation."""
        first = models[0][0]
        assert isinstance(first, Layer)
        attention = first.self_attn
        self.models, self.window, self.theta = len(models), window, theta
        self.head_dim = attention.head_dim
        self.heads = attention.q_proj.out_features // self.head_dim
        self.key_value_heads = attention.k_proj.out_features // self.head_dim
        self.width, self.eps = attention.q_proj.in_features, first.input_layernorm.eps
        self._layers = [
            _Layer([layer for layer in layers if isinstance(layer, Layer)]) for layers in zip(*models, strict=True)
        ]
        self._turn_S1C = self._layers[0].qkv_MDQ.new_zeros((0, 1, self.head_dim // 2))

    def __len__(self) -> int:
        return len(self._layers)

    def new_room(self, texts: int) -> StackRoom:
        """Room for so many texts."""
        places = FIRST_ROOM if self.window is None else min(FIRST_ROOM, self.window)
        shape = (len(self), texts, 2, self.models, self.key_value_heads, places, self.head_dim)
        return StackRoom(self._layers[0].qkv_MDQ.new_zeros(shape), self.window)

    def step(self, x_MND: Tensor, step: Step, room: StackRoom, visit: Visit | None = None) -> Tensor:
        """States [M, N, D] after all layers, not normed, of the tokens whose embeddings are given."""
        room.make(step.longest)
        mask_N11S, turn_NP = step.mask(self.window), self._turn(step)
        kv_LNTMKSE = room.kv_LNTMKSE[:, : len(step.lengths)]
        filled = step.longest if self.window is None else min(step.longest, self.window)
        keys, values = kv_LNTMKSE[..., :filled, :].flatten(3, 4).unbind(2)
        place_N = step.place_N if self.window is None else step.place_N % self.window
        x_MNW = x_MND.new_full((*x_MND.shape[:2], self.width + 1), (self.eps * self.width) ** 0.5)
        x_MNW[..., :-1] = x_MND
        x_MND = x_MNW[..., :-1]
        for number, (layer, k_NXSE, v_NXSE) in enumerate(zip(self._layers, keys, values, strict=True), 1):
            qkv_MNQ = torch.bmm(unit(x_MND, x_MNW), layer.qkv_MDQ)
            if layer.bias_M1Q is not None:
                qkv_MNQ += layer.bias_M1Q
            qkv_MNQ.view(torch.complex64).mul_(turn_NP)
            q_NX1E, kv_NTMKE = self._by_text(qkv_MNQ)
            kv_LNTMKSE[number - 1][step.text_N, :, :, :, place_N] = kv_NTMKE
            found_NX1E = F.scaled_dot_product_attention(
                q_NX1E, k_NXSE, v_NXSE, mask_N11S, enable_gqa=self.heads != self.key_value_heads
            )
            found_MNE = found_NX1E.view(len(place_N), self.models, -1).transpose(0, 1)
            x_MND.baddbmm_(found_MNE, layer.out_MED)
            gate_MNF, up_MNF = torch.bmm(unit(x_MND, x_MNW), layer.gate_up_MDF).chunk(2, 2)
            x_MND.baddbmm_(F.silu(gate_MNF).mul_(up_MNF), layer.down_MFD)
            if visit is not None:
                visit(number, x_MND)
        return x_MND

    def _by_text(self, qkv_MNQ: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [N, M H, 1, E]; keys and values [N, T, M, K, E]."""
        models, texts, _ = qkv_MNQ.shape
        q_MNQ, kv_MNQ = qkv_MNQ.split([self.heads * self.head_dim, 2 * self.key_value_heads * self.head_dim], 2)
        q_NX1E = q_MNQ.transpose(0, 1).reshape(texts, models * self.heads, 1, self.head_dim)
        kv_MNTKE = kv_MNQ.view(models, texts, 2, self.key_value_heads, self.head_dim)
        return q_NX1E, kv_MNTKE.permute(1, 2, 0, 3, 4)

    def _turn(self, step: Step) -> Tensor:
        """Rotations [N, P] of the new positions, as complex numbers; those of values are one."""
        if step.longest > len(self._turn_S1C):
            position_S = torch.arange(2 * max(FIRST_ROOM, step.longest), device=step.place_N.device)
            angle_SC = rotary_angles(position_S, self.head_dim, self.theta)[:, : self.head_dim // 2]
            self._turn_S1C = torch.polar(torch.ones_like(angle_SC), angle_SC)[:, None]
        turn_N1C = self._turn_S1C[step.place_N]
        turned_NXC = turn_N1C.expand(-1, self.heads + self.key_value_heads, -1)
        values_NKC = torch.ones_like(turn_N1C).expand(-1, self.key_value_heads, -1)
        return torch.cat([turned_NXC, values_NKC], 1).flatten(1)
