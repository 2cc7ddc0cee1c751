import math
from functools import partial

import pytest
import torch
from torch import nn
from toy_composed import OTHER, SEED, SHAPE, VOCAB, composed

from schemas.central import CentralConfig
from schemas.compose_model import BridgeConfig
from stages.nn.composed import ComposedModel, site_depths
from stages.nn.composed_loss import ComposedLoss
from stages.nn.decoder import token_log_probs
from stages.nn.experts import FADING


def some_ids(rows, tokens, seed=1):
    return torch.randint(VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


BRIDGES = pytest.mark.parametrize("bridge", ["stitch", "calm", "stitch of states"])


@BRIDGES
def test_no_token_moves_logits_before_it_in_training_with_targets(bridge):
    model = composed(bridge).train()
    assert {"latent_1", "latent_2", "token_1", "head"} == set(model.bridges.depths)
    row = some_ids(2, 24)
    before = model.log_probs(row[:, :-1], row[:, 1:])[0]
    assert ComposedLoss(model)(row)["token_loss"] == -before.mean()
    for token in range(1, 23):
        other = row.clone()
        other[:, token] = (other[:, token] + 1) % VOCAB
        after = model.log_probs(other[:, :-1], other[:, 1:])[0]
        moved = ((after - before).abs().amax(0) > 1e-5).nonzero().flatten()
        assert moved.min() == token - 1  # where it is what is predicted


@BRIDGES
def test_what_a_target_is_given_is_what_the_logits_say_which_know_no_target(bridge):
    model, row = composed(bridge).eval(), some_ids(3, 24)
    expected = token_log_probs(model(row[:, :-1]).logits_BTV, row[:, 1:])
    torch.testing.assert_close(model.log_probs(row[:, :-1], row[:, 1:])[0], expected, atol=1e-5, rtol=1e-4)
    few = token_log_probs(model(row[:, :-1], active=[1]).logits_BTV, row[:, 1:])
    torch.testing.assert_close(model.log_probs(row[:, :-1], row[:, 1:], [1])[0], few, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(few, expected, atol=1e-2)


@BRIDGES
def test_experts_reach_the_next_group_through_latent_sites_alone(bridge):
    model = composed(bridge)
    del model.bridges.depths["token_1"], model.bridges.sites["token_1"]
    nn.init.zeros_(model.bridges.sites["head"].open.weight)
    nn.init.constant_(model.bridges.sites["head"].open.bias, -1e4)  # shut
    ids = some_ids(1, 12)
    before = model(ids).logits_BTV
    with torch.no_grad():
        for parameter in model.experts.parameters():
            parameter.add_(0.3)
    moved = ((model(ids).logits_BTV - before).abs().amax((0, 2)) > 1e-6).tolist()
    assert moved == [False] * 4 + [True] * 8


@BRIDGES
@pytest.mark.parametrize("chunks", [[1] * 23, [3, 1, 7, 2, 10], [2, 21], [4, 4, 4, 11]])
def test_any_chunks_with_a_cache_equal_the_whole(bridge, chunks):
    model = composed(bridge).eval()
    ids, cache = some_ids(2, 23), model.new_cache()
    whole = model(ids).logits_BTV
    logits = torch.cat([model(chunk, cache).logits_BTV for chunk in ids.split(chunks, 1)], 1)
    torch.testing.assert_close(logits, whole, atol=5e-5, rtol=1e-4)


@BRIDGES
def test_the_last_logits_alone_are_those_of_all(bridge):
    model = composed(bridge).eval()
    ids, cache = some_ids(2, 23), model.new_cache()
    model(ids[:, :9], cache, last=True)
    last = model(ids[:, 9:], cache, last=True).logits_BTV
    torch.testing.assert_close(last, model(ids).logits_BTV[:, -1:], atol=5e-5, rtol=1e-4)


@BRIDGES
def test_logits_of_a_prefix_do_not_depend_on_what_follows(bridge):
    model = composed(bridge).eval()
    ids = some_ids(2, 23)
    whole = model(ids).logits_BTV
    for tokens in (1, 3, 4, 5, 8, 15, 22):
        torch.testing.assert_close(model(ids[:, :tokens]).logits_BTV, whole[:, :tokens], atol=5e-5, rtol=1e-4)


@BRIDGES
def test_without_bridges_it_is_the_central_model_exactly(bridge):
    model = composed(bridge)
    ids = some_ids(2, 23)
    assert torch.equal(model(ids, ablate=frozenset({"bridges"})).logits_BTV, model.central(ids).logits_BTV)
    assert not torch.equal(model(ids).logits_BTV, model.central(ids).logits_BTV)


@BRIDGES
def test_bridges_may_read_another_row_or_the_mean_of_all(bridge):
    model, ids = composed(bridge).eval(), some_ids(2, 23)
    same = ids[:1].expand(2, -1)
    for part in ("bridges exchanged", "bridges static"):
        changed = model(ids, ablate=frozenset({part})).logits_BTV
        assert not torch.allclose(changed, model(ids).logits_BTV, atol=1e-3)
    exchanged = frozenset({"bridges exchanged"})
    torch.testing.assert_close(model(same, ablate=exchanged).logits_BTV, model(same).logits_BTV)


@BRIDGES
@pytest.mark.parametrize(
    "part", ["bridges", "bridges exchanged", "bridges static", "experts", "latents", "plan static"]
)
def test_the_last_logits_alone_are_those_of_all_without_a_part_too(bridge, part):
    model, ids, ablate = composed(bridge, experts=(SEED, SEED)).eval(), some_ids(2, 23), frozenset({part})
    last = model(ids, ablate=ablate, last=True).logits_BTV
    torch.testing.assert_close(last, model(ids, ablate=ablate).logits_BTV[:, -1:], atol=5e-5, rtol=1e-4)


def test_static_states_and_priors_are_their_means():
    model, ids = composed(), some_ids(2, 9)
    given = model.consult(ids, model.new_cache())
    static = given.static()
    for had, has in zip(given.state_XLBTE, static.state_XLBTE, strict=True):
        torch.testing.assert_close(has[-1], had[-1].mean((0, 1)).expand_as(had[-1]))
    torch.testing.assert_close(static.prior_BTXF, given.prior_BTXF.mean((0, 1)).expand_as(given.prior_BTXF))


def test_experts_in_each_others_place_change_the_logits():
    model = composed(experts=(SEED, SEED), gate=False)
    ids = some_ids(2, 23)
    assert not torch.allclose(model(ids, ablate=frozenset({"experts"})).logits_BTV, model(ids).logits_BTV)


def test_the_mixture_is_that_of_the_predictions_by_shares_that_sum_to_one():
    model, ids = composed().eval(), some_ids(2, 11)
    cache = model.new_cache()
    experts = model.consult(ids, cache)
    model.bridges.remember(experts, cache.bridges)
    read = partial(model.bridges, experts=experts, caches=cache.bridges)
    state = model.central.states(ids, read=read)[0]
    share = model.bridges.sites["head"].shares(state, experts.prior_BTXF)
    torch.testing.assert_close(share.sum(-1), torch.ones(2, 11))
    predictions = [model.central.lm_head(state), *(expert(ids) for expert in model.decoders)]
    mixed = sum(share[..., n : n + 1] * logits.softmax(-1) for n, logits in enumerate(predictions))
    torch.testing.assert_close(model(ids).logits_BTV.exp(), mixed, atol=1e-6, rtol=1e-4)


def test_with_all_weight_on_one_experts_prediction_the_logits_are_that_experts():
    model = composed(experts=(SEED, OTHER), gate=False, evidence=False)
    head = model.bridges.sites["head"]
    with torch.no_grad():
        nn.init.zeros_(head.choose.weight)
        nn.init.zeros_(head.open.weight)
        head.open.bias.fill_(100.0)
        head.prior.bias_X.copy_(torch.tensor([-200.0, 0.0]))
    ids = some_ids(2, 11)
    expected = model.decoders[1](ids).log_softmax(-1)
    torch.testing.assert_close(model(ids).logits_BTV, expected, atol=1e-4, rtol=1e-4)


def test_with_all_weight_on_one_experts_state_the_logits_are_that_experts():
    model = composed("stitch of states", experts=(SEED, SEED), gate=False, evidence=False)
    expert = model.decoders[1]
    model.central.embed_tokens.weight.data.copy_(expert.model.embed_tokens.weight)
    model.central.lm_head.weight.data.copy_(expert.lm_head.weight)
    head = model.bridges.sites["head"]
    with torch.no_grad():
        nn.init.eye_(head.project[1].weight)
        nn.init.zeros_(head.choose.weight)
        nn.init.zeros_(head.open.weight)
        head.open.bias.fill_(100.0)
        head.prior.bias_X.copy_(torch.tensor([-200.0, 0.0]))
    ids = some_ids(2, 11)
    torch.testing.assert_close(model(ids).logits_BTV, expert(ids), atol=1e-4, rtol=1e-4)


@BRIDGES
def test_training_changes_central_model_and_bridges_and_no_expert(bridge):
    model = composed(bridge, shake=False)
    frozen = {name: p.clone() for name, p in model.named_parameters() if name.startswith(("experts.", "gate."))}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for step in range(3):
        ComposedLoss(model)(some_ids(4, 25, step))["loss"].backward()
        silent = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert silent == []
        optimizer.step()
    after = dict(model.named_parameters())
    assert frozen and all(torch.equal(after[name], value) for name, value in frozen.items())
    assert all(after[name].grad is None for name in frozen)


@BRIDGES
def test_bridges_alone_can_be_trained_and_every_one_of_them_is(bridge):
    model = composed(bridge)
    model.central.requires_grad_(False)
    ComposedLoss(model)(some_ids(2, 24))["loss"].backward()
    silent = [name for name, p in model.bridges.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


def test_evidence_is_the_faded_log_likelihood_of_the_tokens_so_far():
    model = composed(gate=False)
    ids, cache = some_ids(2, 9), model.new_cache()
    prior = model.consult(ids, cache).prior_BTXF
    likelihood = torch.stack([token_log_probs(e(ids[:, :-1]), ids[:, 1:]) for e in model.decoders], -1)
    likelihood = likelihood - likelihood.mean(-1, keepdim=True)
    faded = torch.zeros(2, 2)
    assert (prior[:, 0] == 0).all()
    for token in range(1, 9):
        faded = likelihood[:, token - 1] + FADING[1] * faded
        torch.testing.assert_close(prior[:, token, :, 1], faded, atol=1e-4, rtol=1e-4)


def test_sites_are_spread_and_the_last_reads_the_experts_last_state():
    config = CentralConfig.beside(SHAPE.model_copy(update={"latent_layers": 6}), SEED)
    depths = site_depths(BridgeConfig(token_sites=3, latent_sites=2), config)
    assert depths == {"latent_2": 0.5, "latent_5": 1.0, "token_0": 3 / 5, "token_1": 4 / 5, "head": 1.0}
    assert site_depths(BridgeConfig(token_sites=1, latent_sites=0), config) == {"head": 1.0}


@BRIDGES
def test_weights_hold_no_expert_and_come_back(bridge):
    model = composed(bridge)
    weights = model.weights()
    assert not [name for name in weights if not name.startswith(("central.", "bridges."))]
    again = ComposedModel.from_weights(model.central.config, model.config, weights, model.decoders, model.gate)
    ids = some_ids(1, 11)
    model.requires_grad_(False)  # as `again` is: torch picks its products by it
    assert torch.equal(model(ids).logits_BTV, again(ids).logits_BTV)


@BRIDGES
def test_one_batch_can_be_learnt_by_heart(bridge):
    model = composed(bridge, shake=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    row, losses = some_ids(4, 21), []
    for _ in range(80):
        parts = ComposedLoss(model)(row)
        losses.append(float(parts["token_loss"]))
        parts["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 1.0 < 3.0 < losses[0]


@pytest.mark.slow
@BRIDGES
def test_leak_alarm_random_tokens_stay_at_the_entropy(bridge):
    model = composed(bridge, shake=False, experts=(SEED,))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for step in range(300):
        parts = ComposedLoss(model)(some_ids(16, 22, seed=step))
        losses.append(float(parts["token_loss"]))
        parts["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sum(losses[-50:]) / 50 > math.log(VOCAB) - 0.01
