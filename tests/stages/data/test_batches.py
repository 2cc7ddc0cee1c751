import numpy as np
import pytest
import torch

from schemas.failures import InputFailure
from stages.data.batches import Rows
from stages.data.token_store import ShardWriter, TokenStore

END = 7  # no document holds it
LENGTHS = (5, 0, 1, 12, 3, 30, 2, 8)


def documents(lengths=LENGTHS):
    """Every token of every document is another number."""
    values = iter(range(100, 1000))
    return [[next(values) for _ in range(length)] for length in lengths]


@pytest.fixture
def store(tmp_path):
    return stored(tmp_path, documents())


def stored(folder, texts, vocab_size=1000, documents_per_shard=3):
    """In shards of three documents, so that rows reach over shards."""
    paths = []
    for start in range(0, len(texts), documents_per_shard):
        path = folder / f"train-{start:05d}.arrow"
        with ShardWriter(path, folder, vocab_size) as writer:
            for number, tokens in enumerate(texts[start : start + documents_per_shard], start):
                writer.add(f"d{number}", "s", len(tokens), tokens)
            writer.finish()
        paths.append(path)
    return TokenStore.open(paths)


def stream(texts):
    """Ten-line reference: the documents end to end, the separator before each."""
    tokens = []
    for text in texts:
        tokens.append(END)
        tokens.extend(text)
    return tokens


@pytest.mark.parametrize("length", [2, 3, 7, 16, 50])
def test_rows_are_the_concatenation_cut_evenly(store, length):
    rows, tokens = Rows(store, END, length), stream(documents())
    assert rows.tokens == len(tokens)
    assert rows.count == (len(tokens) - 1) // length
    for index in range(rows.count):
        assert rows.row(index).tolist() == tokens[index * length : (index + 1) * length + 1]


def test_a_step_is_described_by_its_rows_and_their_documents(store):
    rows = Rows(store, END, 4, np.array([5, 0, 3]))
    batches, texts = rows.batches(3, seed=2), documents()
    assert torch.equal(batches(1), rows.batch(1, 3, 2))
    numbers, names = batches.describe(1).removeprefix("rows ").removesuffix(")").split(" (documents ")
    held = [rows.row(int(number))[:-1] for number in numbers.split(", ")]  # the last token is the next row's first
    assert [row.tolist() for row in held] == batches(1)[:, :-1].tolist()
    expected = {5, 0, 3}.intersection(
        d for d in (5, 0, 3) for row in held if {*texts[d], END} & {*row.tolist()} - {END}
    )
    assert {*names.split(", ")} >= {f"d{document}" for document in expected}
    assert Rows(store, END, 4).documents(0) == ["d0"]
    assert Rows(store, END, 8).documents(0) == ["d0", "d1", "d2"]  # END a a a a a END END


def test_chosen_documents_only_and_in_the_order_given(store):
    rows, texts = Rows(store, END, 4, np.array([5, 0, 3])), documents()
    expected = stream([texts[5], texts[0], texts[3]])
    assert rows.row(0).tolist() == expected[:5]
    assert {token for index in range(rows.count) for token in rows.row(index)} <= set(expected)


@pytest.mark.parametrize("length", [3, 7])
@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_an_epoch_has_every_token_as_target_once(store, length, epoch):
    rows = Rows(store, END, length)
    size = 1
    steps = range(epoch * rows.count, (epoch + 1) * rows.count)
    targets = torch.cat([rows.batch(step, size, seed=3)[:, 1:].flatten() for step in steps]).tolist()
    whole = stream(documents())[1 : rows.count * length + 1]
    assert sorted(targets) == sorted(whole)
    assert len(stream(documents())) - 1 - len(whole) < length  # only a part of a row is left out


def test_batches_go_through_the_epochs_without_a_gap(store):
    rows = Rows(store, END, 7)
    size = 4
    assert rows.count % size  # so that batches straddle epochs
    in_fours = torch.cat([rows.batch(step, size, seed=0) for step in range(rows.count)])
    one_by_one = torch.cat([rows.batch(step, 1, seed=0) for step in range(size * rows.count)])
    assert torch.equal(in_fours, one_by_one)


def test_a_batch_may_be_larger_than_an_epoch(store):
    rows = Rows(store, END, 30)
    batch = rows.batch(0, 3 * rows.count, seed=0)
    assert batch.shape == (3 * rows.count, 31)
    assert len(batch.unique(dim=0)) == rows.count


def test_rows_depend_on_seed_and_step_alone(store, tmp_path):
    other = Rows(stored(tmp_path / "again", documents(), documents_per_shard=100), END, 3)
    rows = Rows(store, END, 3)
    later_first = [rows.batch(step, 4, seed=1) for step in (9, 0)]
    assert torch.equal(later_first[0], other.batch(9, 4, seed=1))
    assert torch.equal(later_first[1], other.batch(0, 4, seed=1))
    assert later_first[0].dtype == torch.int64


def test_epochs_and_seeds_have_orders_of_their_own(store):
    rows = Rows(store, END, 3)

    def epoch(number, seed):
        return tuple(tuple(rows.batch(number * rows.count + i, 1, seed)[0].tolist()) for i in range(rows.count))

    orders = {epoch(number, seed) for number in range(3) for seed in range(3)}
    assert len(orders) == 9
    assert len({tuple(sorted(order)) for order in orders}) == 1


@pytest.mark.parametrize("lengths", [(), (0,), (3, 4)])
def test_too_little_text_is_one_line(tmp_path, lengths):
    with pytest.raises(
        InputFailure, match=rf"{len(lengths)} documents .* one row of 9 tokens.*--sequence-length"
    ) as bad:
        Rows(stored(tmp_path, documents(lengths)), END, 9)
    assert "\n" not in str(bad.value)


def test_exactly_one_row_is_enough(tmp_path):
    rows = Rows(stored(tmp_path, documents((3, 4))), END, 8)
    assert rows.count == 1
    assert rows.batch(5, 2, seed=0).tolist() == [stream(documents((3, 4)))] * 2


def test_uint32_tokens_come_out_as_they_are(tmp_path):
    store = stored(tmp_path, [[1_000_000, 5, 70_000]], vocab_size=1 << 20)
    assert Rows(store, 1, 3).row(0).tolist() == [1, 1_000_000, 5, 70_000]
