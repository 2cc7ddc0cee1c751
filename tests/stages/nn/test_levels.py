"""Every option of the central model, alone and with others: who sees whom, prefixes, caches, gradients."""

import itertools
import math
import random
from functools import partial

import loud_weights
import pytest
import torch
from torch import nn

from schemas.central import CentralConfig, CentralShape, LevelShape
from schemas.compose_model import BridgeConfig
from schemas.decoder import DecoderConfig
from stages.nn.attention import Layer
from stages.nn.central import CentralLoss, CentralModel, shifted
from stages.nn.composed import ComposedModel
from stages.nn.composed_loss import ComposedLoss
from stages.nn.decoder import Decoder
from stages.nn.flops import forward_flops
from stages.nn.levels import Level, LevelCache, ablated
from stages.nn.planning import cost_of_pass

VOCAB, TOKENS = 31, 37  # nine groups of four and a part of one
SEED = DecoderConfig(
    vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2,
    num_key_value_heads=2,
)  # fmt: skip
SHAPE = {
    "group_length": 4, "latents_per_group": 2, "encoder_layers": 1, "latent_layers": 2, "decoder_layers": 2,
    "token_window": 5, "plan_horizon": 2,
}  # fmt: skip
SECOND = LevelShape(group_length=2, latents_per_group=3, latent_layers=1, plan_horizon=1, global_layers=1)
OTHER_SECOND = LevelShape(
    group_length=2, latents_per_group=1, latent_layers=2, latent_width=24, reducer="last-k", upsampling="repeat",
    plan_horizon=3, local_layers=1, shared_positions=True,
)  # fmt: skip
THIRD = LevelShape(group_length=2, latents_per_group=2, latent_layers=1, latent_width=8, arrangement="alternating")
OPTIONS = {
    "reducer": ["perceiver", "last-k"],
    "upsampling": ["attention", "repeat"],
    "latent_width": [None, 8, 24],
    "local_layers": [0, 2],
    "global_layers": [0, 1],
    "latent_local_layers": [0, 1],
    "latent_window": [None, 2],
    "arrangement": ["series", "alternating"],
    "shared_positions": [False, True],
    "plan_horizon": [2, 1],
    "levels": [(), (SECOND,), (OTHER_SECOND,), (SECOND, THIRD), (OTHER_SECOND, THIRD)],
    "channels": [1, 2, 3],
    "channel_merge": ["scalars", "features"],
    "depth_weighted": [False, True],
    "concept_loss": ["cosine", "mse", "both"],
    "latent_weight": [0.0, 0.1],
}
ALONE = [{name: value} for name, values in OPTIONS.items() for value in values[1:]]


def drawn(number):
    """So many combinations from the product of all options."""
    dice = random.Random(0)
    return [{name: dice.choice(values) for name, values in OPTIONS.items()} for _ in range(number)]


COMBINATIONS = [*ALONE, *drawn(20)]


def name_of(changes):
    if len(changes) > 1:
        return "drawn"
    name, value = next(iter(changes.items()))
    return f"{name}-{'-'.join(str(each.latents_per_group) for each in value) if name == 'levels' else value}"


def config_of(**changes):
    return CentralConfig.beside(CentralShape(**(SHAPE | changes)), SEED)


def loud(module, std=0.25):
    """The same weights in every call."""
    torch.manual_seed(0)
    return loud_weights.loud(module, std)


def make(**changes):
    return loud(CentralModel(config_of(**changes)))


def some_ids(rows, tokens=TOKENS, seed=1):
    return torch.randint(VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def moved_by(states_of, row_BN, changed):
    """For every place of one row, the places whose states move when it is changed."""
    several = row_BN.repeat(row_BN.shape[1] + 1, *[1] * (row_BN.dim() - 1))
    for place in range(row_BN.shape[1]):
        several[place, place] = changed(several[place, place])
    out = states_of(several)
    scale = out.abs().max()
    return [((out[place] - out[-1]).abs().amax(-1) > 1e-6 * scale).nonzero().flatten().tolist()
            for place in range(row_BN.shape[1])]  # fmt: skip


def next_id(token):
    return (token + 1) % VOCAB


@pytest.mark.parametrize("changes", COMBINATIONS, ids=name_of)
def test_no_token_moves_logits_before_it_in_training_with_targets(changes):
    model = make(**changes).train()
    seen = []
    model.register_forward_hook(lambda module, args, out: seen.append(out.logits_BTV.detach()))

    def logits_of(row_BT):
        CentralLoss(model)(row_BT)
        return seen[-1]

    for token, moved in enumerate(moved_by(logits_of, some_ids(1), next_id)[:-1]):
        assert moved and min(moved) == token, f"token {token} moves {moved}"


@pytest.mark.parametrize("changes", COMBINATIONS, ids=name_of)
def test_logits_of_a_prefix_and_of_any_chunks_are_those_of_the_whole(changes):
    model, ids = make(**changes).eval(), some_ids(2)
    whole = model(ids)
    close = {"atol": 1e-4 * float(whole.logits_BTV.detach().abs().max()), "rtol": 0}
    for tokens in (1, 3, 4, 7, 8, 15, 16, 17, 24, 31, 33):
        torch.testing.assert_close(model(ids[:, :tokens]).logits_BTV, whole.logits_BTV[:, :tokens], **close)
    for chunks in ([1] * 37, [3, 1, 7, 2, 10, 14], [2, 35], [16, 16, 5], [9, 28]):
        cache = model.new_cache()
        parts = [model(chunk, cache) for chunk in ids.split(chunks, 1)]
        torch.testing.assert_close(torch.cat([part.logits_BTV for part in parts], 1), whole.logits_BTV, **close)
        for level, output in enumerate(whole.levels):
            made = [part.levels[level].prediction_BMHE for part in parts if len(part.levels) > level]
            torch.testing.assert_close(torch.cat(made, 1), output.prediction_BMHE, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("changes", COMBINATIONS, ids=name_of)
def test_every_parameter_gets_a_gradient_and_only_expectations_need_a_loss_of_their_own(changes):
    model = make(**changes, concept_weight=0.0)
    CentralLoss(model)(some_ids(2, TOKENS + 1))["loss"].backward()
    silent = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert silent <= set(alone(model))


def alone(model):
    """Queries and keys of local layers over one latent, which sees itself whatever they are."""
    for name, part in model.named_modules():
        if isinstance(part, Level) and part.config.all_levels[part.number - 1].latents_per_group == 1:
            for stack in ("first_layers", "latent_layers"):
                for number, is_local in enumerate(getattr(part, stack).is_local):
                    if is_local:
                        layer = f"{name}.{stack}.{number}".lstrip(".")
                        yield from (f"{layer}.self_attn.{side}_proj.weight" for side in "qk")


@pytest.mark.parametrize("second", [SECOND, OTHER_SECOND])
def test_a_unit_receives_from_all_groups_before_its_own_and_from_no_other(second):
    config = config_of(levels=(second,))
    level = loud(Level(config, 2))
    units = config.units(2)

    def received(x_BNC):
        return level.think(x_BNC, LevelCache(config, 2))[0]

    row = torch.randn(1, 4 * units + 1, 16, generator=torch.Generator().manual_seed(0))
    for unit, moved in enumerate(moved_by(received, row, lambda state: state + 1)):
        after = range((unit // units + 1) * units, len(row[0]))
        last = unit % units == units - 1
        if second.reducer == "perceiver" or last:
            assert moved == [unit, *after]
        else:  # of a group it keeps the last state only, and this one is not it
            assert moved == [unit]


def test_a_level_above_is_heard_two_groups_after_what_it_read():
    """Tokens 0-7 are group 0 of level two; groups 2 and 3 of level one (8-15) read it, tokens 12 and on those."""
    model, ids = make(levels=(SECOND,)).eval(), some_ids(1)
    for part in ("latents_2", "plan_2"):
        changed = (model(ids).logits_BTV - model(ids, ablate=frozenset({part})).logits_BTV).abs().amax(-1)[0]
        assert (changed[:4] == 0).all(), "tokens of the first group hear of no group"
        assert (changed[4:] > 0).all(), "what stands for a group before the first is left out, too"
    silent = loud(CentralModel(config_of(levels=(SECOND,))))
    above = silent.above
    nn.init.zeros_(above.start_KD)
    nn.init.zeros_(above.start_HD)
    nn.init.zeros_(above.plan_reader.attention.o_proj.weight)
    changed = (silent(ids).logits_BTV - silent(ids, ablate=frozenset({"latents_2"})).logits_BTV).abs().amax(-1)[0]
    assert (changed[:12] == 0).all() and (changed[12:] > 0).all()


def test_exchanging_gives_each_row_what_another_row_has():
    model, ids = make().eval(), some_ids(2)
    same = ids[:1].expand(2, -1)
    for part in ("latents", "plan"):
        exchanged = frozenset({f"{part} exchanged"})
        torch.testing.assert_close(model(same).logits_BTV, model(same, ablate=exchanged).logits_BTV, atol=1e-4, rtol=0)
        assert not torch.allclose(model(ids).logits_BTV, model(ids, ablate=exchanged).logits_BTV, atol=1e-3)


def test_static_gives_all_groups_of_all_rows_their_mean():
    state = torch.randn(2, 5, 3, 4)
    static = ablated(state, "plan", frozenset({"plan static", "latents exchanged"}))
    torch.testing.assert_close(static, state.mean((0, 1)).expand_as(state))
    assert ablated(state, "plan", frozenset({"plan_2 static", "latents"})) is state
    model, ids = make().eval(), some_ids(2)
    for part in ("latents static", "plan static"):
        assert not torch.allclose(model(ids).logits_BTV, model(ids, ablate=frozenset({part})).logits_BTV, atol=1e-3)


def test_the_default_computes_what_it_did_before_there_were_options():
    """Equal to the last bit where matrix products round as they did; weights drawn in another order differ widely."""
    torch.manual_seed(0)
    seed = DecoderConfig(**(SEED.model_dump() | {"num_key_value_heads": 1}))
    shape = CentralShape(
        group_length=4, latents_per_group=3, encoder_layers=2, latent_layers=3, decoder_layers=3, token_window=7,
        plan_horizon=2,
    )  # fmt: skip
    loss = CentralLoss(CentralModel(CentralConfig.beside(shape, seed)))
    parts = loss(some_ids(2, 24))
    parts["loss"].backward()
    assert {name: float(part.detach()) for name, part in parts.items()} == pytest.approx(
        {
            "loss": float.fromhex("0x1.c628a20000000p+1"),
            "token_loss": float.fromhex("0x1.b955f00000000p+1"),
            "concept_loss": float.fromhex("0x1.0075d80000000p+0"),
        },
        rel=1e-6,
    )
    gradient = sum(float(parameter.grad.double().abs().sum()) for parameter in loss.parameters())
    assert gradient == pytest.approx(float.fromhex("0x1.33f42be3420ccp+5"), rel=1e-6)
    assert {name.split(".")[0] for name in loss.central.weights()} == {
        "start_KD", "start_HD", "embed_tokens", "encoder", "reducer", "latent_layers", "latent_norm", "heads",
        "upsampler", "plan_reader", "decoder", "norm",
    }  # fmt: skip


def test_a_level_above_leaves_the_names_of_those_below():
    one, two = CentralModel(config_of()).weights(), CentralModel(config_of(levels=(SECOND,))).weights()
    assert {name: tensor.shape for name, tensor in one.items()}.items() <= {n: t.shape for n, t in two.items()}.items()
    assert {name.split(".")[0] for name in two.keys() - one.keys()} == {"above"}


def test_the_tokens_of_a_row_begin_where_step_and_content_say_whatever_the_micro_batch():
    row = torch.arange(40)[None] + 100 * torch.arange(12)[:, None]
    starts = []
    for step in range(30):
        torch.manual_seed(step)
        whole = shifted(row, 8)
        assert whole.shape == (12, 33)
        assert torch.equal(whole, torch.cat([shifted(part, 8) for part in row.split(5)]))
        assert torch.equal(whole - whole[:, :1], torch.arange(33).expand(12, -1))
        starts.append((whole[:, 0] - row[:, 0]).tolist())
    assert set(itertools.chain(*starts)) == set(range(8))
    assert all(len({start[number] for start in starts}) > 1 for number in range(12))
    assert all(len(set(start)) > 1 for start in starts)


def test_a_random_phase_is_for_training_only():
    row, seen = some_ids(2, 38), []
    loss = CentralLoss(make(random_phase=True, levels=(SECOND,)))
    loss.central.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    loss.train()(row)
    assert seen[-1].shape == (2, 38 - 7 - 1) and torch.equal(seen[-1], shifted(row, 8)[:, :-1])
    loss.eval()(row)
    assert torch.equal(seen[-1], row[:, :-1])


def test_levels_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="latents_per_group 5 is more than group_length 2 groups of 2 latents, of lev"):
        config_of(levels=(LevelShape(group_length=2, latents_per_group=5),))
    with pytest.raises(ValueError, match="latents_per_group 5 is more than group_length 4"):
        config_of(latents_per_group=5)
    with pytest.raises(ValueError, match="latent_width 12 is not a multiple of 8"):
        config_of(levels=(LevelShape(latent_width=12),))


def test_a_shape_with_levels_comes_back_from_its_file_and_levels_from_flags():
    config = config_of(levels=(OTHER_SECOND, THIRD), depth_weighted=True, channels=2)
    assert CentralConfig.from_mapping(config.model_dump(mode="json")) == config
    flags = CentralShape.from_mapping({"levels": ['{"group_length": 2, "latents_per_group": 3}']})
    assert flags.levels == (LevelShape(group_length=2, latents_per_group=3),)
    for wrong, message in [
        ("group_length=2", "level 2: not valid JSON"),
        ({"group_size": 2}, "level 2: unknown key `group_size`"),
        ("[3]", "level 2"),
        (7, "level 2 must be a table of settings, found 7"),
    ]:
        with pytest.raises(ValueError, match=message):
            CentralShape.from_mapping({"levels": [wrong]})


def test_shared_positions_are_in_what_is_reduced_too():
    for shared in (False, True):
        model, ids = make(shared_positions=shared).eval(), some_ids(1)
        before = model(ids).levels[0].latent_BMKD
        model.upsampler.place_GD.data[0] += 1
        assert torch.equal(model(ids).levels[0].latent_BMKD, before) != shared


@pytest.mark.parametrize("bridge", ["stitch", "calm"])
def test_bridges_read_at_latents_of_another_width_below_other_levels(bridge):
    config = config_of(latent_width=24, levels=(SECOND,), latent_local_layers=1, channels=2, random_phase=True)
    model = ComposedModel(CentralModel(config), [Decoder(SEED), Decoder(SEED)], BridgeConfig(bridge=bridge))
    loud(model)
    assert set(model.bridges.depths) == {"latent_0", "latent_1", "token_0", "head"}
    row, seen = some_ids(1), []
    model.central.embed_tokens.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    parts = ComposedLoss(model.train())(row)
    parts["loss"].backward()
    assert torch.equal(seen[0], shifted(row, 8)[:, :-1])
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.bridges.parameters() if parameter.dim() > 1)
    model.eval()
    for token, moved in enumerate(moved_by(lambda ids: model(ids).logits_BTV.detach(), row, next_id)):
        assert min(moved) == token
    cache, whole = model.new_cache(), model(row).logits_BTV
    pieces = torch.cat([model(chunk, cache).logits_BTV for chunk in row.split([9, 1, 14, 13], 1)], 1)
    torch.testing.assert_close(pieces, whole, atol=1e-4 * float(whole.detach().abs().max()), rtol=0)


def test_the_shortest_row_has_two_groups_of_every_level_wherever_it_begins():
    shape = CentralShape(**SHAPE, levels=(SECOND, THIRD))
    assert shape.shortest_row() == 32
    shape = shape.model_copy(update={"random_phase": True})
    assert shifted(some_ids(3, shape.shortest_row() + 1), shape.span(3)).shape == (3, 33)


def test_what_a_training_with_all_options_costs_can_be_planned():
    everything = {name: values[-1] for name, values in OPTIONS.items()} | {"random_phase": True}
    config = config_of(**everything)
    rows, tokens = 2, 48
    plan = partial(cost_of_pass, lambda: CentralLoss(CentralModel(config)), rows, tokens)
    whole, again, half = plan(half=False), plan(half=False, recompute=True), plan(half=True)
    model = CentralModel(config)
    assert whole.trained == half.trained == sum(parameter.numel() for parameter in model.parameters())
    seen = tokens - config.span(3) + 1  # a row that begins at a random token is shorter
    forward = forward_flops(model, seen) * seen * rows
    assert 2.5 * forward < whole.flops < 3.5 * forward
    assert half.flops == whole.flops and half.kept < whole.kept
    assert again.kept < whole.kept and again.flops > whole.flops


@pytest.mark.parametrize(
    "changes", [{}, {"levels": (SECOND,), "channels": 2, "latent_window": 2}], ids=["plain", "more"]
)
def test_layers_computed_once_more_for_the_gradient_find_the_cache_as_it_was(changes):
    gradients = []
    for recompute in (False, True):
        model = make(**changes)
        for part in model.modules():
            if isinstance(part, Layer):
                part.recompute = recompute
        CentralLoss(model)(some_ids(2))["loss"].backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"levels": (SECOND, THIRD)}, *drawn(2)], ids=["levels", "drawn0", "drawn1"])
def test_leak_alarm_random_tokens_stay_at_the_entropy(changes):
    torch.manual_seed(0)
    loss = CentralLoss(CentralModel(config_of(**changes)))
    optimizer = torch.optim.AdamW(loss.parameters(), lr=5e-3)
    last = []
    for step in range(300):
        parts = loss(some_ids(16, TOKENS, seed=step))
        last.append(float(parts["token_loss"]))
        parts["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sum(last[-50:]) / 50 > math.log(VOCAB) - 0.01
