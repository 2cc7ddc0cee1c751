import math

import pytest
import torch
from loud_decoder import VOCAB, loud, shape
from transformers import AutoConfig, AutoModelForCausalLM

from schemas.decoder import DecoderConfig, LinearRope, Llama3Rope
from stages.nn.decoder import Decoder, NextTokenLoss, token_log_probs


def some_ids(rows, tokens, seed=1):
    return torch.randint(VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def huggingface_twin(decoder):
    values = decoder.config.to_huggingface(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values)).eval()
    assert type(model).__name__ == values["architectures"][0]
    missing, unexpected = model.load_state_dict(decoder.weights(), strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if decoder.config.tie_word_embeddings else [])
    model.tie_weights()
    return model


LLAMA3 = Llama3Rope(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
KINDS = {
    "gqa-tied": shape(),
    "gqa-untied": shape(tie_word_embeddings=False),
    "mha-untied": shape(num_key_value_heads=4, tie_word_embeddings=False),
    "mqa-tied": shape(num_key_value_heads=1),
    "llama-own-head-width": shape(head_dim=6),
    "llama3-rope": shape(rope_scaling=LLAMA3, num_attention_heads=2),
    "linear-rope": shape(rope_scaling=LinearRope(factor=2.5)),
    "mistral": shape(model_type="mistral"),
    "mistral-window": shape(model_type="mistral", sliding_window=7, head_dim=10),
    "mistral-odd-width": shape(model_type="mistral", hidden_size=34, head_dim=8),
    "qwen2-tied": shape(model_type="qwen2"),
    "qwen2-untied-window": shape(model_type="qwen2", tie_word_embeddings=False, sliding_window=9),
    "qwen3-tied": shape(model_type="qwen3"),
    "qwen3-untied-own-head-width": shape(model_type="qwen3", tie_word_embeddings=False, head_dim=16),
    "qwen3-window": shape(model_type="qwen3", sliding_window=5, num_key_value_heads=1),
}
every_kind = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS.keys())


def assert_close(found, expected):
    """Within 1e-5 of the largest: how the sums of a product are rounded differs between processors."""
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


@every_kind
def test_logits_equal_transformers(config):
    decoder, ids = loud(config), some_ids(2, 40)
    with torch.no_grad():
        expected = huggingface_twin(decoder)(ids).logits
    logits = decoder(ids)
    assert logits.abs().mean() > 0.5  # else anything would be close
    assert_close(logits, expected)


@pytest.mark.parametrize("depth", [None, 0, 1, 2, 3])
def test_hidden_states_equal_transformers_at_every_depth(depth):
    decoder, ids = loud(shape()), some_ids(2, 20)
    with torch.no_grad():
        expected = huggingface_twin(decoder)(ids, output_hidden_states=True).hidden_states
    states = decoder.hidden_states(ids, depth=depth)
    assert len(states) == (4 if depth is None else depth + 1)
    for own, other in zip(states, expected, strict=False):
        assert_close(own, other)


@every_kind
@pytest.mark.parametrize("sizes", [(1,) * 11, (3, 1, 5, 2), (10, 1), (11,)])
def test_decoding_in_odd_chunks_equals_the_full_pass(sizes, config):
    decoder, ids = loud(config), some_ids(3, 11)
    cache = decoder.new_cache()
    pieces = [decoder(chunk, cache) for chunk in ids.split(list(sizes), 1)]
    assert_close(torch.cat(pieces, 1), decoder(ids))


def test_hidden_states_of_a_lower_depth_decode_in_chunks_too():
    decoder, ids = loud(shape()), some_ids(2, 9)
    cache = decoder.new_cache()
    pieces = [decoder.hidden_states(chunk, cache, depth=2)[-1] for chunk in ids.split([4, 1, 4], 1)]
    assert_close(torch.cat(pieces, 1), decoder.hidden_states(ids)[2])


@every_kind
@pytest.mark.parametrize("changed", [0, 5, 18])
def test_a_changed_token_moves_nothing_before_it(changed, config):
    decoder, ids = loud(config), some_ids(2, 19)
    other = ids.clone()
    other[:, changed] = (other[:, changed] + 1) % VOCAB
    difference = (decoder(ids) - decoder(other)).abs().amax((0, 2))
    reach = changed + 1 + ((config.sliding_window or 64) - 1) * config.num_hidden_layers
    assert (difference[:changed] == 0).all()
    assert (difference[changed:reach] > 1e-4).all()
    assert (difference[reach:] < 1e-5).all()


def test_a_window_hides_what_lies_before_it_from_one_layer():
    decoder, ids = loud(shape(model_type="mistral", sliding_window=4, num_hidden_layers=1)), some_ids(1, 12)
    other = ids.clone()
    other[:, 3] = (other[:, 3] + 1) % VOCAB
    difference = (decoder(ids) - decoder(other)).abs().amax((0, 2))
    assert (difference[3:7] > 1e-4).all()
    assert (difference[7:] < 1e-5).all()


def test_a_window_bounds_the_cache():
    decoder, ids = loud(shape(model_type="mistral", sliding_window=4)), some_ids(1, 12)
    cache = decoder.new_cache()
    for token in ids.split(1, 1):
        decoder(token, cache)
    assert [layer.k_BKSE.shape[2] for layer in cache.layers] == [3] * 3  # the next token is the fourth


def test_a_window_as_long_as_the_text_needs_no_mask():
    whole, windowed = loud(shape(model_type="mistral")), loud(shape(model_type="mistral", sliding_window=12))
    assert torch.equal(whole(some_ids(2, 12)), windowed(some_ids(2, 12)))


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_a_decoder_of_another_kind_trains_too(kind):
    torch.manual_seed(0)
    decoder = Decoder(shape(model_type=kind, vocab_size=1000))
    module, rows = NextTokenLoss(decoder), torch.randint(1000, (8, 33))
    with torch.autocast("cpu", torch.bfloat16):
        loss = module(rows)["loss"]
    assert loss.item() == pytest.approx(math.log(1000), rel=0.02)
    loss.backward()
    assert all(
        parameter.grad.abs().sum() > 0 for name, parameter in decoder.named_parameters() if "k_proj.b" not in name
    )


def test_a_prefix_has_the_logits_it_has_in_the_whole():
    decoder, ids = loud(shape()), some_ids(2, 19)
    torch.testing.assert_close(decoder(ids[:, :7]), decoder(ids)[:, :7], atol=1e-5, rtol=1e-5)


def test_a_new_decoder_guesses_uniformly():
    torch.manual_seed(0)
    decoder = Decoder(shape(vocab_size=1000))
    rows = torch.randint(1000, (8, 33))
    assert NextTokenLoss(decoder)(rows)["loss"].item() == pytest.approx(math.log(1000), rel=0.02)


def test_a_new_decoder_overfits_one_batch():
    torch.manual_seed(0)
    decoder = Decoder(shape(tie_word_embeddings=False))
    module, rows = NextTokenLoss(decoder), some_ids(2, 17)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-2)
    for _ in range(60):
        loss = module(rows)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_the_loss_is_the_mean_over_predicted_tokens():
    decoder, rows = loud(shape()), some_ids(2, 9)
    log_probs = decoder(rows[:, :-1]).double().log_softmax(-1)
    picked = [log_probs[row, t, rows[row, t + 1]] for row in range(2) for t in range(8)]
    expected = -torch.stack(picked)
    assert NextTokenLoss(decoder)(rows)["loss"].item() == pytest.approx(expected.mean().item(), abs=1e-5)
    own = -token_log_probs(decoder(rows[:, :-1]), rows[:, 1:]).flatten().double()
    torch.testing.assert_close(own, expected, atol=1e-5, rtol=1e-5)


@every_kind
def test_weights_make_an_equal_decoder_which_is_frozen(config):
    decoder, ids = loud(config), some_ids(1, 8)
    again = Decoder.from_weights(config, decoder.weights())
    assert torch.equal(decoder(ids), again(ids))
    assert not again.training
    assert not any(parameter.requires_grad for parameter in again.parameters())
    tied = again.lm_head.weight is again.model.embed_tokens.weight
    assert tied == config.tie_word_embeddings


def test_weights_of_another_shape_are_refused():
    with pytest.raises(RuntimeError, match="size mismatch"):
        Decoder.from_weights(shape(intermediate_size=40), loud(shape()).weights())


def test_bf16_gives_nearly_the_loss_of_fp32():
    decoder, rows = loud(shape()), some_ids(4, 33)
    exact = NextTokenLoss(decoder)(rows)["loss"].item()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = NextTokenLoss(decoder)(rows)["loss"]
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact, rel=0.02)


def test_with_a_separator_no_token_sees_another_document() -> None:
    torch.manual_seed(0)
    decoder = Decoder(SEPARATED).eval()
    decoder.separator = 5
    row_BT = torch.tensor([[5, 1, 2, 3, 5, 4, 6, 7, 5, 8], [9, 1, 5, 5, 2, 3, 4, 6, 7, 8]])
    with torch.no_grad():
        before = decoder(row_BT)
        other_BT = row_BT.clone()
        other_BT[0, 1:4] = torch.tensor([7, 7, 7])  # the first document of the first row
        after = decoder(other_BT)
        moved_BT = (before != after).any(-1)
        assert moved_BT[0, 1:4].all() and not moved_BT[0, 4:].any() and not moved_BT[1].any()
        alone = decoder(row_BT[:, 4:8])[:1]  # positions are relative: a document alone scores as it does in the row
        torch.testing.assert_close(before[:1, 4:8], alone, atol=1e-5, rtol=1e-5)
        decoder.separator = None
        assert (decoder(row_BT) != before)[0, 4:].any(-1).all()
        torch.testing.assert_close(decoder(row_BT)[0, :4], before[0, :4], atol=1e-5, rtol=1e-5)


SEPARATED = DecoderConfig(
    vocab_size=10, hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1,
    num_hidden_layers=2,
)  # fmt: skip
