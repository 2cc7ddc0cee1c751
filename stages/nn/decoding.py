"""The same decoder, laid out for writing text: a few tokens at a time, for one text or for several side by side.

Shape letters: R rows (the tokens of one text, or one token of each text), N texts, T new positions of a text,
S positions so far, L layers, D model width, H query heads, K key/value heads, X all heads (of queries, keys and values,
or of the last two), E head width, C pairs of a head, F MLP width, V vocabulary.

- one token costs what its weights cost to read: see `stages.nn.packing`
- what is not such a product is mostly the price of calling torch, so it is done in few calls: the length of a state is
  one norm, a rotation one complex product, and what all layers share of a step is cut once
- keys and values lie in room made beforehand: a step writes its own and copies none
- texts differ in length, and none is padded: each is read alone, at its own positions, and only steps of one token
  are taken together
- what is computed is `Decoder.forward`, up to rounding
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.nn.attention import Layer, rotary_angles
from stages.nn.decoder import Decoder
from stages.nn.masking import causal_mask
from stages.nn.packing import PackedLayer, across, unit

FIRST_ROOM = 256  # positions; doubled whenever they are used up

Attend = Callable[[int, Tensor], Tensor]  # layer, q, k and v side by side [R, X E] -> [R, H E]


class TextCache:
    """Keys and values of up to `texts` texts in every layer, and how many positions each text has read."""

    def __init__(self, texts: int, layers: int, heads: int, head_dim: int, like: Tensor) -> None:
        """`heads`: of keys, and as many of values."""
        self.lengths = [0] * texts
        self.heads = heads
        self.kv_LNXSE = like.new_zeros((layers, texts, 2 * heads, FIRST_ROOM, head_dim))

    def make_room(self, positions: int) -> None:
        """Have space for so many positions."""
        room = self.kv_LNXSE.shape[3]
        if positions <= room:
            return
        while room < positions:
            room *= 2
        old_LNXSE = self.kv_LNXSE
        self.kv_LNXSE = old_LNXSE.new_zeros((*old_LNXSE.shape[:3], room, old_LNXSE.shape[4]))
        self.kv_LNXSE[:, :, :, : old_LNXSE.shape[3]] = old_LNXSE

    def move(self, source: int, target: int) -> None:
        """Put what one text has read in the place of another."""
        length = self.lengths[target] = self.lengths[source]
        self.kv_LNXSE[:, target, :, :length] = self.kv_LNXSE[:, source, :, :length]

    def layers(self, texts: slice, start: int, end: int) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Of some texts each layer's keys and each layer's values [N, K, T, E] of the positions from start to end."""
        k_LNKTE, v_LNKTE = self.kv_LNXSE[:, texts, :, start:end].split(self.heads, 2)
        return k_LNKTE.unbind(), v_LNKTE.unbind()


class PackedDecoder:
    """A decoder that reads texts into a cache and says what comes next. Weights are copied: the decoder can go."""

    def __init__(self, decoder: Decoder) -> None:
        """`decoder` must be `packable`, and be on the device that is to compute."""
        config = decoder.config
        self.config = config
        self._embed_VD = decoder.model.embed_tokens.weight.detach()
        self._layers = [PackedLayer(layer) for layer in decoder.model.layers if isinstance(layer, Layer)]
        self._head_DV = across(decoder.model.norm, decoder.lm_head.weight)
        self._heads = [config.num_attention_heads, 2 * config.num_key_value_heads]
        self._grouped = config.num_attention_heads != config.num_key_value_heads
        self._found_width = config.num_attention_heads * config.head_dim
        self._turn_S1C = self._embed_VD.new_zeros((0, 1, config.head_dim // 2))
        self._turn(FIRST_ROOM)

    def new_cache(self, texts: int = 1) -> TextCache:
        """An empty cache for so many texts."""
        config = self.config
        return TextCache(texts, len(self._layers), config.num_key_value_heads, config.head_dim, self._embed_VD)

    @torch.inference_mode()
    def read(self, ids: list[int], cache: TextCache, text: int = 0) -> Tensor:
        """Read further tokens of one text; logits [V] in fp32 of the token after them."""
        return self._logits(self._read(ids, cache, text)[-1:])[0]

    @torch.inference_mode()
    def take(self, ids: list[int], cache: TextCache, text: int) -> None:
        """Read further tokens of one text."""
        self._read(ids, cache, text)

    def _read(self, ids: list[int], cache: TextCache, text: int) -> Tensor:
        start, own = cache.lengths[text], slice(text, text + 1)
        end = start + len(ids)
        cache.make_room(end)
        self._turn(end)
        mask_TS = None
        if start and len(ids) > 1:
            position_S = torch.arange(end, device=self._embed_VD.device)
            mask_TS = causal_mask(position_S[start:], position_S)
        causal = not start and len(ids) > 1
        new_LNXTE = cache.kv_LNXSE[:, own, :, start:end].unbind()
        k_LNKSE, v_LNKSE = cache.layers(own, 0, end)

        def attend(layer: int, qkv_RQ: Tensor) -> Tensor:
            q_NHTE, kv_NXTE = self._by_head(qkv_RQ, 1)
            new_LNXTE[layer].copy_(kv_NXTE)
            return self._found(q_NHTE, k_LNKSE[layer], v_LNKSE[layer], mask_TS, causal)

        x_RW = self._states(ids, self._turn_S1C[start:end], attend)
        cache.lengths[text] = end
        return x_RW

    @torch.inference_mode()
    def step(self, ids: list[int], cache: TextCache) -> Tensor:
        """Read one token of each of the first len(ids) texts; logits [N, V] in fp32 of the tokens after them."""
        if len(ids) == 1:
            return self.read(ids, cache)[None]
        own, longest = slice(len(ids)), max(cache.lengths[: len(ids)]) + 1
        cache.make_room(longest)
        self._turn(longest)
        text_N = torch.arange(len(ids), device=self._embed_VD.device)
        place_N = torch.tensor(cache.lengths[own], device=self._embed_VD.device)
        later_NS = torch.arange(longest, device=place_N.device) > place_N[:, None]
        mask_N11S = torch.zeros_like(later_NS, dtype=torch.float32).masked_fill_(later_NS, -math.inf)[:, None, None]
        k_LNKSE, v_LNKSE = cache.layers(own, 0, longest)

        def attend(layer: int, qkv_RQ: Tensor) -> Tensor:
            q_NHTE, kv_NXTE = self._by_head(qkv_RQ, len(ids))
            cache.kv_LNXSE[layer][text_N, :, place_N] = kv_NXTE[:, :, 0]
            return self._found(q_NHTE, k_LNKSE[layer], v_LNKSE[layer], mask_N11S, False)

        x_RW = self._states(ids, self._turn_S1C[place_N], attend)
        cache.lengths[own] = [length + 1 for length in cache.lengths[own]]
        return self._logits(x_RW)

    def _by_head(self, qkv_RQ: Tensor, texts: int) -> tuple[Tensor, ...]:
        """Queries [N, H, T, E]; keys and values [N, X, T, E]."""
        whole_NTXE = qkv_RQ.view(texts, -1, sum(self._heads), self.config.head_dim)
        return whole_NTXE.transpose(1, 2).split(self._heads, 1)

    def _found(self, q_NHTE: Tensor, k_NKSE: Tensor, v_NKSE: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """What queries find: [N T, H E]."""
        out_NHTE = F.scaled_dot_product_attention(
            q_NHTE, k_NKSE, v_NKSE, mask, is_causal=causal, enable_gqa=self._grouped
        )
        return out_NHTE.transpose(1, 2).reshape(-1, self._found_width)

    def _states(self, ids: list[int], turn_R1C: Tensor, attend: Attend) -> Tensor:
        """Output [R, D] of the last layer, not normed, with the column that `unit` wants."""
        rows, config = len(ids), self.config
        values_R1C = torch.ones_like(turn_R1C).expand(-1, config.num_key_value_heads, -1)
        turned = config.num_attention_heads + config.num_key_value_heads
        turn_RP = torch.cat([turn_R1C.expand(-1, turned, -1), values_R1C], 1).flatten(1)
        x_RW = self._embed_VD.new_full(
            (rows, config.hidden_size + 1), (config.rms_norm_eps * config.hidden_size) ** 0.5
        )
        x_RD = x_RW[:, :-1]
        x_RD.copy_(F.embedding(torch.tensor(ids, device=x_RW.device), self._embed_VD))
        for index, layer in enumerate(self._layers):
            qkv_RQ = torch.mm(unit(x_RD, x_RW), layer.qkv_DQ)
            if layer.bias_Q is not None:
                qkv_RQ += layer.bias_Q
            qkv_RQ.view(torch.complex64).mul_(turn_RP)
            x_RD.addmm_(attend(index, qkv_RQ), layer.out_ED)
            gate_RF, up_RF = torch.mm(unit(x_RD, x_RW), layer.gate_up_DF).chunk(2, 1)
            x_RD.addmm_(F.silu(gate_RF).mul_(up_RF), layer.down_FD)
        return x_RW

    def _logits(self, x_RW: Tensor) -> Tensor:
        return torch.mm(unit(x_RW[:, :-1], x_RW), self._head_DV)

    def _turn(self, positions: int) -> None:
        """Have the rotations of so many positions, as complex numbers of length one."""
        if positions <= len(self._turn_S1C):
            return
        position_S = torch.arange(2 * positions, device=self._embed_VD.device)
        angle_SE = rotary_angles(position_S, self.config.head_dim, self.config.rope_theta)
        angle_SC = angle_SE[:, : self.config.head_dim // 2]
        self._turn_S1C = torch.polar(torch.ones_like(angle_SC), angle_SC)[:, None]


def begin_text(decoder: Decoder | PackedDecoder) -> Callable[[list[int]], Tensor]:
    """A new text: reads further tokens of it, and gives the logits [V] in fp32 of the token after them."""
    if isinstance(decoder, PackedDecoder):
        return partial(decoder.read, cache=decoder.new_cache())
    cache, device = decoder.new_cache(), decoder.lm_head.weight.device

    @torch.inference_mode()
    def read(ids: list[int]) -> Tensor:
        states = decoder.hidden_states(torch.tensor([ids], device=device), cache)
        return decoder.lm_head(states[-1][0, -1]).float()

    return read
