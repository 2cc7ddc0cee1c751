import pytest
import torch
from torch import Tensor
from toy_composed import VOCAB, composed

from stages.nn import choice
from stages.nn.choice import ChosenExperts
from stages.nn.composed import ComposedCache, ComposedModel
from stages.nn.experts import FADING
from stages.nn.memory import ComposedReader, DocumentReader, recall

CONTEXT = 12  # tokens
BRIDGES = pytest.mark.parametrize("bridge", ["stitch", "calm", "stitch of states"])


def model_of(bridge: str = "stitch") -> ComposedModel:
    return composed(bridge, memory=0.9).eval().requires_grad_(False)


def some_ids(rows: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def evidence_by_hand(model: ComposedModel, ids: Tensor) -> Tensor:
    """Of one text [T] read in contexts: each expert predicts from its context alone, and sums go on over all of it."""
    likelihood = torch.zeros(len(ids), len(model.decoders))
    for number, expert in enumerate(model.decoders):
        for token in range(1, len(ids)):
            begin = (token - 1) // CONTEXT * CONTEXT  # of the context of the token before
            logits = expert(ids[None, begin:token])[0, -1]
            likelihood[token, number] = logits.log_softmax(-1)[ids[token]]
    likelihood -= likelihood.mean(-1, keepdim=True)
    sums = torch.zeros(len(ids), len(model.decoders), len(FADING))
    for token in range(len(ids)):
        sums[token] = likelihood[token, :, None] + torch.tensor(FADING) * (sums[token - 1] if token else 0.0)
    return sums


def in_contexts(model: ComposedModel, ids: Tensor) -> list[ComposedCache]:
    """The caches after each context of texts that all have as many."""
    caches: list[ComposedCache] = []
    for piece in ids.split(CONTEXT, 1):
        cache = model.new_cache()
        if caches:
            recall(cache, caches[-1], len(ids))
        model(piece, cache)
        caches.append(cache)
    return caches


@BRIDGES
def test_evidence_and_gates_know_the_whole_document_after_any_context(bridge: str) -> None:
    model, ids = model_of(bridge), some_ids(1, 3 * CONTEXT - 5)
    for number, cache in enumerate(in_contexts(model, ids), 1):
        assert cache.prior_BXF is not None
        end = min(number * CONTEXT, ids.shape[1])
        found = cache.prior_BXF[0, :, 1:]
        expected = evidence_by_hand(model, ids[0, :end])[-1]
        torch.testing.assert_close(found - found.mean(0), expected, atol=1e-4, rtol=1e-4)
    assert model.gate is not None
    states = torch.cat([model.gate.seed.hidden_states(piece, depth=2)[-1] for piece in ids.split(CONTEXT, 1)], 1)
    read = model.gate.gates.remembered(states, ids)[:, -1]
    torch.testing.assert_close(cache.gate.read_BD, read)


@BRIDGES
def test_documents_read_side_by_side_are_what_each_is_alone(bridge: str) -> None:
    model = model_of(bridge)
    lengths, ids = [3 * CONTEXT, 2 * CONTEXT, CONTEXT - 4], some_ids(3, 3 * CONTEXT)
    reader, found = DocumentReader(ChosenExperts(model, 9)), []
    for start in range(0, 3 * CONTEXT, CONTEXT):
        rows = sum(length > start for length in lengths)
        found.append(reader(ids[:rows, start : start + CONTEXT]))
    for row, length in enumerate(lengths):
        alone = DocumentReader(ChosenExperts(model, 9))
        for number, piece in enumerate(ids[row : row + 1, :length].split(CONTEXT, 1)):
            torch.testing.assert_close(found[number][row, : piece.shape[1]], alone(piece)[0], atol=1e-4, rtol=1e-4)
    reader.begin()
    torch.testing.assert_close(reader(ids[:, :CONTEXT]), found[0])


@BRIDGES
def test_what_a_context_said_moves_the_next_and_nothing_before_itself(bridge: str) -> None:
    model, ids = model_of(bridge), some_ids(1, 2 * CONTEXT)

    def read(ids: Tensor) -> Tensor:
        reader = DocumentReader(ChosenExperts(model, 9))
        return torch.cat([reader(piece) for piece in ids.split(CONTEXT, 1)], 1)[0]

    before = read(ids)
    for token in range(2 * CONTEXT):
        other = ids.clone()
        other[0, token] = other[0, token] % (VOCAB - 1) + 1
        moved = ((read(other) - before).abs().amax(-1) > 1e-6).nonzero().flatten()
        assert moved.min() == token and moved.max() == 2 * CONTEXT - 1


def test_of_an_expert_that_rested_the_evidence_fades() -> None:
    model, ids = composed(gate=False).eval().requires_grad_(False), some_ids(2, CONTEXT)
    cache, new = model.new_cache(), model.new_cache()
    model(ids[:, :5], cache)
    known = [own.evidence_BF for own in cache.experts.each]
    model(ids[:, 5:], cache, active=[1])
    recall(new, cache, 1)
    rested, active = (own.evidence_BF for own in new.experts.each)
    assert known[0] is not None
    torch.testing.assert_close(rested, known[0][:1] * torch.tensor(FADING) ** (CONTEXT - 5))
    torch.testing.assert_close(active, cache.experts.each[1].evidence_BF[:1])
    states = model.consult(ids[:1], new)  # nobody told how well all of them predict the first token: it tells nothing
    torch.testing.assert_close(states.prior_BTXF[0, 0, 0], rested[0] * torch.tensor(FADING))


@BRIDGES
def test_in_a_context_begun_from_the_end_of_another_nothing_counts_twice(bridge: str) -> None:
    model, ids = model_of(bridge), some_ids(1, 2 * CONTEXT)[0].tolist()
    reader = ComposedReader(ChosenExperts(model, 9))
    reader.read(ids[:CONTEXT])
    before = reader._cache.composed
    reader.restart(ids[CONTEXT // 2 : CONTEXT])
    cache = reader._cache.composed
    assert cache.experts.seen == CONTEXT // 2
    assert cache.experts.mean_BS[0, 0] == 0  # nothing predicts the first token that is kept
    for own, old in zip(cache.experts.each, before.experts.each, strict=True):
        assert torch.equal(own.evidence_BF, old.evidence_BF) and own.layers.seen == CONTEXT // 2
    assert torch.equal(cache.gate.read_BD, before.gate.read_BD)
    found = reader.read(ids[CONTEXT : CONTEXT + 1])
    fresh = ComposedReader(ChosenExperts(model, 9)).read(ids[CONTEXT // 2 : CONTEXT + 1])
    assert not torch.allclose(found, fresh, atol=1e-3)
    expected = torch.cat([own.evidence_BF for own in before.experts.each])
    likelihood = torch.stack(
        [
            own.predicted(expert)[0, ids[CONTEXT]]
            for own, expert in zip(before.experts.each, model.decoders, strict=True)
        ]
    )
    expected = expected * torch.tensor(FADING) + (likelihood - likelihood.mean())[:, None]
    assert cache.prior_BXF is not None
    torch.testing.assert_close(cache.prior_BXF[0, :, 1:], expected, atol=1e-5, rtol=1e-4)


def test_few_experts_of_a_new_context_are_chosen_by_what_was_known_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "OPENING", 2)
    model, ids = composed(gate=False).eval().requires_grad_(False), some_ids(1, CONTEXT)[0].tolist()
    model.bridges.sites["head"].prior.weight_F.fill_(1.0)  # what is drawn might count against the better
    for best in (0, 1):
        reader = ComposedReader(ChosenExperts(model, 1))
        reader.read(ids)
        for number, own in enumerate(reader._cache.composed.experts.each):
            own.evidence_BF = torch.full((1, len(FADING)), 1e4 * (number == best))
        reader.restart(ids[CONTEXT // 2 :])
        assert reader._cache.active == [best]


def test_an_expert_that_comes_back_after_a_new_context_counts_what_is_new_alone() -> None:
    model, ids = composed(gate=False).eval().requires_grad_(False), some_ids(1, 2 * CONTEXT)
    cache, new = model.new_cache(), model.new_cache()
    model(ids[:, :CONTEXT], cache)
    model(ids[:, 4:CONTEXT], new, active=[1])
    recall(new, cache, 1)
    told = new.experts.each[0].evidence_BF
    model(ids[:, CONTEXT : CONTEXT + 1], new, active=[1])  # alone it is its own mean: nothing to tell
    model.experts._catch_up(0, new.experts)
    assert new.experts.mean_BS is not None
    own = model.decoders[0](ids[:, 4:CONTEXT])[0, -1].log_softmax(-1)[ids[0, CONTEXT]]
    expected = told * torch.tensor(FADING) + own - new.experts.mean_BS[0, -1]
    torch.testing.assert_close(new.experts.each[0].evidence_BF, expected, atol=1e-4, rtol=1e-4)


def test_after_a_new_context_the_next_token_is_evidence_though_some_rested_before() -> None:
    model, ids = composed(gate=False).eval().requires_grad_(False), some_ids(1, 2 * CONTEXT)
    cache, new = model.new_cache(), model.new_cache()
    model(ids[:, :3], cache)
    model(ids[:, 3:CONTEXT], cache, active=[1])
    recall(new, cache, 1, follows=False)
    model(ids[:, 4:CONTEXT], new, active=[1])
    recall(new, cache, 1)
    told = new.experts.each[0].evidence_BF
    model(ids[:, CONTEXT : CONTEXT + 1], new, active=[1])
    likely = [expert(ids[:, 4:CONTEXT])[0, -1].log_softmax(-1)[ids[0, CONTEXT]] for expert in model.decoders]
    assert new.experts.mean_BS is not None
    torch.testing.assert_close(new.experts.mean_BS[0, -1], likely[1], atol=1e-4, rtol=1e-4)
    model.experts._catch_up(0, new.experts)
    expected = told * torch.tensor(FADING) + likely[0] - likely[1]
    torch.testing.assert_close(new.experts.each[0].evidence_BF, expected, atol=1e-4, rtol=1e-4)


def test_what_a_prompt_too_long_begins_with_is_known_by_its_last_context() -> None:
    model = model_of()
    ids, context = some_ids(1, 60)[0].tolist(), 20
    for expert in model.decoders:
        expert.config = expert.config.model_copy(update={"max_position_embeddings": context})
    reader = ComposedReader(ChosenExperts(model, 9))
    reader.begin(ids[:40])
    found = reader.read(ids[40:])
    by_hand = model.new_cache()
    cache = model.new_cache()
    model(torch.tensor([ids[20:40]]), by_hand)
    recall(cache, by_hand, 1)
    expected = model(torch.tensor([ids[40:]]), cache).logits_BTV[0, -1].log_softmax(-1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    reader.begin([])
    fresh = model(torch.tensor([ids[40:]])).logits_BTV[0, -1].log_softmax(-1)
    torch.testing.assert_close(reader.read(ids[40:]), fresh, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found, fresh, atol=1e-3)
