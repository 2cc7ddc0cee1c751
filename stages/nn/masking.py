"""Attention under a mask that positions decide, without ever holding a mask of all queries and all keys.

Shape letters: B batch, T new positions, S all positions so far, H query heads, K key/value heads, E head width.

- a key is allowed when its position is not after the query's and, with a window, not `window` or more before it
- some queries take their turn at a time, with the keys they can reach: memory grows with S, not with T times S, and
  with a window so does time
- few queries share one mask, as a block of its own would be no smaller
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

UNCUT = 256  # queries that share one mask; more take turns
SMALLEST = 64  # queries that a narrow window makes a block of: fewer, and starting the kernel costs more than they do


def causal_mask(query_end_T: Tensor, key_end_S: Tensor, window: int | None = None) -> Tensor:
    """Boolean [T, S]: key allowed iff its end is not after the query's, and within the window."""
    known_TS = query_end_T[:, None] >= key_end_S
    return known_TS if window is None else known_TS & (query_end_T[:, None] < key_end_S + window)


def attend(q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask_TS: Tensor | None) -> Tensor:
    """What queries find among keys [B, H, T, E]; without a mask, the plain causal kernel's."""
    grouped = q_BHTE.shape[1] != k_BKSE.shape[1]
    return F.scaled_dot_product_attention(
        q_BHTE, k_BKSE, v_BKSE, attn_mask=mask_TS, is_causal=mask_TS is None, enable_gqa=grouped
    )


class Blocks:
    """Attention of many positions under a mask: some queries at a time, with the keys these can reach."""

    def __init__(self, position_T: Tensor, position_S: Tensor, window: int | None, per_position: int) -> None:
        """All lengths are found from shapes, so that nothing waits for the device: see `View` for the arguments."""
        reach = None if window is None else window * per_position - 1  # keys before its own that a query may see
        size = UNCUT if reach is None else min(UNCUT, max(SMALLEST, reach))
        self.size = -(-size // per_position) * per_position  # what shares a position is not parted
        self.back = None if reach is None else -(-reach // self.size)  # blocks of keys before the queries' own
        self.before = len(position_S) - len(position_T)
        self.window = window
        self.position_T, self.position_S = position_T, position_S

    def attend(self, q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor) -> Tensor:
        """[B, H, T, E]."""
        blocks = zip(
            self.position_T.split(self.size),
            self._within_reach(self.position_S, 0),
            q_BHTE.split(self.size, 2),
            self._within_reach(k_BKSE, 2),
            self._within_reach(v_BKSE, 2),
            strict=True,
        )
        out = [attend(q, k, v, causal_mask(ends, key_ends, self.window)) for ends, key_ends, q, k, v in blocks]
        return torch.cat(out, 2)

    def _within_reach(self, x: Tensor, axis: int) -> Iterator[Tensor]:
        """What each block of queries may see of the keys, or of what lies along them."""
        sizes = [len(block) for block in self.position_T.split(self.size)]
        if self.back is None:
            yield from (x.narrow(axis, 0, self.before + sum(sizes[: number + 1])) for number in range(len(sizes)))
            return
        # Cut once: the gradient of a slice is as long as what it was cut from, and there are many of them.
        pieces = x.split([self.before, *sizes], axis)
        for own in range(1, len(pieces)):
            yield torch.cat(pieces[max(0, own - self.back) : own + 1], axis)
