import pytest
import torch
import torch.nn.functional as F

from stages.nn.attention import Layer, RMSNorm, StackCache, View, initialise, rotary_angles, rotate

WIDTH, HEADS, THETA = 16, 4, 100.0
HEAD_DIM = WIDTH // HEADS


def layer(key_value_heads=2):
    torch.manual_seed(0)
    made = Layer(WIDTH, 24, HEADS, key_value_heads, 1e-5).requires_grad_(False)
    initialise(made, 1, std=0.5)
    return made


def some_states(positions):
    return torch.randn(2, positions, WIDTH, generator=torch.Generator().manual_seed(1))


def view(positions, **settings):
    return View(torch.as_tensor(positions), HEAD_DIM, THETA, **settings)


def reference_attention(block, x, position_T, allowed):
    """Attention one query at a time, with the rotation as complex numbers."""
    rates = THETA ** -(torch.arange(HEAD_DIM // 2) * 2 / HEAD_DIM)
    turns = torch.polar(torch.ones(len(position_T), len(rates)), position_T[:, None].float() * rates)

    def heads(weight):
        return (x @ weight.T).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)

    def turned(y):
        result = torch.complex(*y.chunk(2, -1)) * turns
        return torch.cat([result.real, result.imag], -1)

    q, k, v = turned(heads(block.q_proj.weight)), turned(heads(block.k_proj.weight)), heads(block.v_proj.weight)
    out = torch.zeros_like(q)
    for head in range(q.shape[1]):
        shared = head // (q.shape[1] // k.shape[1])
        for t in range(q.shape[2]):
            seen = allowed[t]
            scores = (q[:, head, t, None] * k[:, shared, seen]).sum(-1) / HEAD_DIM**0.5
            out[:, head, t] = (scores.softmax(-1)[..., None] * v[:, shared, seen]).sum(1)
    return out.transpose(1, 2).flatten(2) @ block.o_proj.weight.T


@pytest.mark.parametrize("key_value_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 1, 3])
def test_attention_equals_the_formula(key_value_heads, window):
    block, x, positions = layer(key_value_heads).self_attn, some_states(7), torch.arange(7)
    allowed = [[s for s in range(7) if s <= t and (window is None or t - s < window)] for t in range(7)]
    expected = reference_attention(block, x, positions, allowed)
    torch.testing.assert_close(block(x, view(positions, window=window)), expected, atol=1e-5, rtol=1e-5)


def test_positions_that_are_equal_see_each_other():
    block, x, positions = layer().self_attn, some_states(6), torch.tensor([0, 0, 1, 1, 2, 2])
    allowed = [[0, 1], [0, 1], [0, 1, 2, 3], [0, 1, 2, 3], list(range(6)), list(range(6))]
    expected = reference_attention(block, x, positions, allowed)
    torch.testing.assert_close(block(x, view(positions, square=False)), expected, atol=1e-5, rtol=1e-5)


def test_without_cache_and_window_no_mask_is_built():
    assert view(range(5)).mask_TS is None
    assert view(range(5), window=3).mask_TS is not None


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("sizes", [(1,) * 13, (5, 1, 4, 3), (2, 11)])
def test_a_cache_with_a_window_equals_the_full_pass(sizes, window):
    layers, x = [layer(), layer()], some_states(13)

    def through(states, seen):
        for number, one in enumerate(layers):
            states = one(states, seen, seen.layer_cache(number))
        return states

    cache, start, pieces = StackCache(2), 0, []
    for size in sizes:
        seen = view(range(start, start + size), cache=cache, window=window)
        pieces.append(through(x[:, start : start + size], seen))
        start += size
    torch.testing.assert_close(torch.cat(pieces, 1), through(x, view(range(13), window=window)), atol=1e-5, rtol=1e-5)


def test_a_cache_with_a_window_stays_bounded():
    one, x, cache = layer(), some_states(20), StackCache(1)
    for position in range(20):
        seen = view([position], cache=cache, window=4)
        one(x[:, position : position + 1], seen, seen.layer_cache(0))
        assert cache.layers[0].k_BKSE.shape[2] == min(position + 1, 3) == len(cache.position_S)  # and the next one


def test_rotations_depend_on_distance_only():
    x, y = torch.randn(2, 1, 1, 1, HEAD_DIM, generator=torch.Generator().manual_seed(2))

    def score(first, second):
        angles = [rotary_angles(torch.tensor([position]), HEAD_DIM, THETA) for position in (first, second)]
        turned = [rotate(z, angle.cos(), angle.sin()) for z, angle in zip((x, y), angles, strict=True)]
        return (turned[0] * turned[1]).sum().item()

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
    assert score(9, 4) != pytest.approx(score(9, 6), abs=1e-2)


def test_rms_norm_divides_by_the_root_mean_square():
    norm, x = RMSNorm(WIDTH, 1e-2), some_states(3)
    norm.weight.data.uniform_(0.5, 2, generator=torch.Generator().manual_seed(3))
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-2).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)


def test_swiglu_equals_the_formula():
    mlp, x = layer().mlp, some_states(3)
    expected = (F.silu(x @ mlp.gate_proj.weight.T) * (x @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T
    torch.testing.assert_close(mlp(x), expected)


def test_projections_into_the_residual_stream_start_smaller():
    torch.manual_seed(0)
    made = Layer(256, 512, 4, 4, 1e-5)
    initialise(made, layers=8)
    assert made.self_attn.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert made.self_attn.o_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert made.mlp.down_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert torch.equal(made.input_layernorm.weight, torch.ones(256))


def test_a_layer_computed_twice_gives_the_same_gradient_and_keeps_less() -> None:
    def run(recompute: bool) -> tuple[list[torch.Tensor], int]:
        torch.manual_seed(0)
        layer, kept = Layer(16, 40, 2, 2, 1e-5), []
        layer.recompute = recompute
        x_BTD = torch.randn(2, 9, 16, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t
        ):
            out_BTD = layer(x_BTD, View(torch.arange(9), 8, 1e4))
        out_BTD.square().sum().backward()
        return [out_BTD, x_BTD.grad, *(parameter.grad for parameter in layer.parameters())], sum(kept)

    (plain, all_kept), (twice, kept) = run(False), run(True)
    assert all(torch.equal(one, other) for one, other in zip(plain, twice, strict=True))
    assert kept < all_kept / 5
