import pytest
import torch
from loud_decoder import close, loud, shape, some_ids, whole_pass
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from stages.nn.decoding import FIRST_ROOM, PackedDecoder
from stages.nn.packing import packable

KINDS = pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": False}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1}],
    ids=["gqa-tied", "gqa-untied", "mha", "mqa"],
)


@KINDS
@pytest.mark.parametrize("sizes", [(1,) * 11, (3, 1, 5, 2), (10, 1), (11,)])
def test_reading_in_chunks_of_any_size_equals_the_full_pass(changes, sizes):
    decoder, ids = loud(shape(**changes)), some_ids(11)
    packed = PackedDecoder(decoder)
    cache, start = packed.new_cache(), 0
    for size in sizes:
        logits = packed.read(ids[start : start + size], cache)
        start += size
        close(logits, whole_pass(decoder, ids[:start]))


def test_what_it_writes_is_what_transformers_writes():
    decoder, ids = loud(shape()), some_ids(5)
    model = LlamaForCausalLM(LlamaConfig(**decoder.config.to_huggingface(0))).eval()
    model.load_state_dict(decoder.weights(), strict=False)
    model.tie_weights()
    asked = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    prompt = torch.tensor([ids])
    expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), **asked)[0, len(ids) :].tolist()
    packed = PackedDecoder(decoder)
    cache, unread, written = packed.new_cache(), ids, []
    while len(written) < 40:
        unread = [int(packed.read(unread, cache).argmax())]
        written += unread
    assert written == expected and len(set(written)) > 5


def test_the_room_of_the_cache_and_the_rotations_grow_with_the_text():
    decoder, ids = loud(shape()), some_ids(2 * FIRST_ROOM + 3)
    packed = PackedDecoder(decoder)
    cache = packed.new_cache()
    packed.read(ids[: FIRST_ROOM - 1], cache)
    for token in ids[FIRST_ROOM - 1 : FIRST_ROOM + 2]:
        logits = packed.read([token], cache)
    close(logits, whole_pass(decoder, ids[: FIRST_ROOM + 2]))
    close(packed.read(ids[FIRST_ROOM + 2 :], cache), whole_pass(decoder, ids))


def test_biases_are_known():
    decoder = loud(shape())
    for layer in decoder.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            projection.bias = nn.Parameter(torch.randn(projection.out_features) * 0.5, requires_grad=False)
    assert packable(decoder)
    packed, ids = PackedDecoder(decoder), some_ids(7)
    cache = packed.new_cache()
    packed.read(ids[:4], cache)
    close(packed.read(ids[4:], cache), whole_pass(decoder, ids))
