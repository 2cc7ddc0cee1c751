"""Between a level and what it groups: groups of fixed length reduced to latents, and latents handed back.

What is grouped is called tokens here; above the first level it is the latents of the level below.

Shape letters: B batch, T new tokens, G group length, M groups, K latents per group, C token width, D latent width,
Q queries of a group, S states a group attends to, H heads, E head width.

- the group length never depends on T, so a prefix has the same groups whatever follows it
- a chunk of tokens may begin and end inside a group: `grouped` pads both ends to whole groups. Padding is only ever
  a query, never a key, and is cut away again, so chunks of any size give what the whole sequence gives
- the two widths may differ: the projections of an attention bridge them, and a linear map where there is none
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.nn.attention import RMSNorm


def grouped(x_BTC: Tensor, start: int, length: int) -> Tensor:
    """Tokens from index `start` on as [B, M, G, C], the ends padded with zeros to whole groups."""
    front = start % length
    back = -(front + x_BTC.shape[1]) % length
    return F.pad(x_BTC, (0, 0, front, back)).unflatten(1, (-1, length))


def ungrouped(x_BMGC: Tensor, start: int, tokens: int) -> Tensor:
    """The inverse of `grouped`: [B, T, C] without the padding."""
    front = start % x_BMGC.shape[2]
    return x_BMGC.flatten(1, 2)[:, front : front + tokens]


class GroupAttention(nn.Module):
    """Every query of a group attends to all states given for that group, and to nothing else."""

    def __init__(self, width: int, heads: int, state_width: int) -> None:
        """`width`: of the queries and of what they get."""
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(state_width, width, bias=False)
        self.v_proj = nn.Linear(state_width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x_BMQD: Tensor, state_BMSC: Tensor) -> Tensor:
        """[B, M, Q, D]: what each query took from the states of its group."""
        q, k, v = (
            projection(states).flatten(0, 1).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection, states in (
                (self.q_proj, x_BMQD),
                (self.k_proj, state_BMSC),
                (self.v_proj, state_BMSC),
            )
        )
        out = F.scaled_dot_product_attention(q, k, v)  # [B * M, H, Q, E]
        return self.o_proj(out.transpose(1, 2).flatten(2)).unflatten(0, x_BMQD.shape[:2])


class Reducer(nn.Module):
    """The states of a complete group to its K latents.

    `perceiver`: K learned queries attend to the group (Jaegle et al. 2021). `last-k`: its last K states, which have
    seen the rest of the group through the layers below. Either way each slot has a learned vector of its own, as all
    latents of a group share one position.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        latents: int,
        kind: Literal["perceiver", "last-k"],
        eps: float,
        token_width: int,
    ) -> None:
        """`width`, `heads`: of the latents."""
        super().__init__()
        self.latents = latents
        self.slot_KD = nn.Parameter(torch.zeros(latents, width))
        if kind == "perceiver":
            self.norm = RMSNorm(token_width, eps)
            self.attention = GroupAttention(width, heads, token_width)
        else:
            self.widen = _between(token_width, width)
        self.kind = kind

    def forward(self, x_BMGC: Tensor) -> Tensor:
        """[B, M, K, D]."""
        if self.kind == "last-k":
            return self.widen(x_BMGC[:, :, -self.latents :]) + self.slot_KD
        slot_BMKD = self.slot_KD.expand(*x_BMGC.shape[:2], -1, -1)
        return slot_BMKD + self.attention(slot_BMKD, self.norm(x_BMGC))


class Upsampler(nn.Module):
    """What the tokens of a group receive from the latents of the group before it.

    `repeat`: token p of G gets latent floor(p K / G). `attention`: it attends to all K of them (the attention
    upsampling of Nawrot et al. 2021, from the tokens' side). Both know the token's place in its group.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        latents: int,
        length: int,
        kind: Literal["repeat", "attention"],
        eps: float,
        latent_width: int,
    ) -> None:
        """`width`, `heads`: of the tokens."""
        super().__init__()
        self.length = length
        self.place_GD = nn.Parameter(torch.zeros(length, width))  # as wide as the tokens
        self.latent_of_place = [place * latents // length for place in range(length)]
        self.kind = kind
        if kind == "attention":
            self.norm = RMSNorm(width, eps)
            self.attention = GroupAttention(width, heads, latent_width)
        else:
            self.narrow = _between(latent_width, width)
            self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x_BTC: Tensor, start: int, memory_BMKD: Tensor) -> Tensor:
        """[B, T, C] to be added to the tokens; `memory_BMKD[:, 0]` is for the group of token `start`."""
        groups = (start % self.length + x_BTC.shape[1] - 1) // self.length + 1  # that the tokens lie in
        memory_BMKD = memory_BMKD[:, :groups]
        if self.kind == "attention":
            x_BMGC = grouped(self.norm(x_BTC), start, self.length)
            out_BMGC = self.attention(x_BMGC + self.place_GD, memory_BMKD)
        else:
            out_BMGC = self.repeated(memory_BMKD)
        return ungrouped(out_BMGC, start, x_BTC.shape[1])

    def repeated(self, memory_BMKD: Tensor) -> Tensor:
        """What `repeat` gives to each place of a group: [B, M, G, C]."""
        return self.o_proj(self.narrow(memory_BMKD)[..., self.latent_of_place, :] + self.place_GD)


def _between(width: int, other: int) -> nn.Module:
    """A linear map to another width, or nothing to the same."""
    return nn.Identity() if width == other else nn.Linear(width, other, bias=False)
