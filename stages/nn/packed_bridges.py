"""Bridges, packed for writing: the states of one token of each of some texts read those of all active experts.

Shape letters: N texts, Q queries of a text, A active experts, X all experts, F priors per expert, C central width,
E expert width, T two (keys and values), H heads, S places of keys, W head width.

- the projections of all experts are one product
- keys of cross-attention lie in room made beforehand, and beside each lies whose it is: a prior is then looked up, and
  is a term of the score like any other
- what is computed is `stages.nn.bridges`, up to rounding
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.nn.bridges import NULL, CalmBridge, CalmCache, StitchBridge, scale_of, unit_scale, without

FIRST_ROOM = 1024  # keys; doubled whenever they are used up


def _projections(bridge: StitchBridge | CalmBridge, active: Sequence[int]) -> Tensor:
    """Of the active experts' states: [A, E, C]."""
    weights = [linear.weight.detach().T for linear in bridge.project if isinstance(linear, nn.Linear)]
    return torch.stack([weights[number] for number in active])


class PackedStitch:
    """A bridge that mixes states."""

    def __init__(self, bridge: StitchBridge, active: Sequence[int]) -> None:
        self._bridge = bridge
        self._project_AEC = _projections(bridge, active)
        self._resting = [number for number in range(len(bridge.project)) if number not in active]
        self._share_A = torch.tensor(active, device=self._project_AEC.device) + 1

    def read(self, x_NQC: Tensor, state_ANE: Tensor, prior_NXF: Tensor) -> Tensor:
        """The mixed states; of a text all queries have seen the same token last, at which the experts' states are."""
        share_NQX = self._bridge.shares(x_NQC, prior_NXF[:, None], self._resting)
        read_ANC = torch.bmm(state_ANE if self._bridge.before_head else unit_scale(state_ANE), self._project_AEC)
        own_NQ1, share_ANQ1 = share_NQX[..., :1], share_NQX[..., self._share_A].movedim(-1, 0)[..., None]
        if not self._bridge.before_head:
            share_ANQ1 = share_ANQ1 * scale_of(x_NQC)
        return own_NQ1 * x_NQC + (share_ANQ1 * read_ANC[:, :, None]).sum(0)


class PackedCalm:
    """A bridge of cross-attention, and what up to `texts` texts have for it to read."""

    def __init__(self, bridge: CalmBridge, active: Sequence[int], texts: int) -> None:
        self._bridge = bridge
        self._project_AEC = _projections(bridge, active)
        self._kv_CD = torch.cat([bridge.k_proj.weight.detach(), bridge.v_proj.weight.detach()]).T.contiguous()
        self._experts = len(bridge.project)
        self._resting = [number for number in range(self._experts) if number not in active]
        device = self._kv_CD.device
        self._active_A = torch.tensor(active, device=device)
        self._counts = [0] * texts
        heads, width = bridge.null_HC.shape
        self._kv_NTHSW = self._kv_CD.new_zeros((texts, 2, heads, FIRST_ROOM, width))
        self._end_NS = torch.zeros((texts, FIRST_ROOM), dtype=torch.long, device=device)
        self._expert_NS = torch.zeros_like(self._end_NS)  # the null key has a number of its own, after all experts'

    def take(self, text: int, cache: CalmCache | None) -> None:
        """Have what is in the cache of one text."""
        if cache is None or cache.k_BHKW is None or cache.v_BHKW is None or cache.end_K is None:
            self._kv_NTHSW[text, 0, :, 0], self._kv_NTHSW[text, 1, :, 0] = self._bridge.null_HC, 0.0
            self._end_NS[text, 0], self._expert_NS[text, 0], self._counts[text] = NULL, self._experts, 1
            return
        count, width = len(cache.end_K), self._kv_NTHSW.shape[-1]
        self._counts[text] = count
        self._make(count)
        self._kv_NTHSW[text, 0, :, :count] = cache.k_BHKW[0, ..., :width]
        self._kv_NTHSW[text, 1, :, :count] = cache.v_BHKW[0, ..., :width]
        name_KX = F.pad(cache.k_BHKW[0, 0, :, width:], (0, 1), value=0.5)
        self._end_NS[text, :count], self._expert_NS[text, :count] = cache.end_K, name_KX.argmax(-1)

    def give_back(self, text: int, cache: CalmCache) -> None:
        """Have a cache hold what a text has."""
        count = self._counts[text]
        k_HKW, v_HKW = self._kv_NTHSW[text, :, :, :count]
        name_KX = F.one_hot(self._expert_NS[text, :count], self._experts + 1)[:, :-1].to(k_HKW.dtype)
        cache.k_BHKW = torch.cat([k_HKW, name_KX.expand(len(k_HKW), -1, -1)], -1)[None]
        cache.v_BHKW = F.pad(v_HKW, (0, self._experts))[None]
        cache.end_K = self._end_NS[text, :count].clone()

    def move(self, source: int, target: int) -> None:
        """Put what one text has in the place of another."""
        for each in (self._kv_NTHSW, self._end_NS, self._expert_NS):
            each[target] = each[source]
        self._counts[target] = self._counts[source]

    def remember(self, state_ANE: Tensor, place_N: Tensor) -> None:
        """Add the experts' states at one more token of each text, of index `place_N`."""
        experts, texts, _ = state_ANE.shape
        self._make(max(self._counts[:texts]) + experts)
        state_ANC = torch.bmm(unit_scale(state_ANE), self._project_AEC)
        kv_ANTHW = (state_ANC @ self._kv_CD).view(experts, texts, 2, *self._bridge.null_HC.shape)
        text_N1 = torch.arange(texts, device=place_N.device)[:, None]
        slot_NA = place_N.new_tensor(self._counts[:texts])[:, None] + torch.arange(experts, device=place_N.device)
        self._kv_NTHSW[text_N1, :, :, slot_NA] = kv_ANTHW.transpose(0, 1)
        self._end_NS[text_N1, slot_NA] = place_N[:, None]
        self._expert_NS[text_N1, slot_NA] = self._active_A
        self._counts[:texts] = [count + experts for count in self._counts[:texts]]

    def read(self, x_NQC: Tensor, texts: slice, place_N: Tensor, prior_NXF: Tensor) -> Tensor:
        """The states, which have seen the tokens up to `place_N`, with what they read added."""
        bridge, counts = self._bridge, self._counts[texts]
        longest = max(counts)
        prior_NX = without(without(bridge.prior(prior_NXF), self._resting).log_softmax(-1), self._resting)
        end_NS, expert_NS = self._end_NS[texts, :longest], self._expert_NS[texts, :longest]
        bias_NS = F.pad(prior_NX, (0, 1)).gather(1, expert_NS)
        if min(counts) < longest:
            slot_S = torch.arange(longest, device=end_NS.device)
            bias_NS = bias_NS.masked_fill(slot_S >= end_NS.new_tensor(counts)[:, None], -math.inf)
        distance_NS = (place_N[:, None] - end_NS).masked_fill(end_NS == NULL, 0)
        bias_NHS = bias_NS[:, None] - bridge.slope_H[:, None] * distance_NS[:, None]
        q_NHQW = bridge.q_proj(unit_scale(x_NQC)).unflatten(-1, (bridge.heads, -1)).transpose(1, 2)
        k_NHSW, v_NHSW = self._kv_NTHSW[texts, :, :, :longest].unbind(1)
        found_NHQW = F.scaled_dot_product_attention(q_NHQW, k_NHSW, v_NHSW, bias_NHS[:, :, None])
        read_NQC = bridge.o_proj(found_NHQW.transpose(1, 2).flatten(2))
        return x_NQC + bridge.open * scale_of(x_NQC) * read_NQC

    def _make(self, keys: int) -> None:
        """Have space for so many keys."""
        room = self._end_NS.shape[1]
        if keys <= room:
            return
        while room < keys:
            room *= 2
        more = room - self._end_NS.shape[1]
        self._kv_NTHSW = F.pad(self._kv_NTHSW, (0, 0, 0, more))
        self._end_NS, self._expert_NS = F.pad(self._end_NS, (0, more)), F.pad(self._expert_NS, (0, more))
