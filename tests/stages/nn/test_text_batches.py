import pytest
from loud_decoder import close, loud, shape, some_ids, whole_pass

from stages.nn.decoding import PackedDecoder
from stages.nn.text_batches import TextBatch


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": False}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1}],
    ids=["gqa-tied", "gqa-untied", "mha", "mqa"],
)
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
