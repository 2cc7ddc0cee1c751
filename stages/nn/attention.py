"""Self-attention by positions, with rotary embedding and a cache, and the layer built on it.

Shape letters: B batch, T new positions, S all positions so far, D model width, H query heads, K key/value heads,
E head width, F MLP width.

- who may see whom is decided by positions alone: a key is allowed when its position is not after the query's (and, with
  a window, not `window` or more before it). Tokens carry their index; latents carry the index of their group, so
  latents of one group see each other
- with a cache the same code runs on the new positions only; there is no second, "incremental" formula to keep equal
- many positions under a mask attend in blocks (`stages.nn.masking`), and a cache lets go of what its window has left
  behind: memory grows with the number of positions, never with its square
- module names are Hugging Face's, so a decoder's state_dict is a checkpoint of `transformers` as it stands
- where the architectures differ: Qwen2 has biases on q, k and v, Qwen3 norms every head of q and k
"""

from math import pi

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from schemas.decoder import Architecture, LinearRope, RopeScaling
from stages.nn.masking import UNCUT, Blocks, attend, causal_mask


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale (Zhang & Sennrich 2019)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Normalise the last axis; computed in fp32 whatever the input."""
        # Under autocast a head of q or k comes in bf16, and the fused kernel wants one type.
        return F.rms_norm(x_BTD.to(self.weight.dtype), (x_BTD.shape[-1],), self.weight, self.eps)


class LayerCache:
    """Keys and values of one attention layer so far."""

    def __init__(self) -> None:
        self.k_BKSE: Tensor | None = None
        self.v_BKSE: Tensor | None = None

    def append(self, k_BKTE: Tensor, v_BKTE: Tensor, reach: int | None) -> tuple[Tensor, Tensor]:
        """Add new keys and values; returns them after the `reach` that came before them (None: all)."""
        if self.k_BKSE is not None and self.v_BKSE is not None:
            k_BKTE = torch.cat([_last(self.k_BKSE, reach, 2), k_BKTE], 2)
            v_BKTE = torch.cat([_last(self.v_BKSE, reach, 2), v_BKTE], 2)
        self.k_BKSE, self.v_BKSE = _last(k_BKTE, reach, 2), _last(v_BKTE, reach, 2)
        return k_BKTE, v_BKTE


class StackCache:
    """The caches of a stack of layers, and the positions they hold (the same for all layers)."""

    def __init__(self, layers: int) -> None:
        self.layers = [LayerCache() for _ in range(layers)]
        self.position_S: Tensor | None = None
        self.seen = 0  # positions in all, also those a window has left behind

    def append(self, position_T: Tensor, reach: int | None) -> Tensor:
        """Add new positions; returns them after the `reach` that came before them (None: all)."""
        self.seen += len(position_T)
        if self.position_S is not None:
            position_T = torch.cat([_last(self.position_S, reach, 0), position_T])
        self.position_S = _last(position_T, reach, 0)
        return position_T


def _last(x: Tensor, count: int | None, axis: int) -> Tensor:
    """The last `count` of an axis (None: all), without holding on to the rest."""
    length = x.shape[axis]
    return x if count is None or count >= length else x.narrow(axis, length - count, count).clone()


class View:
    """What a stack of layers shares in one forward pass: rotations of the new positions and who sees whom."""

    def __init__(
        self,
        position_T: Tensor,
        head_dim: int,
        theta: float,
        *,
        cache: StackCache | None = None,
        window: int | None = None,
        square: bool = True,
        per_position: int | None = None,
        scaling: RopeScaling | None = None,
        document_BT: Tensor | None = None,
    ) -> None:
        """`square`: positions rise by one from the first to the last, so that without cache and window the plain causal
        kernel can be used and no mask is built. `per_position`: otherwise, how many in a row share each; where that is
        not told, one mask is built for all. `document_BT`: the number of each position's document, which is all it
        sees; for passes without a cache."""
        angle_TE = rotary_angles(position_T, head_dim, theta, scaling)
        self.cos_TE, self.sin_TE = angle_TE.cos(), angle_TE.sin()
        self.cache = cache
        per_position = 1 if square else per_position
        self.reach = None if window is None or per_position is None else (window - 1) * per_position
        position_S = position_T if cache is None else cache.append(position_T, self.reach)
        self.mask_TS: Tensor | None = None
        self.blocks: Blocks | None = None
        if not square or window is not None or len(position_S) > len(position_T):
            if len(position_T) > UNCUT and per_position is not None and document_BT is None:
                self.blocks = Blocks(position_T, position_S, window, per_position)
            else:
                self.mask_TS = causal_mask(position_T, position_S, window)
        if document_BT is not None:  # [B, 1, T, T] then
            same_BTS = document_BT[:, :, None] == document_BT[:, None, :]
            self.mask_TS = (same_BTS & causal_mask(position_T, position_S, window))[:, None]

    def layer_cache(self, layer: int) -> LayerCache | None:
        """The cache of one layer of the stack."""
        return None if self.cache is None else self.cache.layers[layer]

    def attend(self, q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor) -> Tensor:
        """What the new positions find among all [B, H, T, E]."""
        if self.blocks is not None:
            return self.blocks.attend(q_BHTE, k_BKSE, v_BKSE)
        return attend(q_BHTE, k_BKSE, v_BKSE, self.mask_TS)


def rotary_angles(position_T: Tensor, head_dim: int, theta: float, scaling: RopeScaling | None = None) -> Tensor:
    """Angles [T, E] of RoPE (Su et al. 2021) in the half-split layout Hugging Face uses; fp32 in any precision."""
    exponent = torch.arange(0, head_dim, 2, device=position_T.device, dtype=torch.float32) / head_dim
    rate_E = theta**-exponent
    angle = position_T.float()[:, None] * (rate_E if scaling is None else scaled_rates(rate_E, scaling))
    return torch.cat([angle, angle], -1)


def scaled_rates(rate_E: Tensor, scaling: RopeScaling) -> Tensor:
    """Rotations, in radians per position, changed for longer text."""
    if isinstance(scaling, LinearRope):
        return rate_E / scaling.factor
    turns_E = scaling.original_max_position_embeddings * rate_E / (2 * pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept_E = ((turns_E - low) / (high - low)).clamp(0, 1)  # share of the unscaled rotation
    return kept_E * rate_E + (1 - kept_E) * rate_E / scaling.factor


def rotate(x_BHTE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """Apply the rotary embedding."""
    first, second = x_BHTE.chunk(2, -1)
    turned = torch.cat([-second, first], -1)
    return (x_BHTE * cos_TE + turned * sin_TE).to(x_BHTE.dtype)


class SelfAttention(nn.Module):
    """Grouped-query attention of positions on positions before them."""

    def __init__(
        self, width: int, heads: int, key_value_heads: int, eps: float, head_dim: int | None, kind: Architecture
    ) -> None:
        super().__init__()
        self.head_dim = head_dim or width // heads
        bias = kind == "qwen2"
        self.q_proj = nn.Linear(width, heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * self.head_dim, width, bias=False)
        if kind == "qwen3":
            self.q_norm: nn.Module = RMSNorm(self.head_dim, eps)
            self.k_norm: nn.Module = RMSNorm(self.head_dim, eps)
        else:
            self.q_norm, self.k_norm = nn.Identity(), nn.Identity()

    def forward(self, x_BTD: Tensor, view: View, cache: LayerCache | None = None) -> Tensor:
        """Attend from x to x and to what the cache holds."""
        q_BHTE, k_BKTE, v_BKTE = (
            projection(x_BTD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q_BHTE = rotate(self.q_norm(q_BHTE), view.cos_TE, view.sin_TE)
        k_BKTE = rotate(self.k_norm(k_BKTE), view.cos_TE, view.sin_TE)
        if cache is not None:
            k_BKTE, v_BKTE = cache.append(k_BKTE, v_BKTE, view.reach)
        out_BHTE = view.attend(q_BHTE, k_BKTE, v_BKTE)
        return self.o_proj(out_BHTE.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """Gated MLP (Shazeer 2020): `down(silu(gate(x)) * up(x))`."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Position-wise."""
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class Layer(nn.Module):
    """Pre-norm transformer layer: attention, then MLP, each added to the residual stream."""

    recompute = False  # keep the layer's input only, and compute the rest once more for the gradient

    def __init__(
        self,
        width: int,
        inner: int,
        heads: int,
        key_value_heads: int,
        eps: float,
        *,
        head_dim: int | None = None,
        kind: Architecture = "llama",
    ) -> None:
        """`head_dim`: width of a head, by default the heads' share of `width`."""
        super().__init__()
        self.input_layernorm = RMSNorm(width, eps)
        self.self_attn = SelfAttention(width, heads, key_value_heads, eps, head_dim, kind)
        self.post_attention_layernorm = RMSNorm(width, eps)
        self.mlp = SwiGLU(width, inner)

    def forward(self, x_BTD: Tensor, view: View, cache: LayerCache | None = None) -> Tensor:
        """One layer over the new positions."""
        if not self.recompute or not torch.is_grad_enabled():
            return self._through(x_BTD, view, cache)
        before = None if cache is None else (cache.k_BKSE, cache.v_BKSE)

        def through(x_BTD: Tensor) -> Tensor:
            if cache is not None and before is not None:  # the second time as it was the first
                cache.k_BKSE, cache.v_BKSE = before
            return self._through(x_BTD, view, cache)

        return checkpoint(through, x_BTD, use_reentrant=False)

    def _through(self, x_BTD: Tensor, view: View, cache: LayerCache | None) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), view, cache)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


def initialise(module: nn.Module, layers: int, std: float = 0.02) -> None:
    """GPT-2's start: normal weights, those that write to the residual stream smaller by the root of their number."""
    for name, parameter in module.named_parameters():
        if name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias")):
            nn.init.zeros_(parameter)
        if parameter.dim() < 2:
            continue
        into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        nn.init.normal_(parameter, std=std / (2 * layers) ** 0.5 if into_residual else std)
