"""How sharply the text, and the evidence of the experts themselves, should choose among experts: fitted on some tokens.

Shape letters: N tokens in the order of the text, X models.

- one number each, searched on a grid and again between the neighbours of the best: the loss need not be convex, and
  two per cent are near enough
- the tokens must be others than those the mixture is judged by
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from schemas.evaluate_models import FittedRouting
from stages.nn.mixture import mixed_log_probs, posterior_log_weights

TEMPERATURES = (1e-3, 10.0)  # squared distances of unit vectors are at most 4
FADINGS = (1e-4, 0.99)  # of evidence per token: one less the forgetting factor
POINTS = 41  # of each grid


def fit_routing(
    distance_NX: Tensor, documents: Sequence[Tensor], temperature: float, forgetting: float
) -> FittedRouting:
    """Fit both numbers and compare them with those given.

    `documents`: log-probabilities [tokens, X] that the experts give to each document; `distance_NX`: of all these
    tokens, such that cBTM's weights are softmax(-distance / temperature).
    """
    scores_NX = torch.cat(list(documents)).double()
    tokens = len(scores_NX)

    def loss_at(temperature: float) -> float:
        weights = (-distance_NX.double() / temperature).log_softmax(-1)
        return -float(mixed_log_probs(weights, scores_NX).sum()) / tokens

    def loss_with(fading: float) -> float:
        mixed = (mixed_log_probs(posterior_log_weights(each, 1 - fading), each) for each in documents)
        return -sum(float(each.double().sum()) for each in mixed) / tokens

    fitted, faded = _best(loss_at, *TEMPERATURES), _best(loss_with, *FADINGS)
    faded = faded if loss_with(faded) < loss_with(0.0) else 0.0  # nothing forgotten: Bayes' rule
    return FittedRouting(
        temperature=fitted,
        forgetting=1 - faded,
        documents=len(documents),
        tokens=tokens,
        gain=loss_at(temperature) - loss_at(fitted),
        forgetting_gain=loss_with(1 - forgetting) - loss_with(faded),
    )


def _best(loss: Callable[[float], float], low: float, high: float) -> float:
    """Where between `low` and `high` the loss is smallest."""
    for _ in range(2):
        points = torch.logspace(math.log10(low), math.log10(high), POINTS, dtype=torch.float64).tolist()
        losses = [loss(point) for point in points]
        best = losses.index(min(losses))
        low, high = points[max(0, best - 1)], points[min(POINTS - 1, best + 1)]
    return points[best]
