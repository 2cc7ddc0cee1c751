from typing import get_args

import pytest
import torch
from torch import nn
from toy_routed import VOCAB, WIDTH, loud

from schemas.train_gates import ALONE, GateMode, Selection
from stages.nn.gate_losses import ContrastiveLoss, GateLoss
from stages.nn.gates import ExpertGates, SeedGate, normalise

END = VOCAB  # no token of the texts here begins a document
MODES = pytest.mark.parametrize("mode", [mode for mode in get_args(GateMode) if mode != "arrow"])


def models(experts=3):
    return loud(0), [loud(number + 1) for number in range(experts)]


def some_gates(mode, experts=3, layer=2, size=1.0, memory=0.0):
    draw = torch.Generator().manual_seed(9)
    vectors, bias = torch.randn(experts, WIDTH, generator=draw) * size, torch.randn(experts, generator=draw)
    return ExpertGates(vectors, bias, mode, layer, memory, END).requires_grad_(False)


def some_states(scale=1.0):
    return torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(4)) * scale


def some_rows(rows=4, tokens=9, seed=5):
    return torch.randint(VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1.0, 1e6])
def test_a_vector_is_normalised_the_same_whatever_its_size(scale):
    found = normalise(some_states(scale))
    torch.testing.assert_close(found, normalise(some_states()), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.mean(-1), torch.zeros(2, 7), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.square().mean(-1), torch.ones(2, 7), atol=1e-4, rtol=0)


def test_normalising_is_layer_norm_without_scale_and_a_zero_vector_stays_zero():
    x = some_states()
    torch.testing.assert_close(normalise(x), nn.functional.layer_norm(x, (WIDTH,), eps=0), atol=1e-5, rtol=1e-5)
    assert torch.equal(normalise(torch.zeros(1, 1, WIDTH)), torch.zeros(1, 1, WIDTH))
    assert normalise(x.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("experts", [1, 3])
def test_closed_gates_are_uniform(experts):
    u = some_states()
    joint = ExpertGates.closed(experts, WIDTH, "joint", 2, 0.0, END).log_weights(u).exp()
    torch.testing.assert_close(joint, torch.full((2, 7, experts + 1), 1 / (experts + 1)))
    alone = ExpertGates.closed(experts, WIDTH, "independent", 2, 0.0, END).log_weights(u).exp()
    torch.testing.assert_close(alone[..., 1:], torch.full((2, 7, experts), 1 / experts))
    assert (alone[..., 0] == 0).all()


def test_closed_gates_open_to_a_half_while_training_alone():
    seed, experts = models(1)
    parts = GateLoss(ExpertGates.closed(1, WIDTH, "independent", 2, 0.0, END), seed, experts)(some_rows())
    assert parts["open_0"].item() == pytest.approx(0.5)
    assert parts["open_1"].item() == pytest.approx(0.5)


@MODES
@pytest.mark.parametrize("top_k", [None, 1, 2, 3, 5])
def test_weights_sum_to_one(mode, top_k):
    log_weights = some_gates(mode).log_weights(some_states(), Selection(top_k=top_k))
    torch.testing.assert_close(log_weights.exp().sum(-1), torch.ones(2, 7))
    assert log_weights.shape == (2, 7, 4)


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("gates", [some_gates("independent"), some_gates("joint"), None], ids=["alone", "joint", "tie"])
def test_top_k_keeps_k_experts(top_k, gates):
    mode = "joint" if gates is None else gates.mode
    gates = gates or ExpertGates.closed(3, WIDTH, "joint", 2, 0.0, END)  # all scores are equal
    weights = gates.log_weights(some_states(), Selection(top_k=top_k)).exp()
    assert ((weights[..., 1:] > 0).sum(-1) == top_k).all()
    assert ((weights[..., 0] > 0) == (mode == "joint")).all()


@pytest.mark.parametrize("top_k", [1, 2])
def test_top_k_of_the_softmax_renormalised_is_the_softmax_of_the_top_k(top_k):
    gates, u = some_gates("independent"), some_states()
    whole = gates.log_weights(u)[..., 1:].exp()
    kept = whole * (whole >= whole.topk(top_k, -1).values[..., -1:])
    expected = kept / kept.sum(-1, keepdim=True)
    torch.testing.assert_close(gates.log_weights(u, Selection(top_k=top_k))[..., 1:].exp(), expected)


def test_weights_of_independent_gates_are_the_formula_of_the_paper():
    gates, u = some_gates("independent"), some_states()
    vectors = torch.stack(list(gates.vectors))

    def unit(x):
        return (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True, unbiased=False)

    expected = (unit(u) @ unit(vectors).T / WIDTH**0.5).softmax(-1)
    torch.testing.assert_close(gates.log_weights(u)[..., 1:].exp(), expected, atol=1e-5, rtol=1e-4)


def test_the_size_of_an_independent_vector_does_not_count():
    gates = some_gates("independent")
    longer = ExpertGates(torch.stack(list(gates.vectors)) * 50, None, "independent", 2, 0.0, END)
    torch.testing.assert_close(longer.log_weights(some_states()), gates.log_weights(some_states()))


def chosen(gates, u, **limits):
    return gates.log_weights(u, Selection(**limits)).exp()


def test_a_threshold_keeps_the_experts_whose_share_reaches_it_and_else_the_seed():
    gates, u = some_gates("joint", size=0.1), some_states()
    whole, some = chosen(gates, u), chosen(gates, u, threshold=0.4)
    kept = whole[..., 1:] >= 0.4
    assert torch.equal(some[..., 1:] > 0, kept)
    expected = torch.cat([whole[..., :1], whole[..., 1:] * kept], -1)
    torch.testing.assert_close(some, expected / expected.sum(-1, keepdim=True))
    alone = ~kept.any(-1)
    assert alone.any() and (some[alone][:, 0] == 1).all()


def test_an_independent_threshold_is_the_opening_it_was_trained_with():
    gates, u = some_gates("independent"), some_states()
    opening = (normalise(u) @ torch.stack(list(gates.vectors)).T).sigmoid()
    some = chosen(gates, u, threshold=0.9)
    assert torch.equal(some[..., 1:] > 0, opening >= 0.9)
    none = ~(opening >= 0.9).any(-1)
    assert none.any() and not none.all()
    assert torch.equal(some[..., 0], none.float())


def test_top_p_keeps_the_fewest_slots_that_reach_it():
    gates, u = some_gates("joint", size=0.2), some_states()
    whole, some = chosen(gates, u).reshape(-1, 4), chosen(gates, u, top_p=0.7).reshape(-1, 4)
    for shares, kept in zip(whole.tolist(), (some[:, 1:] > 0).tolist(), strict=True):
        order = sorted(range(4), key=lambda slot: -shares[slot])
        fewest = next(n for n in range(1, 5) if sum(shares[slot] for slot in order[:n]) >= 0.7)
        assert {slot + 1 for slot, is_kept in enumerate(kept) if is_kept} == set(order[:fewest]) - {0}


def test_limits_hold_together():
    gates, u = some_gates("joint", size=0.1), some_states()
    both = chosen(gates, u, threshold=0.4, top_k=1)[..., 1:] > 0
    assert (both.sum(-1) <= 1).all() and (both.sum(-1) == 0).any() and (both.sum(-1) == 1).any()
    assert torch.equal(both, (chosen(gates, u, threshold=0.4)[..., 1:] > 0) & (chosen(gates, u, top_k=1)[..., 1:] > 0))


@pytest.mark.parametrize("mode", ["independent", "contrastive", "mean-activation"])
def test_only_joint_gates_have_a_slot_for_none_of_them(mode):
    assert (some_gates(mode).log_weights(some_states())[..., 0] == -torch.inf).all()
    assert (some_gates("joint").log_weights(some_states())[..., 0] > -torch.inf).all()


@pytest.mark.parametrize("own", [0, 2])
def test_the_independent_loss_is_the_mixture_of_seed_and_own_expert(own):
    gates, rows = some_gates("independent", experts=1), some_rows()
    seed, experts = models()
    u = normalise(seed.hidden_states(rows[:, :-1])[2])
    g = torch.sigmoid(u @ gates.vectors[0])
    probabilities = [model(rows[:, :-1]).softmax(-1) for model in (seed, experts[own])]
    mixture = (1 - g)[..., None] * probabilities[0] + g[..., None] * probabilities[1]
    expected = -mixture.gather(-1, rows[:, 1:, None]).log().mean()
    parts = GateLoss(gates, seed, [experts[own]])(rows)
    assert parts["loss"].item() == pytest.approx(expected.item(), abs=1e-5)
    assert parts["open_1"].item() == pytest.approx(g.mean().item(), abs=1e-5)


def test_the_joint_loss_is_the_mixture_its_weights_make():
    gates, rows = some_gates("joint"), some_rows()
    seed, experts = models()
    weights = gates.log_weights(seed.hidden_states(rows[:, :-1])[2]).exp()
    probabilities = torch.stack([model(rows[:, :-1]).softmax(-1) for model in (seed, *experts)], -1)
    mixture = (probabilities * weights[:, :, None]).sum(-1)
    expected = -mixture.gather(-1, rows[:, 1:, None]).log().mean()
    parts = GateLoss(gates, seed, experts)(rows)
    assert parts["loss"].item() == pytest.approx(expected.item(), abs=1e-5)
    for slot in range(4):
        assert parts[f"open_{slot}"].item() == pytest.approx(weights[..., slot].mean().item(), abs=1e-5)


@MODES
def test_tokens_to_come_do_not_move_weights(mode):
    seed, ids = loud(0), some_rows(2, 12)
    other = ids.clone()
    other[:, 7:] = (other[:, 7:] + 1) % VOCAB
    gates = some_gates(mode)
    first, second = (gates.log_weights(seed.hidden_states(x)[2], Selection(top_k=2)) for x in (ids, other))
    assert torch.equal(first[:, :7], second[:, :7])
    assert not torch.equal(first[:, 7:], second[:, 7:])


@MODES
def test_saved_gates_weigh_the_same(mode):
    gates = some_gates(mode)
    tensors = gates.tensors()
    bias = {} if mode in ALONE else {"bias": (3,)}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {"vectors": (3, WIDTH), **bias}
    saved = {f"{mode}.{name}": tensor for name, tensor in tensors.items()}
    again = ExpertGates.from_tensors(saved, mode, 2, 0.0, END)
    assert torch.equal(again.log_weights(some_states()), gates.log_weights(some_states()))
    assert not any(parameter.requires_grad for parameter in again.parameters())


@pytest.mark.parametrize("memory", [0.0, 0.9, 1.0])
def test_gates_read_the_fading_sum_of_a_documents_states(memory):
    gates = some_gates("joint", memory=memory)
    ids = some_rows(2, 12)
    ids[0, 5] = gates.end_of_text
    u = torch.randn(2, 12, WIDTH, generator=torch.Generator().manual_seed(2))
    read = gates.remembered(u, ids)
    for row, begin in ((0, 5), (1, 0)):
        for token in range(begin, 12):
            ages = torch.arange(token - begin, -1, -1.0)
            expected = (memory ** ages[:, None] * normalise(u)[row, begin : token + 1]).sum(0)
            torch.testing.assert_close(read[row, token], expected)
    again = gates.remembered(u[:, 7:], ids[:, 7:], gates.remembered(u[:, :7], ids[:, :7])[:, -1])
    torch.testing.assert_close(again, read[:, 7:])


def test_a_seed_gate_with_a_cache_weighs_as_without():
    gate = SeedGate(loud(0), some_gates("joint", memory=0.9))
    ids = some_rows(2, 12)
    cache = gate.new_cache()
    pieces = [gate(ids[:, start:stop], cache) for start, stop in ((0, 1), (1, 7), (7, 12))]
    torch.testing.assert_close(torch.cat(pieces, 1), gate(ids), atol=1e-4, rtol=1e-4)


def test_the_contrastive_loss_is_the_mean_of_each_gates_own():
    seed, gates, rows = loud(0), some_gates("contrastive", memory=0.5), some_rows()
    labels = torch.tensor([0, 2, 1, 2])
    scores = gates.scores(gates.read(seed, rows[:, :-1]))
    own = labels[:, None] == torch.arange(3)
    each = torch.where(own[:, None], scores.sigmoid(), 1 - scores.sigmoid()).log().mean((0, 1))
    found = ContrastiveLoss(gates, seed)(torch.cat([rows, labels[:, None]], 1))["loss"]
    assert found.item() == pytest.approx(-each.mean().item(), rel=1e-4)


# Training on toy experts, each the better one on its own kind of text


HALF = VOCAB // 2


def rows_of_kind(low, seed, rows=8):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0 if low else HALF, HALF if low else VOCAB, (rows, 11), generator=draw)


class Sure(nn.Module):
    """An expert that knows which tokens its kind is made of."""

    def __init__(self, low):
        super().__init__()
        kind = (torch.arange(VOCAB) < HALF) == low
        self.logits = nn.Parameter(torch.where(kind, 3.0, -3.0), requires_grad=False)

    def forward(self, ids):
        return self.logits.expand(*ids.shape, VOCAB)


def trained_gates(mode, own=None, steps=60):
    seed = loud(0)
    seed.lm_head.weight = nn.Parameter(torch.zeros(VOCAB, WIDTH), requires_grad=False)  # guesses uniformly
    experts = [Sure(low=True), Sure(low=False)]
    asked = experts if own is None else [experts[own]]
    gates = ExpertGates.closed(len(asked), WIDTH, mode, 2, 0.0, END)
    loss = GateLoss(gates, seed, asked)
    before = {name: parameter.clone() for name, parameter in loss.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in loss.parameters() if p.requires_grad], lr=0.05, weight_decay=0.0)
    losses = []
    for step in range(steps):
        rows = torch.cat([rows_of_kind(low, 2 * step + low) for low in (True, False)])
        parts = loss(rows if own is None else rows_of_kind(own == 0, step))
        optimizer.zero_grad()
        parts["loss"].backward()
        optimizer.step()
        losses.append(parts["loss"].item())
    moved = {name for name, parameter in loss.named_parameters() if not torch.equal(parameter, before[name])}
    return gates, seed, losses, moved


def test_joint_gates_learn_which_expert_to_ask():
    gates, seed, losses, moved = trained_gates("joint")
    assert losses[-1] < losses[0] - 0.3  # the first is that of the uniform mixture
    assert moved == {"gates.vectors.0", "gates.vectors.1", "gates.bias"}
    for low in (True, False):
        weights = gates.log_weights(seed.hidden_states(rows_of_kind(low, 999))[2]).exp()
        expert = 1 if low else 2
        assert weights[..., expert].mean() > 0.7


@pytest.mark.parametrize("own", [0, 1])
def test_an_independent_gate_opens_on_its_own_kind_and_moves_nothing_else(own):
    gates, seed, losses, moved = trained_gates("independent", own)
    assert losses[-1] < losses[0] - 0.05
    assert moved == {"gates.vectors.0"}
    opened = [
        gates.scores(seed.hidden_states(rows_of_kind(low, 999))[2])[..., 0].sigmoid().mean().item()
        for low in (own == 0, own == 1)
    ]
    assert opened[0] > 0.8
    assert opened[0] > opened[1]
