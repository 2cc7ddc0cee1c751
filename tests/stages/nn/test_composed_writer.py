import pytest
import torch
import toy_composed
from torch import Tensor, nn
from toy_composed import OTHER, SEED, SHAPE, VOCAB, composed

from schemas.central import LevelShape
from stages.nn.composed import ComposedModel
from stages.nn.composed_writer import ComposedWriter, writable

BRIDGES = pytest.mark.parametrize("bridge", ["stitch", "calm", "stitch of states"])
GATES = pytest.mark.parametrize("gate", [True, False], ids=["gate", "no gate"])
TOKENS = 23


def make(bridge: str = "stitch", gate: bool = True, evidence: bool = True, memory: float = 0.9) -> ComposedModel:
    model = composed(bridge, experts=(SEED, SEED, SEED), gate=gate, evidence=evidence, memory=memory)
    return model.eval().requires_grad_(False)


def some_ids(rows: int = 3, seed: int = 0) -> Tensor:
    ids = torch.randint(1, VOCAB, (rows, TOKENS), generator=torch.Generator().manual_seed(seed))
    ids[:, 14] = 0  # the end of text, where gates forget
    return ids


def taken(model: ComposedModel, ids: Tensor, lengths: list[int], active: list[int] | None = None) -> ComposedWriter:
    """A writer of texts, of which the model has read so many tokens."""
    writer = ComposedWriter(model, len(lengths))
    for row, length in enumerate(lengths):
        cache = model.new_cache()
        if length:
            model(ids[row : row + 1, :length], cache, active=active, last=True)
        writer.take(row, cache, active)
    return writer


def steps(writer: ComposedWriter, ids: Tensor, lengths: list[int], count: int) -> Tensor:
    """Logits [N, count, V] of each text's next tokens, read side by side."""
    read = [[int(row[length + step]) for row, length in zip(ids, lengths, strict=True)] for step in range(count)]
    return torch.stack([writer.step(tokens) for tokens in read], 1)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


@BRIDGES
@GATES
@pytest.mark.parametrize("evidence", [True, False])
@pytest.mark.parametrize("lengths", [[9, 4, 1], [0, 0, 0], [7, 8, 0], [16, 15, 17]], ids=str)
def test_steps_side_by_side_are_what_the_model_says_of_each_text_alone(
    bridge: str, gate: bool, evidence: bool, lengths: list[int]
) -> None:
    """Texts are in different places of their groups, fill the window or do not, and some begin."""
    model, ids = make(bridge, gate, evidence), some_ids()
    whole = model(ids).logits_BTV
    found = steps(taken(model, ids, lengths), ids, lengths, 6)
    for row, length in enumerate(lengths):
        close(found[row], whole[row, length : length + 6])


@pytest.mark.parametrize(
    "changes",
    [
        {"upsampling": "repeat", "shared_positions": True},
        {"levels": (LevelShape(group_length=2, latents_per_group=2, latent_layers=1),), "global_layers": 1},
        {"channels": 2, "depth_weighted": True, "latent_window": 2, "local_layers": 1, "reducer": "last-k"},
        {"encoder_layers": 1, "decoder_layers": 1, "latent_weight": 0.1},
    ],
    ids=["repeat", "levels", "channels", "one layer"],
)
def test_any_shape_of_the_central_model_is_known(changes: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy_composed, "SHAPE", SHAPE.model_copy(update=changes))
    model, ids = make(), some_ids()
    found = steps(taken(model, ids, [9, 4, 1]), ids, [9, 4, 1], 14)
    for row, length in enumerate([9, 4, 1]):
        close(found[row], model(ids[row : row + 1]).logits_BTV[0, length : length + 14])


@BRIDGES
@GATES
def test_a_cache_that_goes_back_knows_all_that_was_written(bridge: str, gate: bool) -> None:
    model, ids = make(bridge, gate), some_ids()
    lengths = [9, 4, 1]
    writer = taken(model, ids, lengths)
    steps(writer, ids, lengths, 11)
    for row, length in enumerate(lengths):
        end = length + 11
        cache, expected = writer.give_back(row), model.new_cache()
        model(ids[row : row + 1, :end], expected)
        for expert, own, other in zip(model.decoders, cache.experts.each, expected.experts.each, strict=True):
            close(own.predicted(expert), other.predicted(expert))
            assert own.last_BE is not None and other.last_BE is not None
            close(own.last_BE, other.last_BE)
            close(own.evidence_BF, other.evidence_BF)
            assert own.layers.seen == other.layers.seen == end
        torch.testing.assert_close(cache.experts.ids_BS, expected.experts.ids_BS)
        close(cache.experts.mean_BS, expected.experts.mean_BS)
        close(cache.prior_BXF, expected.prior_BXF)
        rest = ids[row : row + 1, end:]
        close(model(rest, cache).logits_BTV, model(rest, expected).logits_BTV)


def test_a_cache_that_goes_back_at_once_is_as_it_was() -> None:
    model, ids = make(), some_ids()
    writer = taken(model, ids, [9])
    cache = writer.give_back(0)
    close(model(ids[:1, 9:], cache).logits_BTV, model(ids[:1]).logits_BTV[:, 9:])


@BRIDGES
@GATES
def test_few_experts_read_on_as_they_do_in_the_model(bridge: str, gate: bool) -> None:
    model, ids, active = make(bridge, gate), some_ids(1), [0, 2]
    cache = model.new_cache()
    model(ids[:, :5], cache)
    expected = model(ids[:, 5:16], cache, active=active).logits_BTV[0]
    late = model(ids[:, 16:], cache, active=[1, 2]).logits_BTV
    own = model.new_cache()
    model(ids[:, :5], own)
    writer = ComposedWriter(model, 1)
    writer.take(0, own, active)
    found = torch.cat([writer.step([int(token)]) for token in ids[0, 5:16]])
    close(found, expected)
    assert not torch.allclose(found, model(ids[:, :16]).logits_BTV[0, 5:], atol=1e-2)
    close(model(ids[:, 16:], writer.give_back(0), active=[1, 2]).logits_BTV, late)  # one comes in that missed it all


@BRIDGES
@pytest.mark.parametrize("upsampling", ["attention", "repeat"])
def test_a_text_moves_with_all_that_is_known_of_it(
    bridge: str, upsampling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toy_composed, "SHAPE", SHAPE.model_copy(update={"upsampling": upsampling}))
    model, ids = make(bridge), some_ids()
    lengths = [9, 4, 1]
    writer = taken(model, ids, lengths)
    steps(writer, ids, lengths, 6)
    writer.move(2, 0)
    found = steps(writer, ids[[2, 1]], [7, 10], 6)
    whole = model(ids).logits_BTV
    close(found[0], whole[2, 7:13])
    close(found[1], whole[1, 10:16])


def test_room_grows_with_a_text() -> None:
    model = make()
    ids = torch.randint(1, VOCAB, (1, 300), generator=torch.Generator().manual_seed(3))
    found = steps(taken(model, ids, [250]), ids, [250], 12)
    close(found[0], model(ids[:, :262]).logits_BTV[0, 250:])


def test_models_with_parts_that_cannot_be_packed_are_not_writable() -> None:
    assert writable(make()) and writable(make(gate=False))
    assert not writable(composed(experts=(SEED, OTHER)))
    assert not writable(composed(experts=(SEED.model_copy(update={"model_type": "qwen3"}),)))
    model = make()
    model.gate.gates.layer = 0  # its seed has no layers to pack
    assert not writable(model)
    model = make()
    model.central.encoder[0].self_attn.q_norm = nn.LayerNorm(8)
    assert not writable(model)
    model = make()
    model.gate.seed.to(torch.bfloat16)
    assert not writable(model)
    model = make()
    model.central.to(torch.bfloat16)
    assert not writable(model)
