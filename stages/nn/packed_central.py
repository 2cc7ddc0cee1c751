"""The central model, packed for writing: one token of each of some texts at a time.

Shape letters: N texts, Q queries of a text, C token width, E width of what is read, G group length, S states that stand
for a group (latents, or concepts ahead), T two (keys and values), H heads, W head width, M model (one), V vocabulary.

- token layers are stacks of one model (`stages.nn.packed_stack`)
- latents and plan of the last complete group do not change inside a group: what tokens attend to is made once
- what becomes of a complete group is for `stages.nn.levels` to say, a text at a time, as texts complete theirs at
  different steps
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.nn.central import CentralCache, CentralModel, token_site
from stages.nn.latents import GroupAttention
from stages.nn.packed_stack import PackedStack, Step

SiteRead = Callable[[str, Tensor, slice], Tensor]  # site, states [N, Q, C] and whose they are -> states


class GroupKeys:
    """What the tokens of a group attend to: of each text, keys and values of a few states."""

    def __init__(self, attention: GroupAttention, texts: int, states: int) -> None:
        self._attention = attention
        width = attention.q_proj.in_features
        self._kv_TNHSW = attention.q_proj.weight.new_zeros(
            (2, texts, attention.heads, states, width // attention.heads)
        )

    def put(self, text: int, state_SE: Tensor) -> None:
        """The states of a text's last complete group."""
        for kv_NHSW, projection in zip(self._kv_TNHSW, (self._attention.k_proj, self._attention.v_proj), strict=True):
            kv_NHSW[text] = projection(state_SE).unflatten(-1, (self._attention.heads, -1)).transpose(0, 1)

    def move(self, source: int, target: int) -> None:
        """Put those of one text in the place of another."""
        self._kv_TNHSW[:, target] = self._kv_TNHSW[:, source]

    def read(self, x_NC: Tensor) -> Tensor:
        """What one token of each of the first texts takes: [N, C]."""
        k_NHSW, v_NHSW = self._kv_TNHSW[:, : len(x_NC)]
        q_NH1W = self._attention.q_proj(x_NC).unflatten(-1, (self._attention.heads, 1, -1))
        return self._attention.o_proj(F.scaled_dot_product_attention(q_NH1W, k_NHSW, v_NHSW).flatten(1))


class PackedCentral:
    """A central model, for up to `texts` texts."""

    def __init__(self, central: CentralModel, texts: int) -> None:
        config = self._config = central.config
        self._central = central
        self._encoder, self._decoder = (
            PackedStack([list(layers)], config.rope_theta, config.token_window)
            for layers in (central.encoder, central.decoder)
        )
        self._rooms = self._encoder.new_room(texts), self._decoder.new_room(texts)
        self._latents = (
            GroupKeys(central.upsampler.attention, texts, config.latents_per_group)
            if central.upsampler.kind == "attention"
            else None
        )
        self._given_NGC = central.embed_tokens.weight.new_zeros((texts, config.group_length, config.hidden_size))
        self._plan = GroupKeys(central.plan_reader.attention, texts, config.plan_horizon)
        self._head_CV = central.lm_head.weight.detach().T.contiguous()
        self._caches: list[CentralCache] = [central.new_cache()] * texts
        self._units: list[list[Tensor]] = [[] for _ in range(texts)]  # [1, 1, C] each, since the cache was taken

    def take(self, text: int, cache: CentralCache) -> None:
        """Go on where a text was read unpacked. The cache is kept up to date for groups, and for nothing else."""
        self._caches[text], self._units[text] = cache, []
        for room, own in zip(self._rooms, (cache.encoder, cache.decoder), strict=True):
            room.take(text, 0, own)
        self._put_group(text)

    def give_back(self, text: int, length: int) -> None:
        """Have the cache that was taken hold all of a text of `length`."""
        cache = self._caches[text]
        for room, own in zip(self._rooms, (cache.encoder, cache.decoder), strict=True):
            room.give_back(text, 0, length, own)
        self._open_group(text)
        cache.seen = length

    def move(self, source: int, target: int) -> None:
        """Put what is known of one text in the place of another."""
        for part in (*self._rooms, self._latents, self._plan):
            if part is not None:
                part.move(source, target)
        self._given_NGC[target] = self._given_NGC[source]
        self._caches[target], self._units[target] = self._caches[source], self._units[source]

    def step(self, id_N: Tensor, step: Step, read: SiteRead) -> Tensor:
        """States [N, C] before the output layer, of one more token of each text. `read` may change those of a site."""
        central, length = self._central, self._config.group_length
        x_NC = F.embedding(id_N, central.embed_tokens.weight)
        x_NC = self._encoder.step(x_NC[None], step, self._rooms[0])[0]
        place_N = step.place_N % length
        new_NC = x_NC + self._from_latents(x_NC, place_N)
        new_NC = new_NC + self._plan.read(central.plan_reader.norm(new_NC))
        for text, unit_11C in enumerate(x_NC[:, None, None].contiguous().unbind()):
            if (step.lengths[text] + 1) % length:
                self._units[text].append(unit_11C)
            else:
                self._complete(text, step.lengths[text], unit_11C, read)

        def visit(number: int, x_MNC: Tensor) -> None:
            if number < len(self._decoder):
                x_MNC.copy_(read(token_site(number - 1), x_MNC[0, :, None], slice(len(id_N)))[None, :, 0])

        return central.norm(self._decoder.step(new_NC[None], step, self._rooms[1], visit)[0])

    def logits(self, x_NC: Tensor) -> Tensor:
        """The output layer's [N, V]."""
        return torch.mm(x_NC, self._head_CV)

    def _from_latents(self, x_NC: Tensor, place_N: Tensor) -> Tensor:
        upsampler = self._central.upsampler
        if self._latents is None:
            return self._given_NGC[torch.arange(len(x_NC), device=place_N.device), place_N]
        return self._latents.read(upsampler.norm(x_NC) + upsampler.place_GD[place_N])

    def _open_group(self, text: int) -> None:
        """Put the units of the group that is not complete into the cache."""
        cache = self._caches[text]
        units = [*([] if cache.open_BNC is None else [cache.open_BNC]), *self._units[text]]
        cache.open_BNC, self._units[text] = torch.cat(units, 1) if units else None, []

    def _complete(self, text: int, length: int, unit_11C: Tensor, read: SiteRead) -> None:
        """The last unit of a text's group, which has `length` tokens before it."""
        cache = self._caches[text]
        self._open_group(text)
        cache.seen = length
        self._central.groups(unit_11C, cache, lambda site, x_BND, _: read(site, x_BND, slice(text, text + 1)))
        self._put_group(text)

    def _put_group(self, text: int) -> None:
        cache, reader, upsampler = self._caches[text], self._central.plan_reader, self._central.upsampler
        latent_SE = self._central.start_KD if cache.latent_BMKD is None else cache.latent_BMKD[0, 0]
        plan_SE = self._central.start_HD if cache.plan_BMHE is None else cache.plan_BMHE[0, 0]
        self._plan.put(text, reader.states(plan_SE))
        if self._latents is not None:
            self._latents.put(text, latent_SE)
        else:
            self._given_NGC[text] = upsampler.repeated(latent_SE)
