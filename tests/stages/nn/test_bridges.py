import pytest
import torch
import torch.nn.functional as F

from stages.nn.bridges import SHARE_INSIDE, CalmBridge, CalmCache, StitchBridge, identity_linear, unit_scale

WIDTH, EXPERTS, PRIORS = 8, 3, 2


def states(tokens, widths=(WIDTH,) * EXPERTS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, tokens, WIDTH, generator=generator)
    experts = [3 * torch.randn(2, tokens, width, generator=generator) for width in widths]
    return x, experts, torch.randn(2, tokens, len(widths), PRIORS, generator=generator)


def shaken(bridge):
    torch.manual_seed(1)
    for parameter in bridge.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return bridge


def test_shares_sum_to_one_and_start_clearly_open():
    bridge = StitchBridge(WIDTH, [WIDTH] * EXPERTS, PRIORS)
    x, _, prior = states(5)
    share = bridge.shares(x, prior)
    torch.testing.assert_close(share.sum(-1), torch.ones(2, 5))
    torch.testing.assert_close(share[..., 1:].sum(-1), torch.full((2, 5), SHARE_INSIDE))
    torch.testing.assert_close(shaken(bridge).shares(x, prior).sum(-1), torch.ones(2, 5))


def test_the_priors_decide_between_experts_at_the_start():
    bridge = StitchBridge(WIDTH, [WIDTH] * EXPERTS, PRIORS)
    x, _, prior = states(5)
    expected = prior.mean(-1).softmax(-1)
    torch.testing.assert_close(bridge.shares(x, prior)[..., 1:] / SHARE_INSIDE, expected)


def test_an_expert_the_gates_exclude_gets_nothing():
    bridge = StitchBridge(WIDTH, [WIDTH] * EXPERTS, 1)
    x, _, prior = states(5)
    prior[..., 1, :] = -torch.inf
    assert (bridge.shares(x, prior[..., :1])[..., 2] == 0).all()


def test_stitching_is_the_weighted_sum_at_the_scale_of_the_reader():
    bridge = shaken(StitchBridge(WIDTH, [WIDTH, 5, WIDTH], PRIORS))
    x, experts, prior = states(4, (WIDTH, 5, WIDTH))
    share = bridge.shares(x, prior)
    scale = x.square().mean(-1, keepdim=True).sqrt()
    expected = share[..., :1] * x
    for index, expert in enumerate(experts):
        normed = expert / expert.square().mean(-1, keepdim=True).sqrt()
        expected = expected + share[..., index + 1 :][..., :1] * (scale * normed) @ bridge.project[index].weight.T
    torch.testing.assert_close(bridge(x, experts, prior), expected, atol=1e-4, rtol=1e-4)


def test_before_the_head_an_expert_alone_is_taken_as_it_is():
    bridge = StitchBridge(WIDTH, [WIDTH] * EXPERTS, PRIORS, before_head=True)
    x, experts, prior = states(4)
    with torch.no_grad():
        bridge.open.bias.fill_(100.0)
        bridge.prior.bias_X.copy_(torch.tensor([-200.0, 0.0, -200.0]))
    torch.testing.assert_close(bridge(x, experts, prior), experts[1])


def test_maps_between_equal_widths_start_as_the_identity_and_others_keep_lengths():
    assert torch.equal(identity_linear(6, 6).weight, torch.eye(6))
    x = torch.randn(9, 4)
    torch.testing.assert_close(identity_linear(4, 7)(x).norm(dim=-1), x.norm(dim=-1))


def calm(bridge, x, end, experts, prior, cache=None):
    cache = cache or CalmCache()
    bridge.remember(experts, 0 if cache.end_K is None else int(cache.end_K.max()) + 1, cache)
    return bridge(x, end, prior, cache)


def reference_calm(bridge, x, end, experts, prior):
    """One query, one head at a time, in plain Python."""
    heads, width = bridge.heads, WIDTH // bridge.heads
    out = torch.zeros_like(x)
    log_prior = ((prior * bridge.prior.weight_F).sum(-1) + bridge.prior.bias_X).log_softmax(-1)
    for row in range(len(x)):
        for n in range(x.shape[1]):
            q = bridge.q_proj(unit_scale(x[row, n]))
            read = []
            for head in range(heads):
                part = slice(head * width, (head + 1) * width)
                scores, values = [q[part] @ bridge.null_HC[head] / width**0.5], [torch.zeros(width)]
                for index, expert in enumerate(experts):
                    for token in range(int(end[n]) + 1):
                        state = bridge.project[index](unit_scale(expert[row, token]))
                        scores.append(
                            q[part] @ bridge.k_proj(state)[part] / width**0.5
                            + log_prior[row, n, index]
                            - bridge.slope_H[head] * (int(end[n]) - token)
                        )
                        values.append(bridge.v_proj(state)[part])
                weights = torch.stack(scores).softmax(0)
                read.append(weights @ torch.stack(values))
            scale = x[row, n].square().mean().sqrt()
            out[row, n] = x[row, n] + bridge.open * scale * bridge.o_proj(torch.cat(read))
    return out


@pytest.mark.parametrize("end", [[0, 1, 2, 3, 4, 5], [1, 3, 5]])
def test_calm_equals_a_plain_reference_for_tokens_and_for_latents(end):
    bridge = shaken(CalmBridge(WIDTH, 2, [WIDTH, 5], PRIORS))
    x, experts, prior = states(6, (WIDTH, 5))
    x, prior, end = x[:, : len(end)], prior[:, : len(end)], torch.tensor(end)
    with torch.no_grad():
        expected = reference_calm(bridge, x, end, experts, prior)
        torch.testing.assert_close(calm(bridge, x, end, experts, prior), expected, atol=1e-4, rtol=1e-4)


def test_calm_never_reads_after_the_readers_end():
    bridge = shaken(CalmBridge(WIDTH, 2, [WIDTH] * EXPERTS, PRIORS))
    x, experts, prior = states(7)
    end = torch.tensor([1, 1, 3, 3, 5, 5])
    before = calm(bridge, x[:, :6], end, experts, prior[:, :6])
    for token in range(7):
        changed = [expert.clone() for expert in experts]
        changed[2][:, token] += 1
        moved = (calm(bridge, x[:, :6], end, changed, prior[:, :6]) - before).abs().amax((0, 2)) > 1e-6
        assert moved.tolist() == [int(e) >= token for e in end]


def test_calm_with_a_cache_equals_the_whole():
    bridge = shaken(CalmBridge(WIDTH, 2, [WIDTH] * EXPERTS, PRIORS))
    x, experts, prior = states(9)
    end, cache, parts = torch.arange(9), CalmCache(), []
    for piece in torch.arange(9).split([1, 3, 1, 4]):
        parts.append(calm(bridge, x[:, piece], end[piece], [e[:, piece] for e in experts], prior[:, piece], cache))
    torch.testing.assert_close(torch.cat(parts, 1), calm(bridge, x, end, experts, prior))


def test_calm_starts_by_adding_about_what_the_experts_hold():
    bridge = CalmBridge(WIDTH, 2, [WIDTH], 0)
    x, _, _ = states(1)
    expert = torch.randn(2, 1, WIDTH)
    read = (calm(bridge, x, torch.tensor([0]), [expert], torch.zeros(2, 1, 1, 0)) - x).flatten(1)
    assert (F.cosine_similarity(read, expert.flatten(1)) > 0.9).all()
    ratio = read.norm(dim=-1) / x.flatten(1).norm(dim=-1)
    assert ((ratio > 0.1) & (ratio < 0.3)).all()
