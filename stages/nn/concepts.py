"""Concepts: what a group of tokens is about, predicted groups ahead, and read as a plan.

Shape letters: B batch, T tokens, G group length, M groups, K latents per group, D model width, H horizon.

- the concept of a group is the normalised sum of its tokens' embeddings
- the plan is predicted from groups that are complete. Ground truth is only ever a regression target, detached, and no
  token reads it: a true plan of the group ahead would tell every token its own successor
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.nn.attention import RMSNorm
from stages.nn.latents import GroupAttention, grouped, ungrouped


class ConceptHeads(nn.Module):
    """From the latents of group m, one prediction for each of the concepts m + 1 ... m + H."""

    def __init__(self, width: int, latents: int, horizon: int) -> None:
        super().__init__()
        self.horizon = horizon
        self.predict = nn.Linear(latents * width, horizon * width, bias=False)

    def forward(self, latent_BMKD: Tensor) -> Tensor:
        """[B, M, H, D], of any length; only the direction counts."""
        return self.predict(latent_BMKD.flatten(2)).unflatten(-1, (self.horizon, -1))


class PlanReader(nn.Module):
    """The tokens of a group attend to the plan that the group before it made."""

    def __init__(self, width: int, heads: int, horizon: int, length: int, eps: float) -> None:
        super().__init__()
        self.length = length
        self.distance_HD = nn.Parameter(torch.zeros(horizon, width))
        self.norm = RMSNorm(width, eps)
        self.attention = GroupAttention(width, heads)

    def forward(self, x_BTD: Tensor, start: int, plan_BMHD: Tensor) -> Tensor:
        """[B, T, D] to be added to the tokens; `plan_BMHD[:, 0]` is for the group of token `start`."""
        x_BMGD = grouped(self.norm(x_BTD), start, self.length)
        plan_BMHD = F.normalize(plan_BMHD, dim=-1) * plan_BMHD.shape[-1] ** 0.5 + self.distance_HD
        return ungrouped(self.attention(x_BMGD, plan_BMHD[:, : x_BMGD.shape[1]]), start, x_BTD.shape[1])


def concepts_of(embedded_BTD: Tensor, length: int) -> Tensor:
    """Concepts [B, M, D] of the complete groups among embedded tokens: of length one, detached, fp32."""
    groups = embedded_BTD.shape[1] // length
    group_BMGD = embedded_BTD[:, : groups * length].detach().float().unflatten(1, (groups, length))
    return F.normalize(group_BMGD.sum(2), dim=-1)


def concept_loss(prediction_BMHD: Tensor, concept_BMD: Tensor, kind: Literal["cosine", "mse"]) -> Tensor:
    """Mean over the predictions whose group is complete: 1 - cosine, or the squared distance to the unit vector.

    Zero when no group ahead is complete.
    """
    groups, horizon = concept_BMD.shape[1], prediction_BMHD.shape[2]
    total, count = prediction_BMHD.float().sum() * 0, 0  # in the graph even when there is nothing to compare
    for ahead in range(1, min(horizon, groups - 1) + 1):
        made_BMD = prediction_BMHD[:, : groups - ahead, ahead - 1].float()
        true_BMD = concept_BMD[:, ahead : ahead + made_BMD.shape[1]]
        if kind == "cosine":
            error_BM = 1 - F.cosine_similarity(made_BMD, true_BMD, dim=-1)
        else:
            error_BM = (made_BMD - true_BMD).square().sum(-1)
        total, count = total + error_BM.sum(), count + error_BM.numel()
    return total / max(count, 1)
