"""The layers over the latents of a level.

Shape letters: B batch, M groups, K latents per group, N latents (M K), S channels, D width, H heads.

- global layers are causal over groups, and latents of one group see each other: they carry the number of their group as
  position. Local layers see one group only, so they need no cache
- channels: S attentions side by side, each with queries, keys, values and an MLP of its own, and an MLP for all of them
- depth-weighted averages (DenseFormer, Pagliardini et al. 2024): the state after layer i becomes a weighted sum of
  the stack's input and the outputs so far; the weights begin as the identity, so the stack begins as without them
"""

from collections.abc import Callable
from itertools import chain, zip_longest
from typing import Literal

import torch
from torch import Tensor, nn

from schemas.central import CentralConfig, Widths
from stages.nn.attention import Layer, LayerCache, SelfAttention, StackCache, SwiGLU, View

Visit = Callable[[int, Tensor], Tensor]  # number of a global layer, states after it [B, N, D] -> states


def arranged(local: int, over_groups: int, kind: Literal["series", "alternating"]) -> list[bool]:
    """For every layer of a stack in order, whether it is local."""
    inside, over = [True] * local, [False] * over_groups
    if kind == "series":
        return [*inside, *over]
    return [layer for layer in chain(*zip_longest(inside, over)) if layer is not None]


class LatentStack(nn.ModuleList):
    """Layers in the order in which they run."""

    def __init__(
        self,
        config: CentralConfig,
        widths: Widths,
        is_local: list[bool],
        window: int | None,
        *,
        latent_stack: bool = False,
    ) -> None:
        """`window`: of global layers, in groups. `latent_stack`: it has the config's channels and depth weights."""
        channels = config.channels if latent_stack else 1
        super().__init__(_layer(config, widths, 1 if local else channels) for local in is_local)
        self.is_local, self.window = is_local, window
        self.head_dim, self.theta = config.head_dim, config.rope_theta
        self.weighted = latent_stack and config.depth_weighted
        if self.weighted:
            for depth in range(1, len(is_local) + 1):
                weight = torch.zeros(depth + 1)
                weight[-1] = 1.0
                self.register_parameter(f"depth_weight_{depth}", nn.Parameter(weight))

    def forward(self, x_BND: Tensor, group_M: Tensor, cache: StackCache, visit: Visit | None = None) -> Tensor:
        """The latents of new groups `group_M` after all layers; `visit` may change them after each global one."""
        if not self.is_local:
            return x_BND
        latents, number = x_BND.shape[1] // len(group_M), 0
        over = View(
            group_M.repeat_interleave(latents),
            self.head_dim,
            self.theta,
            cache=cache,
            window=self.window,
            square=False,
            per_position=latents,
        )
        inside = View(torch.zeros_like(group_M[:1]).expand(latents), self.head_dim, self.theta, square=False)
        states = [x_BND]
        for depth, (layer, is_local) in enumerate(zip(self, self.is_local, strict=True), 1):
            if is_local:
                x_BND = layer(x_BND.reshape(-1, latents, x_BND.shape[-1]), inside).view_as(x_BND)
            else:
                x_BND = layer(x_BND, over, over.layer_cache(number))
                x_BND = x_BND if visit is None else visit(number, x_BND)
                number += 1
            if self.weighted:
                states.append(x_BND)
                weights = self.get_parameter(f"depth_weight_{depth}").unbind()
                x_BND = torch.stack([w * x for w, x in zip(weights, states, strict=True)]).sum(0)
        return x_BND


def _layer(config: CentralConfig, widths: Widths, channels: int) -> Layer:
    if channels == 1:
        return Layer(*widths, config.rms_norm_eps, head_dim=config.head_dim, kind=config.model_type)
    return ChannelLayer(config, widths, channels)


class ChannelAttention(SelfAttention):
    """Attentions side by side, with queries, keys and values of their own and one projection of what they find."""

    def __init__(self, config: CentralConfig, widths: Widths, channels: int) -> None:
        heads, key_value_heads = channels * widths.heads, channels * widths.key_value_heads
        super().__init__(widths.width, heads, key_value_heads, config.rms_norm_eps, config.head_dim, config.model_type)
        self.o_proj = PerChannel(widths.heads * config.head_dim, widths.width, channels)


class PerChannel(nn.Linear):
    """One linear map for all channels: [B, N, S x inner] -> [B, N, S, D]."""

    def __init__(self, inner: int, width: int, channels: int) -> None:
        super().__init__(inner, width, bias=False)
        self.channels = channels

    def forward(self, x_BNX: Tensor) -> Tensor:
        """Each channel's share of the last axis, projected."""
        return super().forward(x_BNX.unflatten(-1, (self.channels, -1)))


class ChannelLayer(Layer):
    """A layer of S channels, merged at its end into the one residual stream.

    An MLP of 1/S of the inner width for each channel and another for all. `scalars`: the merge is a convex combination
    by the softmax of learned numbers, equal at first. `features`: every feature is weighted over the channels by
    the softmax of its own values.
    """

    def __init__(self, config: CentralConfig, widths: Widths, channels: int) -> None:
        inner = -(-widths.inner // channels)
        super().__init__(
            widths.width,
            inner,
            widths.heads,
            widths.key_value_heads,
            config.rms_norm_eps,
            head_dim=config.head_dim,
            kind=config.model_type,
        )
        self.self_attn = ChannelAttention(config, widths, channels)
        self.channel_mlps = nn.ModuleList(SwiGLU(widths.width, inner) for _ in range(channels))
        self.share_S = nn.Parameter(torch.zeros(channels)) if config.channel_merge == "scalars" else None

    def _through(self, x_BND: Tensor, view: View, cache: LayerCache | None) -> Tensor:
        x_BNSD = x_BND[:, :, None] + self.self_attn(self.input_layernorm(x_BND), view, cache)
        normed_BNSD = self.post_attention_layernorm(x_BNSD)
        own = [mlp(x_BND) for mlp, x_BND in zip(self.channel_mlps, normed_BNSD.unbind(2), strict=True)]
        x_BNSD = x_BNSD + torch.stack(own, 2) + self.mlp(normed_BNSD)
        share = x_BNSD.softmax(2) if self.share_S is None else self.share_S.softmax(0)[:, None]
        return (share * x_BNSD).sum(2)
