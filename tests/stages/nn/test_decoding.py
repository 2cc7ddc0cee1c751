import pytest
import torch
from loud_decoder import VOCAB, loud, shape
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from stages.nn.decoding import FIRST_ROOM, PackedDecoder, TextBatch
from stages.nn.packing import packable


def some_ids(count, seed=1):
    return torch.randint(VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def whole_pass(decoder, ids):
    return decoder(torch.tensor([ids]))[0, -1]


def close(found, expected):
    assert expected.abs().mean() > 0.3  # else anything would be close
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


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


@KINDS
def test_texts_of_unequal_lengths_read_side_by_side_what_each_alone_would(changes):
    decoder = loud(shape(**changes))
    batch = TextBatch(PackedDecoder(decoder), rows=3)
    texts = {number: some_ids(length, seed=number) for number, length in ((4, 9), (7, 2), (5, 13))}
    for number in texts:
        batch.add(number)
    logits = batch.read(texts)
    for seed in range(4):
        for number, ids in texts.items():
            close(logits[number], whole_pass(decoder, ids))
        new = {number: some_ids(1 + (number + seed) % 3, seed=10 * number + seed) for number in texts}
        logits = batch.read(new)
        texts = {number: ids + new[number] for number, ids in texts.items()}


@pytest.mark.parametrize("first", [0, 1, 2])
def test_a_text_that_ends_leaves_its_place_and_the_others_what_they_read(first):
    decoder = loud(shape())
    batch = TextBatch(PackedDecoder(decoder), rows=3)
    texts = {number: some_ids(4 + 3 * number, seed=number) for number in range(3)}
    for number in texts:
        batch.add(number)
    batch.read(texts)
    batch.remove(first)
    del texts[first]
    texts = {number: [*ids, 7] for number, ids in texts.items()}
    for number, logits in batch.read({number: [7] for number in texts}).items():
        close(logits, whole_pass(decoder, texts[number]))
    batch.add(9)
    new = {number: [8] for number in texts} | {9: some_ids(20, seed=9)}
    texts = {number: texts.get(number, []) + ids for number, ids in new.items()}
    for number, logits in batch.read(new).items():
        close(logits, whole_pass(decoder, texts[number]))
    for number in (9, *(number for number in range(3) if number != first)):
        batch.remove(number)
    batch.add(3)
    close(batch.read({3: some_ids(6)})[3], whole_pass(decoder, some_ids(6)))


def test_a_place_begun_anew_forgets():
    decoder = loud(shape())
    batch = TextBatch(PackedDecoder(decoder), rows=2)
    places = [batch.add(number) for number in range(2)]
    batch.read({0: some_ids(9), 1: some_ids(5)})
    places[0].restart(some_ids(3, seed=5))
    logits = batch.read({0: [1], 1: [2]})
    close(logits[0], whole_pass(decoder, [*some_ids(3, seed=5), 1]))
    close(logits[1], whole_pass(decoder, [*some_ids(5), 2]))


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
