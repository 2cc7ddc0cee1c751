from itertools import pairwise

import pytest
import torch
from torch import Tensor
from toy_composed import OTHER, SEED, VOCAB, composed

from stages.nn import choice
from stages.nn.bridges import CalmBridge, Prior
from stages.nn.choice import ChosenExperts
from stages.nn.composed import ComposedModel

EXPERTS, TOKENS = 4, 30
LENGTHS = [4, 2, 6, 6, 6, 6]  # of the segments: the opening, and from there on to each multiple of six
BRIDGES = pytest.mark.parametrize("bridge", ["stitch", "calm"])
GATES = pytest.mark.parametrize("gate", [True, False], ids=["gate", "no gate"])


@pytest.fixture(autouse=True)
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "OPENING", 4)
    monkeypatch.setattr(choice, "SEGMENT", 6)  # no multiple of the group length


def make(bridge: str = "stitch", gate: bool = True, evidence: bool = True) -> ComposedModel:
    experts = (SEED, OTHER, SEED, OTHER)
    model = composed(bridge, experts=experts, gate=gate, memory=0.5, size=3.0, evidence=evidence, std=0.4)
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, Prior) and part.weight_F is not None:
                part.weight_F.fill_(0.005)  # a prior that counts against an expert would choose the worst
                part.weight_F[: int(gate)] = 0.2  # loud models predict so badly that evidence would outweigh all else
                part.bias_X.zero_()
    return model.eval().requires_grad_(False)


def some_ids(rows: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (rows, TOKENS), generator=torch.Generator().manual_seed(seed))


def logits_of(chosen: ChosenExperts, ids: Tensor) -> Tensor:
    """Of texts that are read one by one."""
    return torch.cat([chosen.read(row, chosen.new_cache()) for row in ids.split(1)])


def chosen_by_segment(chosen: ChosenExperts, ids: Tensor) -> list[list[int]]:
    """Who is active in each segment; a call each."""
    cache, found = chosen.new_cache(), []
    for piece in ids.split(LENGTHS, 1):
        chosen.read(piece, cache)
        found.append(list(range(EXPERTS)) if cache.active is None else list(cache.active))
    return found


def masked_reference(
    model: ComposedModel, ids: Tensor, active: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> Tensor:
    """All experts read all tokens, and every bridge gives no weight to those that are not chosen at a reader's end."""
    closed = torch.full((TOKENS, EXPERTS), -1e4)
    for rows, experts in zip(closed.split(LENGTHS), active, strict=True):
        rows[:, experts] = 0.0
    consult, plain = model.consult, Prior.forward

    def marked(*args: object) -> object:
        states = consult(*args)
        states.prior_BTXF = torch.cat([states.prior_BTXF, closed[None, :, :, None]], -1)
        return states

    def with_marks(self: Prior, prior_BNXF: Tensor) -> Tensor:
        return plain(self, prior_BNXF[..., :-1]) + prior_BNXF[..., -1]

    with monkeypatch.context() as patch:
        patch.setattr(model, "consult", marked)
        patch.setattr(Prior, "forward", with_marks)
        return model(ids).logits_BTV


@BRIDGES
@GATES
def test_with_all_experts_active_it_is_the_composed_model(bridge: str, gate: bool) -> None:
    model, ids = make(bridge, gate), some_ids(3)
    chosen = ChosenExperts(model, EXPERTS + 3)
    torch.testing.assert_close(logits_of(chosen, ids), model(ids).logits_BTV, atol=1e-4, rtol=1e-3)
    assert chosen.read_per_token == EXPERTS


@BRIDGES
def test_a_text_no_longer_than_the_opening_is_read_by_all(bridge: str) -> None:
    model, ids = make(bridge), some_ids(2)[:, :4]
    torch.testing.assert_close(logits_of(ChosenExperts(model, 1), ids), model(ids).logits_BTV, atol=1e-4, rtol=1e-3)


@BRIDGES
@GATES
@pytest.mark.parametrize("count", [1, 2])
def test_the_chosen_alone_give_what_all_give_with_the_others_masked(
    bridge: str, gate: bool, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = make(bridge, gate), some_ids()
    chosen = ChosenExperts(model, count)
    active = chosen_by_segment(chosen, ids)
    expected = masked_reference(model, ids, active, monkeypatch)
    torch.testing.assert_close(logits_of(chosen, ids), expected, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(expected, model(ids).logits_BTV, atol=1e-2)


@BRIDGES
def test_experts_come_and_go_with_the_gates_and_none_has_holes(bridge: str) -> None:
    model, ids = make(bridge), some_ids()
    active = chosen_by_segment(ChosenExperts(model, 2), ids)
    assert active[0] == [0, 1, 2, 3]
    came = [set(now) - set(before) for before, now in pairwise(active[1:])]
    assert any(came), "this text has nobody come in: the tests above would show nothing"


@pytest.mark.parametrize("evidence", [True, False])
def test_without_gates_the_first_choice_stands(evidence: bool) -> None:
    active = chosen_by_segment(ChosenExperts(make(gate=False, evidence=evidence), 2), some_ids())
    assert active[1:] == [active[1]] * 5 and len(active[1]) == 2


def test_the_experts_that_predict_the_opening_best_are_chosen() -> None:
    model, ids = make(gate=False), some_ids()
    evidence = model.consult(ids[:, :4], model.new_cache()).prior_BTXF[0, -1].sum(-1)
    active = chosen_by_segment(ChosenExperts(model, 2), ids)
    assert active[1] == sorted(evidence.topk(2).indices.tolist())


@BRIDGES
def test_nothing_moves_before_a_token_that_changes(bridge: str) -> None:
    chosen, ids = ChosenExperts(make(bridge), 2), some_ids()
    before = logits_of(chosen, ids)
    for token in range(TOKENS):
        other = ids.clone()
        other[:, token] = (other[:, token] + 1) % VOCAB
        moved = ((logits_of(chosen, other) - before).abs().amax((0, 2)) > 1e-5).nonzero().flatten()
        assert moved.min() == token


@BRIDGES
@GATES
@pytest.mark.parametrize("chunks", [[1] * 30, [5, 1, 1, 13, 10], [6, 12, 12], [29, 1]])
def test_any_chunks_with_a_cache_equal_the_whole(bridge: str, gate: bool, chunks: list[int]) -> None:
    chosen, ids = ChosenExperts(make(bridge, gate), 2), some_ids()
    whole, cache = logits_of(chosen, ids), chosen.new_cache()
    logits = torch.cat([chosen.read(piece, cache) for piece in ids.split(chunks, 1)], 1)
    torch.testing.assert_close(logits, whole, atol=1e-4, rtol=1e-3)
    last = chosen.read(ids, chosen.new_cache(), last=True)
    torch.testing.assert_close(last, whole[:, -1:], atol=1e-4, rtol=1e-3)


def test_texts_read_together_are_what_each_is_alone() -> None:
    chosen, ids = ChosenExperts(make(), 1), some_ids(3)
    for row, logits in zip(ids.split(1), logits_of(chosen, ids).split(1), strict=True):
        torch.testing.assert_close(logits_of(chosen, row), logits)


def test_experts_at_rest_read_nothing_and_what_they_catch_up_on_is_counted() -> None:
    model, ids = make(gate=False), some_ids()
    read: list[int] = []
    for expert in model.decoders:
        plain = expert.hidden_states

        def counted(ids_BT: Tensor, cache: object, plain: object = plain) -> list[Tensor]:
            read.append(ids_BT.shape[1])
            return plain(ids_BT, cache)

        expert.hidden_states = counted
    chosen = ChosenExperts(model, 1)
    logits_of(chosen, ids)
    assert sum(read) == 4 * EXPERTS + 26 == chosen.tokens_read
    assert chosen.read_per_token == pytest.approx((4 * EXPERTS + 26) / 30)


def test_an_expert_that_comes_back_has_the_evidence_it_would_have_had() -> None:
    model, ids = make(gate=False), some_ids()
    cache, whole = model.new_cache(), model.new_cache()
    for piece, active in zip(ids.split(6, 1), ([0, 1, 2, 3], [0, 1], [0, 1], [0, 1, 2, 3], None), strict=True):
        states = model.consult(piece, cache, active)
        expected = model.consult(piece, whole)
    found = states.prior_BTXF - states.prior_BTXF.mean(2, keepdim=True)
    torch.testing.assert_close(found, expected.prior_BTXF, atol=1e-3, rtol=1e-3)


def test_calm_keys_of_experts_at_rest_are_not_kept() -> None:
    model, ids = make("calm", gate=False), some_ids()
    chosen = ChosenExperts(model, 1)
    cache = chosen.new_cache()
    chosen.read(ids, cache)
    assert all(isinstance(model.bridges.sites[site], CalmBridge) for site in cache.composed.bridges)
    for kept in cache.composed.bridges.values():
        assert kept.end_K is not None and len(kept.end_K) == 1 + 4 * EXPERTS + 26
