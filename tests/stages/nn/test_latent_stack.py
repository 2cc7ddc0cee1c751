import loud_weights
import pytest
import torch
from torch import nn

from schemas.central import CentralConfig
from stages.nn.attention import SelfAttention, StackCache, View
from stages.nn.latent_stack import ChannelLayer, LatentStack, arranged

CONFIG = CentralConfig(
    vocab_size=31, hidden_size=16, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2,
)  # fmt: skip
LATENTS, GROUPS = 3, 4


def loud(module):
    """The same weights in every call."""
    torch.manual_seed(0)
    return loud_weights.loud(module)


def stack(is_local, **changes):
    config = CONFIG.model_copy(update=changes)
    return loud(LatentStack(config, config.widths(1), is_local, None, latent_stack=True))


def through(layers, x_BND):
    return layers(x_BND, torch.arange(GROUPS), StackCache(layers.is_local.count(False)))


def some_latents(rows=2, width=16):
    return torch.randn(rows, GROUPS * LATENTS, width, generator=torch.Generator().manual_seed(1))


def view():
    return View(torch.arange(GROUPS).repeat_interleave(LATENTS), CONFIG.head_dim, CONFIG.rope_theta, square=False)


@pytest.mark.parametrize(
    ("counts", "kind", "expected"),
    [
        ((2, 3), "series", "LLGGG"),
        ((2, 3), "alternating", "LGLGG"),
        ((3, 1), "alternating", "LGLL"),
        ((0, 2), "alternating", "GG"),
        ((0, 0), "series", ""),
    ],
)
def test_layers_inside_groups_come_first_or_in_turn(counts, kind, expected):
    assert "".join("L" if local else "G" for local in arranged(*counts, kind)) == expected


def moved(layers, place):
    x_BND = some_latents(1)
    other = x_BND.clone()
    other[:, place] += 1
    return ((through(layers, x_BND) - through(layers, other)).abs().amax((0, 2)) > 1e-6).nonzero().flatten().tolist()


def test_a_local_layer_sees_its_group_and_a_global_one_all_before_it_too():
    assert moved(stack([True, True]), 4) == [3, 4, 5]
    assert moved(stack([False]), 4) == list(range(3, 12))
    assert moved(stack([True, False, True]), 4) == list(range(3, 12))


@pytest.mark.parametrize("merge", ["scalars", "features"])
def test_channels_are_attentions_with_mlps_of_their_own_and_one_for_all(merge):
    """Against plain attentions that are given a channel's part of the weights each."""
    config, count = CONFIG.model_copy(update={"channel_merge": merge}), 3
    layer, x_BND = loud(ChannelLayer(config, config.widths(1), count)), some_latents()
    normed, states = layer.input_layernorm(x_BND), []
    for channel in range(count):
        plain = SelfAttention(16, 4, 2, config.rms_norm_eps, config.head_dim, "llama")
        for side in ("q_proj", "k_proj", "v_proj"):
            weight = getattr(layer.self_attn, side).weight.chunk(count)[channel]
            getattr(plain, side).weight = nn.Parameter(weight)
        plain.o_proj.weight = layer.self_attn.o_proj.weight
        state = x_BND + plain(normed, view())
        inner = layer.post_attention_layernorm(state)
        states.append(state + layer.channel_mlps[channel](inner) + layer.mlp(inner))
    stacked = torch.stack(states)
    share = stacked.softmax(0) if merge == "features" else layer.share_S.softmax(0)[:, None, None, None]
    torch.testing.assert_close(layer(x_BND, view()), (share * stacked).sum(0), atol=1e-5, rtol=1e-5)


def test_learned_weights_of_channels_begin_equal_and_can_choose_one():
    layer = ChannelLayer(CONFIG, CONFIG.widths(1), 3)
    assert torch.equal(layer.share_S, torch.zeros(3))
    loud(layer)
    x_BND = some_latents()
    outputs = []
    for channel in range(3):
        layer.share_S.data = torch.full((3,), -100.0).index_fill(0, torch.tensor(channel), 0.0)
        outputs.append(layer(x_BND, view()))
    layer.share_S.data = torch.zeros(3)
    torch.testing.assert_close(layer(x_BND, view()), torch.stack(outputs).mean(0), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-2)


def test_channels_computed_once_more_for_the_gradient_give_the_same_gradient():
    gradients = []
    for recompute in (False, True):
        layer, x_BND = loud(ChannelLayer(CONFIG, CONFIG.widths(1), 2)), some_latents().requires_grad_()
        layer.recompute = recompute
        layer(x_BND, view()).square().sum().backward()
        gradients.append([x_BND.grad, *(parameter.grad for parameter in layer.parameters())])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("channels", [1, 2])
def test_depth_weighted_averages_begin_as_none(channels):
    plain, weighted = (stack([True, False, False], channels=channels, depth_weighted=on) for on in (False, True))
    fresh = LatentStack(
        CONFIG.model_copy(update={"depth_weighted": True}), CONFIG.widths(1), [False] * 3, None, latent_stack=True
    )
    weighted.load_state_dict(
        plain.state_dict() | {name: w for name, w in fresh.state_dict().items() if name.startswith("depth_weight")}
    )
    assert torch.equal(through(weighted, some_latents()), through(plain, some_latents()))


def test_depth_weighted_averages_are_of_the_input_and_all_outputs_so_far():
    layers, x_BND = stack([False, False, False], depth_weighted=True), some_latents()
    states, x = [x_BND], x_BND
    for layer, weights in zip(
        layers, [layers.depth_weight_1, layers.depth_weight_2, layers.depth_weight_3], strict=True
    ):
        states.append(layer(x, view()))
        x = torch.einsum("l,lbnd->bnd", weights, torch.stack(states))
    torch.testing.assert_close(through(layers, x_BND), x, atol=1e-5, rtol=1e-5)


def test_only_the_latent_stack_has_channels_and_depth_weights():
    config = CONFIG.model_copy(update={"channels": 2, "depth_weighted": True})
    before = LatentStack(config, config.widths(1), [True, False], None)
    assert not any(name.startswith(("depth", "0.channel", "1.channel")) for name, _ in before.named_parameters())
    above = stack([True, False], channels=2, depth_weighted=True)
    assert [isinstance(layer, ChannelLayer) for layer in above] == [False, True]
