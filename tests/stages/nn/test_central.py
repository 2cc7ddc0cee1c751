import itertools
import math

import loud_weights
import pytest
import torch
import torch.nn.functional as F

from schemas.central import CentralConfig, CentralShape
from schemas.decoder import DecoderConfig, LinearRope
from stages.nn.central import CentralLoss, CentralModel
from stages.nn.concepts import concept_loss, concepts_of
from stages.nn.decoder import Decoder

VOCAB = 31
SEED = DecoderConfig(
    vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2,
    num_key_value_heads=1,
)  # fmt: skip
KINDS = list(itertools.product(("perceiver", "last-k"), ("repeat", "attention")))


def shape(**changes):
    values = {
        "group_length": 4, "latents_per_group": 3, "encoder_layers": 2, "latent_layers": 3, "decoder_layers": 3,
        "token_window": 7, "plan_horizon": 2,
    }  # fmt: skip
    return CentralConfig.beside(CentralShape(**(values | changes)), SEED)


def loud(module, std=0.3):
    """The same weights in every call."""
    torch.manual_seed(0)
    return loud_weights.loud(module, std)


def make(reducer="perceiver", upsampling="attention", **changes):
    return loud(CentralModel(shape(reducer=reducer, upsampling=upsampling, **changes)))


def some_ids(rows, tokens, seed=1):
    return torch.randint(VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def moved_positions(logits_of, ids_BT, token):
    """Positions whose logits change when one token does."""
    other = ids_BT.clone()
    other[:, token] = (other[:, token] + 1) % VOCAB
    difference = (logits_of(ids_BT) - logits_of(other)).abs().amax((0, 2))
    return (difference > 1e-6).nonzero().flatten().tolist()


@pytest.mark.parametrize(("reducer", "upsampling"), KINDS)
def test_no_token_moves_logits_before_it_in_training_with_targets(reducer, upsampling):
    model = make(reducer, upsampling).train()
    seen = []
    model.register_forward_hook(lambda module, args, out: seen.append(out.logits_BTV.detach()))

    def logits_of(row_BT):
        CentralLoss(model)(row_BT)
        return seen[-1]

    row = some_ids(2, 24)  # 23 inputs: five groups of four and a part of one
    for token in range(23):
        moved = moved_positions(logits_of, row, token)
        assert moved and min(moved) == token, f"token {token} moves {moved}"


@pytest.mark.parametrize(("reducer", "upsampling"), KINDS)
def test_the_past_reaches_far_beyond_the_window_through_latents(reducer, upsampling):
    model = make(reducer, upsampling, token_window=2).eval()
    moved = moved_positions(lambda ids: model(ids).logits_BTV, some_ids(1, 24), 0)
    assert 23 in moved
    alone = moved_positions(
        lambda ids: model(ids, ablate=frozenset({"latents", "plan"})).logits_BTV, some_ids(1, 24), 0
    )
    assert max(alone) <= 5  # five token layers with a window of two reach five tokens back


@pytest.mark.parametrize("without", ["latents", "plan"])
def test_the_last_token_of_a_group_reaches_the_next_group_by_latents_and_by_plan(without):
    model = make(token_window=2, encoder_layers=1, decoder_layers=1).eval()
    moved = moved_positions(lambda ids: model(ids, ablate=frozenset({without})).logits_BTV, some_ids(1, 12), 3)
    assert set(range(4, 8)) <= set(moved)


def test_a_group_is_not_seen_by_its_own_tokens_as_a_concept():
    model = make(token_window=2, encoder_layers=1, decoder_layers=1).eval()
    moved = moved_positions(lambda ids: model(ids).logits_BTV, some_ids(1, 12), 4)
    assert 7 not in moved and {8, 9, 10, 11} <= set(moved)  # two token layers reach 6; 8 is the next group


@pytest.mark.parametrize(("reducer", "upsampling"), KINDS)
def test_logits_of_a_prefix_do_not_depend_on_what_follows(reducer, upsampling):
    model = make(reducer, upsampling).eval()
    ids = some_ids(2, 23)
    whole = model(ids).logits_BTV
    for tokens in range(1, 23):
        torch.testing.assert_close(model(ids[:, :tokens]).logits_BTV, whole[:, :tokens], atol=5e-5, rtol=1e-4)


def test_a_latent_window_bounds_what_reaches_a_token_and_what_is_kept():
    model = make(token_window=2, encoder_layers=1, decoder_layers=1, latent_layers=2, latent_window=2).eval()
    cache, ids = model.new_cache(), some_ids(1, 40)
    for token in ids.split(1, 1):
        model(token, cache)
    assert [layer.k_BKSE.shape[2] for layer in cache.latents.layers] == [3, 3]  # the latents of one group before
    moved = moved_positions(lambda ids: model(ids).logits_BTV, ids, 0)
    # Group 0 is seen by the latents of groups 1 and 2, whose latents and plan reach group 3 and, by windows, one more.
    assert 15 in moved and max(moved) <= 16


@pytest.mark.parametrize("window", [1, 2, 3])
def test_a_latent_window_with_a_cache_equals_the_whole(window):
    model = make(latent_window=window).eval()
    ids, cache = some_ids(2, 43), model.new_cache()
    parts = [model(chunk, cache).logits_BTV for chunk in ids.split([5, 1, 1, 13, 4, 19], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids).logits_BTV, atol=5e-5, rtol=1e-4)
    assert not torch.allclose(model(ids).logits_BTV[:, 40:], make()(ids).logits_BTV[:, 40:], atol=1e-3)


def test_rows_of_more_than_a_block_equal_their_chunks():
    model = make().eval()
    ids, cache = some_ids(1, 600), model.new_cache()
    whole = model(ids).logits_BTV
    parts = [model(chunk, cache).logits_BTV for chunk in ids.split([270, 3, 100, 227], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=5e-5, rtol=1e-4)
    assert min(moved_positions(lambda ids: model(ids).logits_BTV, ids, 300)) == 300


def test_the_last_logits_alone_are_those_of_all():
    model = make().eval()
    ids, cache = some_ids(2, 23), model.new_cache()
    whole = model(ids).logits_BTV
    assert model(ids[:, :9], cache, last=True).logits_BTV.shape == (2, 1, VOCAB)
    torch.testing.assert_close(model(ids[:, 9:], cache, last=True).logits_BTV, whole[:, -1:], atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("chunks", [[1] * 23, [3, 1, 7, 2, 10], [2, 21], [5, 5, 5, 8], [8, 4, 11]])
@pytest.mark.parametrize(("reducer", "upsampling"), KINDS)
def test_any_chunks_with_a_cache_equal_the_whole(reducer, upsampling, chunks):
    model = make(reducer, upsampling).eval()
    ids, cache = some_ids(2, 23), model.new_cache()
    whole = model(ids)
    parts = [model(chunk, cache) for chunk in ids.split(chunks, 1)]
    assert cache.seen == 23
    logits = torch.cat([part.logits_BTV for part in parts], 1)
    torch.testing.assert_close(logits, whole.logits_BTV, atol=5e-5, rtol=1e-4)
    predictions = torch.cat([part.prediction_BMHE for part in parts], 1)
    torch.testing.assert_close(predictions, whole.prediction_BMHE, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize(("reducer", "upsampling"), KINDS)
def test_every_parameter_gets_a_gradient_from_the_tokens_alone(reducer, upsampling):
    model = make(reducer, upsampling, concept_weight=0.0)
    CentralLoss(model)(some_ids(2, 24))["loss"].backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


def test_concepts_are_normalised_sums_and_only_complete_groups_ahead_count():
    table = torch.randn(VOCAB, 5)
    ids = some_ids(2, 11)
    concept = concepts_of(F.embedding(ids, table), 4)
    assert concept.shape == (2, 2, 5)
    torch.testing.assert_close(concept[1, 1], F.normalize(table[ids[1, 4:8]].sum(0), dim=0))
    prediction = torch.randn(2, 2, 3, 5)
    expected = 1 - F.cosine_similarity(prediction[:, 0, 0], concept[:, 1], dim=-1).mean()
    torch.testing.assert_close(concept_loss(prediction, concept, "cosine"), expected)
    squared = (prediction[:, 0, 0] / 5**0.5 - concept[:, 1]).square().sum(-1).mean()
    torch.testing.assert_close(concept_loss(prediction, concept, "mse"), squared)
    assert concept_loss(prediction[:, :1], concept[:, :1], "cosine") == 0


def test_targets_ahead_of_each_horizon_are_the_right_groups():
    concept = F.normalize(torch.randn(3, 6, 8), dim=-1)
    prediction = torch.randn(3, 6, 2, 8)
    prediction[:, :5, 0] = 3 * concept[:, 1:]
    prediction[:, :4, 1] = 5 * concept[:, 2:]
    assert concept_loss(prediction, concept, "cosine") < 1e-6


def test_the_concept_loss_teaches_the_predictor_and_leaves_its_targets_alone():
    model = make()
    out = model(some_ids(2, 24))
    model.concept_loss(some_ids(2, 24), out.prediction_BMHE.detach().requires_grad_()).backward()
    assert model.embed_tokens.weight.grad is None


def test_started_from_a_seed_it_is_the_seed_where_the_window_reaches_everything():
    torch.manual_seed(0)
    seed = loud(Decoder(SEED), 0.1)
    model = CentralModel(shape(encoder_layers=2, decoder_layers=2, token_window=64))
    model.start_from(seed)
    ids = some_ids(2, 19)
    torch.testing.assert_close(model(ids, ablate=frozenset({"latents", "plan"})).logits_BTV, seed(ids))
    assert (model(ids).logits_BTV - seed(ids)).abs().max() > 1e-3


def test_more_token_layers_than_the_seed_has_repeat_none_of_them():
    seed = loud(Decoder(SEED))
    model = CentralModel(shape(encoder_layers=3, decoder_layers=3))
    model.start_from(seed)
    own = [layer.mlp.up_proj.weight for layer in (*model.encoder, *model.decoder)]
    taken = [[torch.equal(w, layer.mlp.up_proj.weight) for layer in seed.model.layers].count(True) for w in own]
    assert taken == [1, 1, 1, 0, 0, 1]


def test_weights_come_back_and_hold_a_tied_head_once():
    model = make()
    again = CentralModel.from_weights(model.config, model.weights())
    ids = some_ids(1, 9)
    assert "lm_head.weight" not in model.weights()
    assert torch.equal(model(ids).logits_BTV, again(ids).logits_BTV)
    assert again.lm_head.weight is again.embed_tokens.weight


def test_one_batch_can_be_learnt_by_heart():
    torch.manual_seed(0)
    loss = CentralLoss(CentralModel(shape()))
    optimizer = torch.optim.AdamW(loss.parameters(), lr=1e-2)
    row, losses = some_ids(4, 25), []
    for _ in range(60):
        parts = loss(row)
        losses.append(float(parts["token_loss"]))
        parts["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0] > 3.3 and losses[-1] < 0.5


@pytest.mark.slow
@pytest.mark.parametrize(("reducer", "upsampling"), KINDS)
def test_leak_alarm_random_tokens_stay_at_the_entropy(reducer, upsampling):
    torch.manual_seed(0)
    loss = CentralLoss(CentralModel(shape(reducer=reducer, upsampling=upsampling)))
    optimizer = torch.optim.AdamW(loss.parameters(), lr=5e-3)
    last = []
    for step in range(400):
        parts = loss(some_ids(16, 24, seed=step))
        last.append(float(parts["token_loss"]))
        parts["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sum(last[-50:]) / 50 > math.log(VOCAB) - 0.01


def test_another_width_keeps_the_seeds_proportions_and_an_impossible_one_is_refused():
    config = CentralConfig.beside(CentralShape(central_width=32), SEED)
    assert (config.intermediate_size, config.num_attention_heads, config.num_key_value_heads) == (48, 4, 2)
    CentralModel(config)(some_ids(1, 9))
    with pytest.raises(ValueError, match="central_width 20"):
        CentralConfig.beside(CentralShape(central_width=20), SEED)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "qwen2"},
        {"model_type": "qwen3", "head_dim": 12, "rope_scaling": LinearRope(factor=2.0)},
        {"model_type": "mistral", "head_dim": 4, "sliding_window": 3},
    ],
    ids=["qwen2", "qwen3", "mistral"],
)
def test_a_central_model_takes_over_the_layers_of_a_seed_of_any_kind(change):
    seed = loud(Decoder(DecoderConfig(**(SEED.model_dump() | {"head_dim": 8} | change))))
    central = loud(CentralModel(CentralConfig.beside(CentralShape(encoder_layers=2, decoder_layers=2), seed.config)))
    central.start_from(seed)
    for own, other in zip([*central.encoder, *central.decoder], seed.model.layers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(own.parameters(), other.parameters(), strict=True))
    ids, cache = some_ids(2, 21), central.new_cache()
    whole = central(ids).logits_BTV
    pieces = [central(chunk, cache).logits_BTV for chunk in ids.split([5, 1, 9, 6], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-5, rtol=1e-5)
    assert min(moved_positions(lambda x: central(x).logits_BTV, ids, 10)) == 10


@pytest.mark.parametrize(
    "change", [{}, {"model_type": "qwen3", "head_dim": 12, "rope_scaling": LinearRope(factor=2.0)}]
)
def test_the_shape_comes_back_from_its_file(change):
    seed = DecoderConfig(**(SEED.model_dump() | change))
    config = CentralConfig.beside(CentralShape(), seed)
    assert CentralConfig.from_mapping(config.model_dump(mode="json")) == config
    assert set(change) <= set(config.model_dump())


def test_the_token_layers_turn_like_the_seeds():
    seed = DecoderConfig(**(SEED.model_dump() | {"rope_scaling": LinearRope(factor=50.0)}))
    plain, scaled = (loud(CentralModel(CentralConfig.beside(CentralShape(), each))) for each in (SEED, seed))
    assert not torch.allclose(plain(some_ids(1, 9)).logits_BTV, scaled(some_ids(1, 9)).logits_BTV, atol=1e-3)
