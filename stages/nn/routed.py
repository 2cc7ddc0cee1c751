"""Experts inside one decoder: a module's output is mixed, token by token, from the experts its gates choose.

Shape letters: B batch, T tokens, N = B T tokens in one line, M tokens of a group, I and O widths of a linear layer,
D model width, R rank, X experts, S = X + 1 slots: slot 0 is the seed, "none of them".

- y = W u + sum_x w_x B_x A_x u for LoRA experts (Muqeeth et al. 2024, section 3); of full experts the MLPs are mixed,
  sum_s w_s MLP_s(u), and everything else is shared. As weights sum to one, that is the seed and weighted differences
- place `module`: every module has its gates; `layer`: those at the first module of a layer serve the whole of it
- with a memory of 0 gates read a module's input u as it is, as in the paper; else the fading sum of the document's
  normalised inputs so far, normalised again
- sparse: tokens are grouped by expert, and an expert that no token chose is not touched, so a token costs what it
  chose, however many experts there are
- keys and values of a token depend on its own route only, so caches stay valid
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from schemas.decoder import DecoderConfig
from schemas.train_gates import GateMode, Place
from stages.nn.attention import StackCache, SwiGLU
from stages.nn.decoder import Decoder
from stages.nn.fading import fading_sums
from stages.nn.gates import Gates, normalise

Adapters = Mapping[str, tuple[Tensor, Tensor]]  # A [R, I] and the scaled B [O, R], by the name of the weight
Weigh = Callable[[Gates, Tensor], Tensor]  # gates and what they read [B, T, D] -> log weights [B, T, S]
Ask = Callable[[Tensor], Tensor]  # a module's input [B, T, I] -> log weights [B, T, S]


class RoutedLinear(nn.Module):
    """A linear layer and the low-rank updates of X experts."""

    def __init__(self, linear: nn.Linear, adapters: Sequence[tuple[Tensor, Tensor]], ask: Ask) -> None:
        super().__init__()
        self.linear = linear
        self.down = nn.ParameterList([nn.Parameter(a_RI, requires_grad=False) for a_RI, _ in adapters])
        self.up = nn.ParameterList([nn.Parameter(b_OR, requires_grad=False) for _, b_OR in adapters])
        self.ask = ask

    def slot_flops(self) -> list[float]:
        """Operations of each slot for a token that asks it, beside those of the plain layer."""
        return [0.0, *(2.0 * (a.numel() + b.numel()) for a, b in zip(self.down, self.up, strict=True))]

    def directions(self) -> Tensor:
        """The inputs [X, I] that the experts change most: of B A the first right singular vector (arrow)."""
        return torch.stack([_main_direction(b_OR, a_RI) for a_RI, b_OR in zip(self.down, self.up, strict=True)])

    def forward(self, u_BTI: Tensor) -> Tensor:
        """W u + sum_x w_x B_x A_x u."""
        weight_NS = self.ask(u_BTI).exp().flatten(0, -2)
        out_BTO, u_NI = self.linear(u_BTI), u_BTI.flatten(0, -2)
        if bool((weight_NS[:, 1:] > 0).all()):
            return out_BTO + self._of_all(u_NI, weight_NS).view_as(out_BTO).to(out_BTO.dtype)
        out_NO = out_BTO.flatten(0, -2)
        for slot, token_M, weight_M1 in groups(weight_NS):
            if slot:
                update_MO = F.linear(F.linear(u_NI[token_M], self.down[slot - 1]), self.up[slot - 1])
                out_NO = out_NO.index_add(0, token_M, (weight_M1 * update_MO).to(out_NO.dtype))
        return out_NO.view_as(out_BTO)

    def _of_all(self, u_NI: Tensor, weight_NS: Tensor) -> Tensor:
        """The same where every token asks every expert, in two products."""
        inner_N = F.linear(u_NI, torch.cat(list(self.down)))
        ranks = torch.tensor([len(a_RI) for a_RI in self.down], device=u_NI.device)
        inner_N = inner_N * weight_NS[:, 1:].repeat_interleave(ranks, 1)
        return F.linear(inner_N.to(u_NI.dtype), torch.cat(list(self.up), 1))


def _main_direction(b_OR: Tensor, a_RI: Tensor) -> Tensor:
    """The first right singular vector of B A, by way of a matrix of R rows."""
    triangle_RR = torch.linalg.qr(b_OR.float()).R
    return torch.linalg.svd(triangle_RR @ a_RI.float(), full_matrices=False).Vh[0]


class RoutedMLP(nn.Module):
    """The MLPs of the seed and of X experts in place of a layer's."""

    def __init__(self, seed: SwiGLU, experts: Sequence[SwiGLU], ask: Ask) -> None:
        super().__init__()
        self.slots = nn.ModuleList([seed, *experts])
        self.ask = ask

    def slot_flops(self) -> list[float]:
        """Operations of each slot for a token that asks it."""
        return [2.0 * sum(weight.numel() for weight in mlp.parameters()) for mlp in self.slots]

    def directions(self) -> Tensor:
        """The inputs [X, D] that the experts' first layers read most differently from the seed's (arrow)."""
        return torch.stack([_changed_direction(self.slots[0], expert) for expert in list(self.slots)[1:]])

    def forward(self, u_BTD: Tensor) -> Tensor:
        """sum_s w_s MLP_s(u)."""
        weight_NS, u_ND = self.ask(u_BTD).exp().flatten(0, -2), u_BTD.flatten(0, -2)
        out_ND = torch.zeros_like(u_ND)
        for slot, token_M, weight_M1 in groups(weight_NS):
            out_ND = out_ND.index_add(0, token_M, (weight_M1 * self.slots[slot](u_ND[token_M])).to(out_ND.dtype))
        return out_ND.view_as(u_BTD)


def _changed_direction(seed: nn.Module, expert: nn.Module) -> Tensor:
    changes = [getattr(expert, name).weight - getattr(seed, name).weight for name in ("gate_proj", "up_proj")]
    return torch.linalg.svd(torch.cat(changes).float(), full_matrices=False).Vh[0]


def groups(weight_NS: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Each slot that some token chose: its number, the tokens [M], and their weights [M, 1]."""
    slot_P, token_P = (weight_NS.T > 0).nonzero(as_tuple=True)  # pairs, ordered by slot
    slots, sizes = slot_P.unique_consecutive(return_counts=True)
    for slot, token_M in zip(slots.tolist(), token_P.split(sizes.tolist()), strict=True):
        yield slot, token_M, weight_NS[token_M, slot, None]


class ModuleGates(nn.Module):
    """The gates of all modules of one decoder: what they read in a pass, and what they answered."""

    def __init__(self, memory: float, end_of_text: int, weigh: Weigh) -> None:
        """`memory`: share of the past that is kept per token; `end_of_text`: id of the token before each document."""
        super().__init__()
        self.memory = memory
        self.end_of_text = end_of_text
        self.weigh = weigh
        self.gates = nn.ModuleList()
        self.by_name: dict[str, Gates] = {}
        self.asked_by: dict[str, str] = {}  # the name of the gates that each routed module asks
        self.told: dict[str, Tensor] = {}  # log weights [B, T, S] of the last pass, by the names of the gates
        self._begins_BT: Tensor | None = None
        self._read: dict[str, Tensor] | None = None

    def add(self, name: str, gates: Gates) -> None:
        """Take in the gates of a module."""
        self.by_name[name] = gates
        self.gates.append(gates)

    def asked_at(self, path: str, name: str) -> Ask:
        """What the module at `path` asks: the gates of this name, which read the input of the first that does."""
        first = name not in self.asked_by.values()
        self.asked_by[path] = name
        return partial(self.ask, name, first)

    def begin(self, ids_BT: Tensor, read: dict[str, Tensor] | None) -> None:
        """A pass over these tokens begins. `read`: what was read up to the token before, where a cache holds it."""
        self.told = {}
        self._begins_BT, self._read = ids_BT == self.end_of_text, read

    def ask(self, name: str, first: bool, u_BTI: Tensor) -> Tensor:
        """Log weights at a module; `first`: its input is what the gates of this name read."""
        if first:
            self.told[name] = self.weigh(self.by_name[name], self._reading(name, u_BTI))
        return self.told[name]

    def _reading(self, name: str, u_BTI: Tensor) -> Tensor:
        if not self.memory:
            return u_BTI
        before = None if self._read is None else self._read.get(name)
        sum_BTI = fading_sums(normalise(u_BTI), self.memory, self._begins_BT, before)
        if self._read is not None:
            self._read[name] = sum_BTI[:, -1]
        return normalise(sum_BTI)


class RoutedCache(StackCache):
    """Keys, values and what the gates have read."""

    def __init__(self, layers: int) -> None:
        super().__init__(layers)
        self.read: dict[str, Tensor] = {}


class RoutedDecoder(Decoder):
    """A frozen decoder whose modules ask experts; only its gates can be trained."""

    gates: ModuleGates

    @classmethod
    def from_parts(
        cls,
        shared: tuple[DecoderConfig, dict[str, Tensor]],
        seed: Mapping[str, Tensor],
        adapters: Sequence[Adapters],
        experts: Sequence[Mapping[str, Tensor]],
        *,
        place: Place,
        mode: GateMode,
        memory: float,
        end_of_text: int,
        tensors: Mapping[str, Tensor] | None = None,
        weigh: Weigh = Gates.training_log_weights,
    ) -> Self:
        """LoRA experts as `adapters`, or full ones as `experts`, in a decoder of the weights they share.

        `seed`: its weights, whose MLPs full experts are mixed with. `tensors`: `<name>.vectors` of every gate; without
        them gates are closed, to be trained.
        """
        decoder = cls.from_weights(*shared)
        decoder.gates = ModuleGates(memory, end_of_text, weigh)
        count = len(adapters) or len(experts)
        for path in _paths(decoder, [*adapters[0]] if adapters else None):
            parent, kind = path.rsplit(".", 1)
            module = decoder.get_submodule(path)
            name = path if place == "module" else path.split(".self_attn")[0].split(".mlp")[0]
            if name not in decoder.gates.by_name:
                width = module.in_features if isinstance(module, nn.Linear) else decoder.config.hidden_size
                vectors_XI = torch.zeros(count, width) if tensors is None else tensors[f"{name}.vectors"]
                decoder.gates.add(name, Gates(vectors_XI, None, mode).requires_grad_(tensors is None))
            ask = decoder.gates.asked_at(path, name)
            routed: nn.Module
            if isinstance(module, nn.Linear):
                routed = RoutedLinear(module, [each[f"{path}.weight"] for each in adapters], ask)
            else:
                routed = RoutedMLP(_mlp(path, seed), [_mlp(path, each) for each in experts], ask)
            setattr(decoder.get_submodule(parent), kind, routed)
        return decoder

    def new_cache(self) -> RoutedCache:
        """An empty cache for `hidden_states` and `forward`."""
        return RoutedCache(self.config.num_hidden_layers)

    def hidden_states(self, ids_BT: Tensor, cache: StackCache | None = None, depth: int | None = None) -> list[Tensor]:
        """As of a plain decoder; `gates.told` then holds the weights of this pass."""
        self.gates.begin(ids_BT, cache.read if isinstance(cache, RoutedCache) else None)
        return super().hidden_states(ids_BT, cache, depth)

    def listen(self, ids_BT: Tensor) -> dict[str, Tensor]:
        """What every gate reads [B, T, I] where no expert is asked, by name."""
        heard: dict[str, Tensor] = {}
        names = {gates: name for name, gates in self.gates.by_name.items()}
        weigh, self.gates.weigh = self.gates.weigh, partial(_of_none, names, heard)
        self.hidden_states(ids_BT)
        self.gates.weigh = weigh
        return heard

    def routed(self) -> dict[str, RoutedLinear | RoutedMLP]:
        """The routed modules, by their names."""
        found = self.model.named_modules(prefix="model")
        return {name: module for name, module in found if isinstance(module, (RoutedLinear, RoutedMLP))}

    def gate_tensors(self) -> dict[str, Tensor]:
        """What is saved: `<name>.vectors` [X, I] of every gate."""
        return {f"{name}.vectors": gates.stacked().detach() for name, gates in self.gates.by_name.items()}

    def flops_beside(self, asked: Mapping[str, Tensor]) -> float:
        """Operations per token beyond those of the plain decoder, given each gate's share of tokens by slot [S]."""
        total = sum(2.0 * sum(vector.numel() for vector in gates.vectors) for gates in self.gates.by_name.values())
        for path, module in self.routed().items():
            costs, shares = module.slot_flops(), asked[self.gates.asked_by[path]]
            total += sum(cost * float(share) for cost, share in zip(costs, shares, strict=True)) - costs[0]
        return total


def _of_none(names: Mapping[Gates, str], heard: dict[str, Tensor], gates: Gates, read_BTI: Tensor) -> Tensor:
    """Log weights [B, T, S] of the seed alone; keeps what was read under the gates' name."""
    heard[names[gates]] = read_BTI
    closed_BTX = read_BTI.new_full((*read_BTI.shape[:2], len(gates.vectors)), -torch.inf)
    return F.pad(closed_BTX, (1, 0))


def _paths(decoder: Decoder, weights: list[str] | None) -> list[str]:
    """The modules to route, in the order in which a pass reaches them: those with adapters, or every MLP."""
    if weights is None:
        return [f"model.layers.{number}.mlp" for number in range(len(decoder.model.layers))]
    names = {weight.removesuffix(".weight") for weight in weights}
    return [name for name, _ in decoder.named_modules() if name in names]


def _mlp(path: str, weights: Mapping[str, Tensor]) -> SwiGLU:
    found = {name.removeprefix(f"{path}."): tensor for name, tensor in weights.items() if name.startswith(f"{path}.")}
    inner, width = found["up_proj.weight"].shape
    with torch.device("meta"):
        mlp = SwiGLU(width, inner)
    mlp.load_state_dict(found, assign=True)
    return mlp.requires_grad_(False)
