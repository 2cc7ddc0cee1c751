"""The ways to weigh experts that are compared without anything being trained for it.

Shape letters: N tokens in the order of the text, X experts.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from stages.nn.mixture import oracle_log_weights, posterior_log_weights


def ensembles(
    documents: Sequence[Tensor],
    routed: Callable[[int | None, float], Tensor],
    counts: Sequence[int | None],
    sharpness: Sequence[tuple[str, float, float]],
) -> Iterator[tuple[str, Tensor]]:
    """Names and log weights [N, X] of all ensembles.

    `documents`: log-probabilities [tokens, X] of each. `routed(top_k, temperature)`: cBTM's log weights [N, X];
    `counts`: the values of top_k, None for all. `sharpness`: marks of rows, with cBTM's temperature and the factor by
    which the posterior forgets.
    """
    yield "oracle expert per document", torch.cat([oracle_log_weights(each) for each in documents])
    yield "uniform ensemble", torch.cat([torch.zeros_like(each).log_softmax(-1) for each in documents])
    yield "Bayes posterior", torch.cat([posterior_log_weights(each) for each in documents])
    for mark, temperature, forgetting in sharpness:
        for top_k in counts:
            top = "all" if top_k is None else f"top-{top_k}"
            yield f"cBTM {top}{mark}", routed(top_k, temperature)
        yield f"forgetting posterior{mark}", torch.cat([posterior_log_weights(each, forgetting) for each in documents])
