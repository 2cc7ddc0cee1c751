"""Sums over the past in which what is older counts less: y_t = x_t + fading · y_{t-1}.

Shape letters: B batch, T and S tokens, C tokens of a chunk, W width of what is summed.

- a chunk at a time, as one product with a triangle of powers: no step by step, and memory does not grow with T²
- a document does not see the one before it, where it is told which tokens begin one
"""

import torch
from torch import Tensor

CHUNK = 512  # tokens


def fading_sums(
    x_BTW: Tensor, fading: float, begins_BT: Tensor | None = None, before_BW: Tensor | None = None
) -> Tensor:
    """y [B, T, W] in fp32, also under autocast. Fading 0 gives x back, 1 plain sums.

    `begins_BT`: true where a document begins, whose sum begins anew. `before_BW`: y of the token before the first, when
    the text was read up to there earlier.
    """
    begins_BT = torch.zeros_like(x_BTW[..., 0], dtype=torch.bool) if begins_BT is None else begins_BT
    sums = []
    with torch.autocast(x_BTW.device.type, enabled=False):
        for x_BCW, begins_BC in zip(x_BTW.float().split(CHUNK, 1), begins_BT.split(CHUNK, 1), strict=True):
            sums.append(_of_chunk(x_BCW, fading, begins_BC, before_BW))
            before_BW = sums[-1][:, -1]
    return torch.cat(sums, 1)


def _of_chunk(x_BCW: Tensor, fading: float, begins_BC: Tensor, before_BW: Tensor | None) -> Tensor:
    age_C = torch.arange(x_BCW.shape[1], device=x_BCW.device, dtype=torch.float32)
    age_CS = age_C[:, None] - age_C
    power_CS = torch.where(age_CS >= 0, fading ** age_CS.clamp(min=0), 0.0)
    document_BC = begins_BC.cumsum(1)
    power_BCS = power_CS * (document_BC[:, :, None] == document_BC[:, None])
    sum_BCW = power_BCS @ x_BCW
    if before_BW is None:
        return sum_BCW
    power_BC = fading ** (age_C + 1) * (document_BC == 0)
    return sum_BCW + power_BC[..., None] * before_BW[:, None]
