"""The same decoder, laid out for writing text: a few tokens at a time, for one text or for several side by side.

Shape letters: R rows (the tokens of one text, or one token of each text), N texts, S positions so far, D model width,
H query heads, K key/value heads, E head width, F MLP width, V vocabulary.

- one token costs what its weights cost to read, so they are stored as (in, out), which a product with one row reads
  faster than nn.Linear's (out, in); q, k and v are one product, and so are the two halves of the MLP's first layer
- keys and values lie in room made beforehand: a step writes its own and copies none
- texts differ in length, and none is padded: each is read alone, at its own positions, and only steps of one token
  are taken together
- what is computed is `Decoder.forward`, up to rounding; a decoder with parts unknown here is not packed (`packable`)
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.nn.attention import Layer, RMSNorm, rotary_angles
from stages.nn.decoder import Decoder
from stages.nn.masking import causal_mask

FIRST_ROOM = 256  # positions; doubled whenever they are used up

# What `PackedLayer` reads; a layer with anything else needs the general code.
PARTS = frozenset(
    f"{part}.weight"
    for part in (
        "input_layernorm",
        *(f"self_attn.{side}_proj" for side in "qkvo"),
        "post_attention_layernorm",
        *(f"mlp.{side}_proj" for side in ("gate", "up", "down")),
    )
)
BIASES = frozenset(f"self_attn.{side}_proj.bias" for side in "qkv")
# Settings it follows, or that show in the parts; any other must be at its default.
SETTINGS = frozenset(
    [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "rope_theta",
        "rms_norm_eps",
        "tie_word_embeddings",
        "vocab_size",
        "max_position_embeddings",
        "model_type",
        "bos_token_id",
        "eos_token_id",
    ]
)

Attend = Callable[[int, Tensor, Tensor], Tensor]  # layer, q [R, H, E], k and v [R, 2 K, E] -> [R, H E]


def packable(decoder: Decoder) -> bool:
    """Whether this module knows everything the decoder does: plain Llama layers, with or without q/k/v biases."""
    config = decoder.config
    for name, field in type(config).model_fields.items():
        if name not in SETTINGS and getattr(config, name) != field.get_default():
            return False
    found = [{name for name, _ in layer.named_parameters()} for layer in decoder.model.layers]
    return all(names - BIASES == PARTS and (names & BIASES) in (BIASES, frozenset()) for names in found)


class PackedLayer:
    """Weights of one layer, as (in, out)."""

    def __init__(self, layer: Layer) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.eps = layer.input_layernorm.eps
        self.qkv_DQ = _across(layer.input_layernorm, *qkv)
        biases = [projection.bias.detach() for projection in qkv if projection.bias is not None]
        self.bias_Q = torch.cat(biases) if biases else None
        self.out_ED = _across(None, attention.o_proj)
        self.gate_up_DF = _across(layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj)
        self.down_FD = _across(None, mlp.down_proj)


def _across(norm: RMSNorm | None, *projections: nn.Linear) -> Tensor:
    """The weights side by side, [in, out], with what `_unit` leaves out of the norm before them."""
    weight_OD = torch.cat([projection.weight.detach() for projection in projections])
    if norm is not None:
        weight_OD = weight_OD * (norm.weight.detach() * weight_OD.shape[1] ** 0.5)
    return weight_OD.T.contiguous()


def _unit(x_RD: Tensor, eps: float) -> Tensor:
    """States divided by their length: RMSNorm without its weights and without sqrt(D), in few operations."""
    return x_RD * (x_RD * x_RD).sum(1, True).add_(eps * x_RD.shape[1]).rsqrt_()


class TextCache:
    """Keys and values of up to `texts` texts in every layer, and how many positions each text has read."""

    def __init__(self, texts: int, layers: int, heads: int, head_dim: int, like: Tensor) -> None:
        """`heads`: of keys, and as many of values."""
        self.lengths = [0] * texts
        self.heads = heads
        self.kv_LNSXE = [like.new_zeros((texts, FIRST_ROOM, 2 * heads, head_dim)) for _ in range(layers)]

    def make_room(self, positions: int) -> None:
        """Have space for so many positions."""
        room = self.kv_LNSXE[0].shape[1]
        if positions <= room:
            return
        while room < positions:
            room *= 2
        for layer, old_NSXE in enumerate(self.kv_LNSXE):
            self.kv_LNSXE[layer] = old_NSXE.new_zeros((len(old_NSXE), room, *old_NSXE.shape[2:]))
            self.kv_LNSXE[layer][:, : old_NSXE.shape[1]] = old_NSXE

    def move(self, source: int, target: int) -> None:
        """Put what one text has read in the place of another."""
        length = self.lengths[target] = self.lengths[source]
        for kv_NSXE in self.kv_LNSXE:
            kv_NSXE[target, :length] = kv_NSXE[source, :length]

    def attend(self, layer: int, q_NHTE: Tensor, texts: slice, end: int, mask: Tensor | None, causal: bool) -> Tensor:
        """What queries [N, H, T, E] of some texts find among their first `end` positions: [N T, H E]."""
        k_NKSE, v_NKSE = self.kv_LNSXE[layer][texts, :end].transpose(1, 2).split(self.heads, 1)
        grouped = q_NHTE.shape[1] != self.heads
        out_NHTE = F.scaled_dot_product_attention(q_NHTE, k_NKSE, v_NKSE, mask, is_causal=causal, enable_gqa=grouped)
        return out_NHTE.transpose(1, 2).reshape(len(q_NHTE) * q_NHTE.shape[2], -1)


class PackedDecoder:
    """A decoder that reads texts into a cache and says what comes next. Weights are copied: the decoder can go."""

    def __init__(self, decoder: Decoder) -> None:
        """`decoder` must be `packable`, and be on the device that is to compute."""
        config = decoder.config
        self.config = config
        self._embed_VD = decoder.model.embed_tokens.weight.detach()
        self._layers = [PackedLayer(layer) for layer in decoder.model.layers if isinstance(layer, Layer)]
        self._head_DV = _across(decoder.model.norm, decoder.lm_head)
        self._cos_S1E = self._sin_S1E = self._embed_VD.new_zeros((0, 1, config.head_dim))
        self._turn(FIRST_ROOM)

    def new_cache(self, texts: int = 1) -> TextCache:
        """An empty cache for so many texts."""
        config = self.config
        return TextCache(texts, len(self._layers), config.num_key_value_heads, config.head_dim, self._embed_VD)

    @torch.inference_mode()
    def read(self, ids: list[int], cache: TextCache, text: int = 0) -> Tensor:
        """Read further tokens of one text; logits [V] in fp32 of the token after them."""
        start, own = cache.lengths[text], slice(text, text + 1)
        end = start + len(ids)
        cache.make_room(end)
        self._turn(end)
        mask_TS = None
        if start and len(ids) > 1:
            position_S = torch.arange(end, device=self._embed_VD.device)
            mask_TS = causal_mask(position_S[start:], position_S)
        causal = not start and len(ids) > 1

        def attend(layer: int, q_RHE: Tensor, kv_RXE: Tensor) -> Tensor:
            cache.kv_LNSXE[layer][text, start:end] = kv_RXE
            return cache.attend(layer, q_RHE.transpose(0, 1)[None], own, end, mask_TS, causal)

        states_RD = self._states(ids, self._cos_S1E[start:end], self._sin_S1E[start:end], attend)
        cache.lengths[text] = end
        return self._logits(states_RD[-1:])[0]

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
        mask_N11S = (torch.arange(longest, device=place_N.device) <= place_N[:, None])[:, None, None]

        def attend(layer: int, q_RHE: Tensor, kv_RXE: Tensor) -> Tensor:
            cache.kv_LNSXE[layer][text_N, place_N] = kv_RXE
            return cache.attend(layer, q_RHE[:, :, None], own, longest, mask_N11S, False)

        states_RD = self._states(ids, self._cos_S1E[place_N], self._sin_S1E[place_N], attend)
        cache.lengths[own] = [length + 1 for length in cache.lengths[own]]
        return self._logits(states_RD)

    def _states(self, ids: list[int], cos_R1E: Tensor, sin_R1E: Tensor, attend: Attend) -> Tensor:
        """Output [R, D] of the last layer, not normed."""
        head_dim, queries = self.config.head_dim, self.config.num_attention_heads
        turned = queries + self.config.num_key_value_heads
        x_RD = F.embedding(torch.tensor(ids, device=self._embed_VD.device), self._embed_VD)
        for index, layer in enumerate(self._layers):
            qkv_RQ = torch.mm(_unit(x_RD, layer.eps), layer.qkv_DQ)
            if layer.bias_Q is not None:
                qkv_RQ += layer.bias_Q
            qkv_RXE = qkv_RQ.view(len(ids), -1, head_dim)
            qk_RXE = qkv_RXE[:, :turned]
            torch.addcmul(qk_RXE * cos_R1E, qk_RXE.roll(head_dim // 2, -1), sin_R1E, out=qk_RXE)
            x_RD = torch.addmm(x_RD, attend(index, qkv_RXE[:, :queries], qkv_RXE[:, queries:]), layer.out_ED)
            gate_RF, up_RF = torch.mm(_unit(x_RD, layer.eps), layer.gate_up_DF).chunk(2, 1)
            x_RD = torch.addmm(x_RD, F.silu(gate_RF).mul_(up_RF), layer.down_FD)
        return x_RD

    def _logits(self, x_RD: Tensor) -> Tensor:
        return torch.mm(_unit(x_RD, self.config.rms_norm_eps), self._head_DV).float()

    def _turn(self, positions: int) -> None:
        """Have the rotations of so many positions.

        The sine of a head's first half is negative, so that `rotate` is a sum with the head rolled by half its width.
        """
        if positions <= len(self._cos_S1E):
            return
        position_S = torch.arange(2 * positions, device=self._embed_VD.device)
        angle_SE = rotary_angles(position_S, self.config.head_dim, self.config.rope_theta)
        sign_E = torch.ones_like(angle_SE[0])
        sign_E[: self.config.head_dim // 2] = -1
        self._cos_S1E = angle_SE.cos().to(self._embed_VD.dtype)[:, None]
        self._sin_S1E = (angle_SE.sin() * sign_E).to(self._embed_VD.dtype)[:, None]


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


class TextPlace:
    """The place of one text in a batch; `pending` tokens wait to be read."""

    def __init__(self, row: int, cache: TextCache) -> None:
        self.row = row
        self.pending: list[int] = []
        self._cache = cache
        cache.lengths[row] = 0

    def restart(self, skipped: list[int], kept: list[int]) -> None:
        """Begin a new context that holds `kept`."""
        self.pending = [*kept]
        self._cache.lengths[self.row] = 0


class TextBatch:
    """Up to `rows` texts written side by side, each under a number of its own."""

    def __init__(self, decoder: PackedDecoder, rows: int) -> None:
        self._decoder = decoder
        self._cache = decoder.new_cache(rows)
        self._places: dict[int, TextPlace] = {}

    def add(self, number: int) -> TextPlace:
        """Make a place for a text."""
        place = self._places[number] = TextPlace(len(self._places), self._cache)
        return place

    def remove(self, number: int) -> None:
        """Give up the place of a text: the last one takes it."""
        freed = self._places.pop(number)
        if self._places and freed.row < len(self._places):
            last = max(self._places, key=lambda each: self._places[each].row)
            self._cache.move(self._places[last].row, freed.row)
            self._places[last].row = freed.row

    def read(self, unread: dict[int, list[int]]) -> dict[int, Tensor]:
        """Read further tokens of every text; logits [V] of the token after them."""
        newest = [0] * len(self._places)
        for number, ids in unread.items():
            place = self._places[number]
            *before, newest[place.row] = [*place.pending, *ids]
            place.pending = []
            if before:
                self._decoder.read(before, self._cache, place.row)
        logits_NV = self._decoder.step(newest, self._cache)
        return {number: logits_NV[self._places[number].row] for number in unread}
