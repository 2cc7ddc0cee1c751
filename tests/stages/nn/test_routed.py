from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from toy_routed import CONFIG, END, VOCAB, WIDTH, loud, loud_adapters, routed, rows, vectors

from schemas.train_gates import Selection
from stages.nn.decoder import Decoder, NextTokenLoss
from stages.nn.gate_losses import RoutedContrastiveLoss, RoutedLoss
from stages.nn.gates import Gates, normalise
from stages.nn.routed import RoutedLinear, RoutedMLP

EVERY = pytest.mark.parametrize(
    ("kind", "place", "mode", "memory"),
    [
        ("lora", "module", "independent", 0.0),
        ("lora", "module", "joint", 0.9),
        ("lora", "layer", "joint", 0.9),
        ("lora", "module", "arrow", 0.9),
        ("full", "module", "joint", 0.0),
        ("full", "layer", "contrastive", 0.9),
        ("full", "module", "mean-activation", 0.9),
    ],
)


def merged(number):
    seed = loud(0)
    changes = loud_adapters(number + 1)[number]
    weights = {name: weight + changes[name][1] @ changes[name][0] if name in changes else weight
               for name, weight in seed.weights().items()}  # fmt: skip
    return Decoder.from_weights(CONFIG, weights)


def certain(number, count=3):
    """Weighs one expert alone, or with -1 the seed, whatever is read."""

    def weigh(gates, read):
        weights = torch.full((*read.shape[:2], count + 1), -torch.inf)
        weights[..., number + 1] = 0.0
        return weights

    return weigh


@pytest.mark.parametrize("number", [0, 2])
def test_a_lora_expert_that_is_always_chosen_is_the_merged_expert(number):
    decoder = routed()
    decoder.gates.weigh = certain(number)
    torch.testing.assert_close(decoder(rows()), merged(number)(rows()), atol=1e-4, rtol=1e-4)


def test_no_expert_is_the_seed():
    for kind in ("lora", "full"):
        decoder = routed(kind)
        decoder.gates.weigh = certain(-1)
        torch.testing.assert_close(decoder(rows()), loud(0)(rows()), atol=1e-5, rtol=1e-5)


def test_a_full_expert_that_is_always_chosen_gives_its_mlps_and_the_shared_rest():
    decoder = routed("full")
    decoder.gates.weigh = certain(1)
    mixed = {**loud(0).weights(), **{name: w for name, w in loud(2).weights().items() if ".mlp." in name}}
    torch.testing.assert_close(decoder(rows()), Decoder.from_weights(CONFIG, mixed)(rows()), atol=1e-4, rtol=1e-4)


def linear_parts(count=3, rank=2):
    draw = torch.Generator().manual_seed(2)
    linear = nn.Linear(5, 4, bias=False)
    linear.weight = nn.Parameter(torch.randn(4, 5, generator=draw), requires_grad=False)
    pairs = [(torch.randn(rank, 5, generator=draw), torch.randn(4, rank, generator=draw)) for _ in range(count)]
    return linear, pairs, torch.randn(2, 6, 5, generator=draw)


@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_a_routed_linear_layer_is_the_papers_sum(top_k):
    """y = W u + sum_x w_x B_x A_x u with w the softmax of v̂ · û / sqrt(D) over the chosen experts."""
    linear, pairs, u = linear_parts()
    gates = Gates(torch.randn(3, 5, generator=torch.Generator().manual_seed(3)), None, "independent")
    layer = RoutedLinear(linear, pairs, lambda x: gates.log_weights(x, Selection(top_k=top_k)))

    def unit(x):
        return (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True, unbiased=False)

    for found, x in zip(layer(u).flatten(0, 1), u.flatten(0, 1), strict=True):
        scores = torch.stack([unit(v) @ unit(x) / 5**0.5 for v in gates.vectors])
        chosen = scores.topk(top_k or 3).indices
        weights = scores[chosen].softmax(0)
        updates = [w * pairs[e][1] @ pairs[e][0] @ x for w, e in zip(weights, chosen.tolist(), strict=True)]
        torch.testing.assert_close(found, linear.weight @ x + sum(updates), atol=1e-4, rtol=1e-4)


def test_training_alone_is_the_papers_formula_by_hand():
    """y = W u + sigmoid(v · u) B A u: W = (1, 1), A = (1, 0), B = 2, v = (0, 1), u = (3, ln 3), so sigmoid is 3/4."""
    linear = nn.Linear(2, 1, bias=False)
    linear.weight = nn.Parameter(torch.ones(1, 2), requires_grad=False)
    gates = Gates(torch.tensor([[0.0, 1.0]]), None, "independent")
    layer = RoutedLinear(linear, [(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0]]))], gates.training_log_weights)
    third = torch.tensor(3.0).log()
    found = layer(torch.stack([torch.tensor(3.0), third])[None, None])
    assert found.item() == pytest.approx(3 + third.item() + 0.75 * 2 * 3, rel=1e-6)


@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_a_routed_mlp_is_the_weighted_sum_of_all(top_k):
    seed, *experts = (loud(number).model.layers[0].mlp for number in range(4))
    gates = Gates(torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(3)), None, "joint")
    ask = partial(gates.log_weights, selection=Selection(top_k=top_k))
    u = torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(4))
    weights = ask(u).exp()
    expected = sum(weights[..., slot, None] * mlp(u) for slot, mlp in enumerate([seed, *experts]))
    torch.testing.assert_close(RoutedMLP(seed, experts, ask)(u), expected, atol=1e-4, rtol=1e-4)


@EVERY
@pytest.mark.parametrize("top_k", [None, 1])
def test_tokens_to_come_do_not_move_what_is_before_them(kind, place, mode, memory, top_k):
    decoder = routed(kind, place=place, mode=mode, memory=memory, selection=Selection(top_k=top_k))
    ids = rows()
    other = ids.clone()
    other[:, 7:] = (other[:, 7:] + 1) % VOCAB
    first, second = decoder(ids), decoder(other)
    torch.testing.assert_close(first[:, :7], second[:, :7], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(first[:, 7:], second[:, 7:])


@EVERY
def test_with_a_cache_it_reads_as_without(kind, place, mode, memory):
    decoder = routed(kind, place=place, mode=mode, memory=memory, selection=Selection(top_k=2))
    ids, cache = rows(), decoder.new_cache()
    pieces = [decoder(ids[:, start:stop], cache) for start, stop in ((0, 1), (1, 6), (6, 7), (7, 11))]
    torch.testing.assert_close(torch.cat(pieces, 1), decoder(ids), atol=1e-3, rtol=1e-3)


def test_gates_of_a_layer_answer_for_all_its_modules_and_those_of_modules_for_one():
    layer, module = routed(place="layer"), routed(place="module")
    assert [*layer.gates.by_name] == [f"model.layers.{number}" for number in range(3)]
    assert set(module.gates.by_name) == set(module.routed()) and len(module.gates.by_name) == 21
    assert module.gates.asked_by == {name: name for name in module.routed()}
    assert layer.gates.asked_by == {path: ".".join(path.split(".")[:3]) for path in module.routed()}
    asked = []
    real = layer.gates.weigh
    layer.gates.weigh = lambda gates, read: asked.append(read.shape[-1]) or real(gates, read)
    layer(rows())
    assert asked == [WIDTH] * 3
    assert set(layer.gates.told) == set(layer.gates.by_name)


@pytest.mark.parametrize("memory", [0.0, 0.9])
def test_gates_read_the_input_or_the_fading_sum_of_a_document(memory):
    decoder, ids = routed("full", memory=memory), rows()
    seed = loud(0)
    u = seed.model.layers[0].input_layernorm(seed.model.embed_tokens(ids))
    heard = routed(memory=memory).listen(ids)["model.layers.0.self_attn.q_proj"]
    if not memory:
        torch.testing.assert_close(heard, u)
    else:
        for row in (0, 1):
            begin = max([0, *(ids[row] == END).nonzero().flatten().tolist()])
            total = sum(memory ** (10 - token) * normalise(u)[row, token] for token in range(begin, 11))
            torch.testing.assert_close(heard[row, 10], normalise(total), atol=1e-4, rtol=1e-4)
    assert decoder.gates.told == {}


def test_listening_asks_nobody_and_leaves_the_weights_as_they_were():
    decoder, ids = routed(), rows()
    before = decoder(ids)
    decoder.listen(ids)
    assert all((told[..., 1:] == -torch.inf).all() for told in decoder.gates.told.values())
    assert torch.equal(decoder(ids), before)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_training_moves_vectors_and_nothing_else(kind):
    decoder = routed(kind, size=None, memory=0.9)
    loss = RoutedLoss(decoder)
    before = {name: parameter.clone() for name, parameter in loss.named_parameters()}
    trained = [parameter for parameter in loss.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05, weight_decay=0.0)
    found = []
    for _ in range(30):
        parts = loss(rows())
        parts["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(parts["loss"].item())
    assert found[-1] < found[0] - 0.02
    moved = {name for name, parameter in loss.named_parameters() if not torch.equal(parameter, before[name])}
    gates = 21 if kind == "lora" else 3
    assert moved == {f"decoder.gates.gates.{gate}.vectors.{expert}" for gate in range(gates) for expert in range(3)}
    assert sum(parts[f"open_{slot}"].item() for slot in range(4)) == pytest.approx(1, abs=1e-5)


def test_closed_gates_are_uniform_over_all_slots():
    decoder = routed(size=None)
    decoder(rows())
    assert all(torch.allclose(told.exp(), torch.tensor(0.25)) for told in decoder.gates.told.values())


def test_the_loss_is_the_next_tokens_of_the_routed_decoder():
    decoder = routed(size=None)
    assert RoutedLoss(decoder)(rows())["loss"] == NextTokenLoss(decoder)(rows())["loss"]


def test_the_contrastive_loss_is_the_mean_over_gates_read_by_the_seed():
    decoder = routed(mode="contrastive", place="layer")
    clusters = torch.tensor([2, 0, 1])
    found = RoutedContrastiveLoss(decoder)(torch.cat([rows(), clusters[:, None]], 1))["loss"]
    own = (clusters[:, None] == torch.arange(3)).float()[:, None].expand(3, 10, 3)
    each = [
        F.binary_cross_entropy((read @ decoder.gates.by_name[name].stacked().T).sigmoid(), own)
        for name, read in decoder.listen(rows()[:, :-1]).items()
    ]
    assert found.item() == pytest.approx(torch.stack(each).mean().item(), rel=1e-4)


def test_arrows_are_the_first_right_singular_vectors():
    changes = loud_adapters(3)
    module = routed().routed()["model.layers.1.mlp.down_proj"]
    for found, (a, b) in zip(module.directions(), (each["model.layers.1.mlp.down_proj.weight"] for each in changes),
                             strict=True):  # fmt: skip
        expected = torch.linalg.svd(b @ a).Vh[0]
        assert abs(found @ expected) == pytest.approx(1, abs=1e-4)
    seed, expert = loud(0).model.layers[1].mlp, loud(2).model.layers[1].mlp
    change = torch.cat([expert.gate_proj.weight - seed.gate_proj.weight, expert.up_proj.weight - seed.up_proj.weight])
    found = routed("full").routed()["model.layers.1.mlp"].directions()[1]
    assert abs(found @ torch.linalg.svd(change).Vh[0]) == pytest.approx(1, abs=1e-4)


def test_the_sign_of_an_arrow_does_not_count():
    one = routed(mode="arrow")
    other = routed(mode="arrow", tensors={name: -tensor for name, tensor in vectors(one, 3).items()})
    torch.testing.assert_close(one(rows()), other(rows()))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_token_costs_what_it_asks_however_many_experts_there_are(kind):
    ids = rows(1, 12)
    for count in (2, 8):
        decoder = routed(kind, count, mode="independent", memory=0.0, selection=Selection(top_k=2))
        with FlopCounterMode(display=False) as counter:
            decoder(ids)
        with FlopCounterMode(display=False) as plain:
            loud(0)(ids)
        asked = {name: (told > -torch.inf).float().mean((0, 1)) for name, told in decoder.gates.told.items()}
        extra = (counter.get_total_flops() - plain.get_total_flops()) / 12
        assert decoder.flops_beside(asked) == pytest.approx(extra, rel=1e-6)
        gates = 2 * sum(gates.stacked().numel() for gates in decoder.gates.by_name.values())
        pairs = decoder.flops_beside(asked) - gates
        if count == 2:
            few = pairs
    assert pairs == pytest.approx(few, rel=1e-6)


def test_saved_gates_answer_alike():
    decoder = routed(place="layer")
    again = routed(place="layer", tensors=decoder.gate_tensors())
    assert torch.equal(decoder(rows()), again(rows()))
    assert not any(parameter.requires_grad for parameter in again.parameters())
