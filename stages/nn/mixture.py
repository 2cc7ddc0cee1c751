"""Mixing the probabilities of several models, token by token, and the posteriors of Branch-Train-Merge.

Shape letters: N tokens in the order of the text, X models.
"""

import numpy as np
import torch
from scipy.signal import lfilter
from torch import Tensor


def mixed_log_probs(log_weight_NX: Tensor, log_prob_NX: Tensor) -> Tensor:
    """Log of sum_x weight_x p_x for each token [N]: probabilities are mixed, not logits."""
    return (log_weight_NX + log_prob_NX).logsumexp(-1)


def posterior_log_weights(log_prob_NX: Tensor, forgetting: float = 1.0) -> Tensor:
    """Posterior over models given the tokens before each one [N, X], from a uniform prior; one document.

    `forgetting` 1 is Bayes' rule (Li et al. 2022, section 2.3); below 1 evidence fades by that factor per token, so
    that the posterior can follow a text that changes its domain.
    """
    # e[0] = 0, e[t] = forgetting * (e[t-1] + log_prob[t-1]): a filter of first order, in float64.
    evidence_NX = lfilter([0.0, forgetting], [1.0, -forgetting], log_prob_NX.double().numpy(), axis=0)
    return torch.from_numpy(evidence_NX).log_softmax(-1).to(log_prob_NX.dtype)


def oracle_log_weights(log_prob_NX: Tensor) -> Tensor:
    """All weight on the model that is best over these tokens in hindsight [N, X]: a bound, for one document."""
    log_weight_NX = torch.full_like(log_prob_NX, -torch.inf)
    log_weight_NX[:, log_prob_NX.sum(0).argmax()] = 0.0
    return log_weight_NX


def mean_models_run(used_NX: np.ndarray, segment_starts: np.ndarray) -> float:
    """How many models run per token, when a model that joins late first catches up on its segment.

    `used_NX`: which models are asked at each token. A model asked last at token t of a segment has read all tokens
    up to t, for its cache must have no holes; so skipping it only pays after its last use.
    """
    count = len(used_NX)
    ends = np.append(segment_starts[1:], count)
    run = 0
    for start, end in zip(segment_starts, ends, strict=True):
        used = used_NX[start:end]
        last = (end - start) - used[::-1].argmax(0)
        run += int(np.where(used.any(0), last, 0).sum())
    return run / count
