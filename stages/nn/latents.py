"""Between tokens and latents: groups of fixed length reduced to latents, and latents handed back to tokens.

Shape letters: B batch, T new tokens, G group length, M groups, K latents per group, D model width, Q queries of a
group, S states a group attends to, H heads, E head width.

- the group length never depends on T, so a prefix has the same groups whatever follows it
- a chunk of tokens may begin and end inside a group: `grouped` pads both ends to whole groups. Padding is only ever
  a query, never a key, and is cut away again, so chunks of any size give what the whole sequence gives
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.nn.attention import RMSNorm


def grouped(x_BTD: Tensor, start: int, length: int) -> Tensor:
    """Tokens from index `start` on as [B, M, G, D], the ends padded with zeros to whole groups."""
    front = start % length
    back = -(front + x_BTD.shape[1]) % length
    return F.pad(x_BTD, (0, 0, front, back)).unflatten(1, (-1, length))


def ungrouped(x_BMGD: Tensor, start: int, tokens: int) -> Tensor:
    """The inverse of `grouped`: [B, T, D] without the padding."""
    front = start % x_BMGD.shape[2]
    return x_BMGD.flatten(1, 2)[:, front : front + tokens]


class GroupAttention(nn.Module):
    """Every query of a group attends to all states given for that group, and to nothing else."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x_BMQD: Tensor, state_BMSD: Tensor) -> Tensor:
        """[B, M, Q, D]: what each query took from the states of its group."""
        q, k, v = (
            projection(states).flatten(0, 1).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection, states in (
                (self.q_proj, x_BMQD),
                (self.k_proj, state_BMSD),
                (self.v_proj, state_BMSD),
            )
        )
        out = F.scaled_dot_product_attention(q, k, v)  # [B * M, H, Q, E]
        return self.o_proj(out.transpose(1, 2).flatten(2)).unflatten(0, x_BMQD.shape[:2])


class Reducer(nn.Module):
    """The states of a complete group to its K latents.

    `perceiver`: K learned queries attend to the group (Jaegle et al. 2021). `last-k`: its last K states, which have
    seen the rest of the group through the token layers. Either way each slot has a learned vector of its own, as all
    latents of a group share one position.
    """

    def __init__(self, width: int, heads: int, latents: int, kind: Literal["perceiver", "last-k"], eps: float) -> None:
        super().__init__()
        self.latents = latents
        self.slot_KD = nn.Parameter(torch.zeros(latents, width))
        if kind == "perceiver":
            self.norm = RMSNorm(width, eps)
            self.attention = GroupAttention(width, heads)
        self.kind = kind

    def forward(self, x_BMGD: Tensor) -> Tensor:
        """[B, M, K, D]."""
        if self.kind == "last-k":
            return x_BMGD[:, :, -self.latents :] + self.slot_KD
        slot_BMKD = self.slot_KD.expand(*x_BMGD.shape[:2], -1, -1)
        return slot_BMKD + self.attention(slot_BMKD, self.norm(x_BMGD))


class Upsampler(nn.Module):
    """What the tokens of a group receive from the latents of the group before it.

    `repeat`: token p of G gets latent floor(p K / G). `attention`: it attends to all K of them (the attention
    upsampling of Nawrot et al. 2021, from the tokens' side). Both know the token's place in its group.
    """

    def __init__(
        self, width: int, heads: int, latents: int, length: int, kind: Literal["repeat", "attention"], eps: float
    ) -> None:
        super().__init__()
        self.length = length
        self.place_GD = nn.Parameter(torch.zeros(length, width))
        self.latent_of_place = [place * latents // length for place in range(length)]
        self.kind = kind
        if kind == "attention":
            self.norm = RMSNorm(width, eps)
            self.attention = GroupAttention(width, heads)
        else:
            self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x_BTD: Tensor, start: int, memory_BMKD: Tensor) -> Tensor:
        """[B, T, D] to be added to the tokens; `memory_BMKD[:, 0]` is for the group of token `start`."""
        groups = (start % self.length + x_BTD.shape[1] - 1) // self.length + 1  # that the tokens lie in
        memory_BMKD = memory_BMKD[:, :groups]
        if self.kind == "attention":
            x_BMGD = grouped(self.norm(x_BTD), start, self.length)
            out_BMGD = self.attention(x_BMGD + self.place_GD, memory_BMKD)
        else:
            out_BMGD = self.o_proj(memory_BMKD[:, :, self.latent_of_place] + self.place_GD)
        return ungrouped(out_BMGD, start, x_BTD.shape[1])
