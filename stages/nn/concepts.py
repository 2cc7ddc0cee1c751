"""Concepts: what a group of tokens is about, predicted groups ahead, and read as a plan.

What reads a plan is called tokens here; above the first level it is the latents of the level below.

Shape letters: B batch, T tokens, G group length, M groups, K latents per group, C token width, D latent width,
E concept width (the embeddings'), H horizon.

- the concept of a group is the normalised sum of its tokens' embeddings; of a group of groups, that of their concepts
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

    def __init__(self, width: int, latents: int, horizon: int, concept_width: int) -> None:
        super().__init__()
        self.horizon = horizon
        self.predict = nn.Linear(latents * width, horizon * concept_width, bias=False)

    def forward(self, latent_BMKD: Tensor) -> Tensor:
        """[B, M, H, E], of any length; only the direction counts."""
        return self.predict(latent_BMKD.flatten(2)).unflatten(-1, (self.horizon, -1))


class PlanReader(nn.Module):
    """The tokens of a group attend to the plan that the group before it made."""

    def __init__(self, width: int, heads: int, horizon: int, length: int, eps: float, concept_width: int) -> None:
        """`width`, `heads`: of the tokens."""
        super().__init__()
        self.length = length
        self.distance_HD = nn.Parameter(torch.zeros(horizon, concept_width))
        self.norm = RMSNorm(width, eps)
        self.attention = GroupAttention(width, heads, concept_width)

    def forward(self, x_BTC: Tensor, start: int, plan_BMHE: Tensor) -> Tensor:
        """[B, T, C] to be added to the tokens; `plan_BMHE[:, 0]` is for the group of token `start`."""
        x_BMGC = grouped(self.norm(x_BTC), start, self.length)
        plan_BMHE = self.states(plan_BMHE)
        return ungrouped(self.attention(x_BMGC, plan_BMHE[:, : x_BMGC.shape[1]]), start, x_BTC.shape[1])

    def states(self, plan_BMHE: Tensor) -> Tensor:
        """What is attended to: the concepts at one length, each with its distance."""
        return F.normalize(plan_BMHE, dim=-1) * plan_BMHE.shape[-1] ** 0.5 + self.distance_HD


def concepts_of(embedded_BTE: Tensor, length: int) -> Tensor:
    """Concepts [B, M, E] of the complete groups among embedded tokens, or concepts: of length one, detached, fp32."""
    groups = embedded_BTE.shape[1] // length
    group_BMGE = embedded_BTE[:, : groups * length].detach().float().unflatten(1, (groups, length))
    return F.normalize(group_BMGE.sum(2), dim=-1)


def concept_loss(prediction_BMHE: Tensor, concept_BME: Tensor, kind: Literal["cosine", "mse", "both"]) -> Tensor:
    """Mean over the predictions whose group is complete: 1 - cosine, the squared distance to the unit vector, or both.

    For the distance a prediction counts as sqrt(E) times too long: its features are of the size of normed states, and
    the distance would be E times the cosine's error. Zero when no group ahead is complete.
    """
    groups, horizon = concept_BME.shape[1], prediction_BMHE.shape[2]
    total, count = prediction_BMHE.float().sum() * 0, 0  # in the graph even when there is nothing to compare
    for ahead in range(1, min(horizon, groups - 1) + 1):
        made_BME = prediction_BMHE[:, : groups - ahead, ahead - 1].float()
        true_BME = concept_BME[:, ahead : ahead + made_BME.shape[1]]
        if kind == "mse":
            error_BM = _squared_distance(made_BME, true_BME)
        else:
            error_BM = 1 - F.cosine_similarity(made_BME, true_BME, dim=-1)
            if kind == "both":
                error_BM = error_BM + _squared_distance(made_BME, true_BME)
        total, count = total + error_BM.sum(), count + error_BM.numel()
    return total / max(count, 1)


def _squared_distance(made_BME: Tensor, true_BME: Tensor) -> Tensor:
    return (made_BME / made_BME.shape[-1] ** 0.5 - true_BME).square().sum(-1)


def latent_loss(expected_BMKD: Tensor, latent_BMKD: Tensor) -> Tensor:
    """1 - cosine between what each group expects of the next group's latents and those, which are left alone.

    Mirasol3B's (Piergiovanni et al. 2023, section 3.3). Zero for less than two groups.
    """
    if expected_BMKD.shape[1] < 2:
        return expected_BMKD.float().sum() * 0
    true_BMKD = latent_BMKD[:, 1:].detach().float()
    return 1 - F.cosine_similarity(expected_BMKD[:, :-1].float(), true_BMKD, dim=-1).mean()
