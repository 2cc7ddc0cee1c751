"""Does a model see what it is to predict? Compare its predictions with those from the true prefix alone."""

from collections.abc import Callable

import torch
from torch import Tensor


@torch.no_grad()
def gap_to_prefix(forward: Callable[[Tensor], Tensor], ids_BT: Tensor) -> float:
    """Largest change of a log-probability, in nats, when `forward` is not given the rest of the text.

    Zero up to rounding for a causal model; a loss measured with the rest in view is worth nothing otherwise.
    """
    length = ids_BT.shape[1]
    whole_BTV = forward(ids_BT).float().log_softmax(-1)
    gaps = [0.0]
    for prefix in sorted({1, length // 3, length // 2, length - 1} - {0}):
        alone_BV = forward(ids_BT[:, :prefix])[:, -1].float().log_softmax(-1)
        gaps.append(float((alone_BV - whole_BTV[:, prefix - 1]).abs().max()))
    return max(gaps)
