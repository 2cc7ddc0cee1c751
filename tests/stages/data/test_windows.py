import numpy as np
import pytest
import torch

from schemas.failures import UsageFailure
from stages.data.token_store import ShardWriter, TokenStore
from stages.data.windows import Windows, choose_documents

END = 0


@pytest.fixture
def store_of(tmp_path):
    """A store of documents given as (source, tokens); every document's ids are unlike all others'."""

    def build(documents):
        next_id = 1
        with ShardWriter(tmp_path / "valid-00000.arrow", tmp_path, 60_000) as writer:
            for number, (source, length) in enumerate(documents):
                writer.add(str(number), source, 3 * length, np.arange(next_id, next_id + length))
                next_id += length
            writer.finish()
        return TokenStore.open([tmp_path / "valid-00000.arrow"])

    return build


LENGTHS = [5, 12, 1, 8, 30, 7, 16, 9]


@pytest.fixture
def store(store_of):
    return store_of([("a", length) for length in LENGTHS])


@pytest.mark.parametrize("in_turn", [True, False])
@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize("length", [1, 4, 8, 64])
@pytest.mark.parametrize("documents", [range(8), [4, 1, 6], [2]])
def test_every_token_is_predicted_once_from_the_one_before(store, documents, length, size, in_turn):
    windows = Windows(store, documents, END, length)
    seen = np.full(windows.tokens, -1)
    for batch in windows.batches_in_turn(size) if in_turn else windows.batches(size):
        assert len(batch.ids) <= size and batch.ids.shape == batch.targets.shape == batch.real.shape
        assert batch.ids.shape[1] <= length
        targets, inputs = batch.targets.numpy()[batch.real], batch.ids.numpy()[batch.real]
        assert (seen[batch.place] == -1).all()  # never twice
        seen[batch.place] = targets
        firsts = [store.tokens(document)[0] for document in documents]
        assert (inputs == np.where(np.isin(targets, firsts), END, targets - 1)).all()
    assert windows.tokens == sum(LENGTHS[document] for document in documents)
    assert (seen == np.concatenate([store.tokens(document) for document in documents])).all()
    for number, document in enumerate(documents):
        assert (windows.document_tokens(number) == store.tokens(document)).all()
        assert (seen[windows.starts[number] : windows.starts[number + 1]] == store.tokens(document)).all()


def test_the_inputs_of_a_window_are_its_own_tokens_in_order(store):
    for batch in Windows(store, range(8), END, 8).batches(4):
        for ids, targets, real in zip(batch.ids, batch.targets, batch.real, strict=True):
            count = int(real.sum())
            assert real[:count].all()  # padding stands behind
            assert (ids[1:count] == targets[: count - 1]).all()
            assert (ids[count:] == END).all()


@pytest.mark.parametrize("size", [1, 3, 100])
def test_in_turn_each_row_goes_on_where_it_was_in_the_batch_before(store, size):
    begun, last = 0, None
    for batch in Windows(store, range(8), END, 8).batches_in_turn(size):
        begun += batch.begins * len(batch.ids)
        assert batch.begins == bool((batch.ids[:, 0] == END).all())
        if not batch.begins:
            assert torch.equal(batch.ids[:, 0], last[: len(batch.ids), -1])  # full, and the token that was predicted
            assert len(batch.ids) <= len(last)
        last = batch.targets
    assert begun == 8


def test_padding_is_not_counted(store):
    windows = Windows(store, range(8), END, 8)
    padded = sum(int((~batch.real).sum()) for batch in windows.batches(100))
    assert padded > 0
    assert sum(len(batch.place) for batch in windows.batches(100)) == windows.tokens == sum(LENGTHS)
    assert windows.bytes == 3 * sum(LENGTHS)


def test_windows_start_where_a_document_or_a_full_window_ended(store):
    windows = Windows(store, [1, 2, 4], END, 8)
    assert windows.window_starts().tolist() == [0, 8, 12, 13, 21, 29, 37]
    assert np.flatnonzero(windows.places() == 0).tolist() == [0, 8, 12, 13, 21, 29, 37]
    assert windows.places().max() == 7 and (np.diff(windows.places())[windows.places()[1:] > 0] == 1).all()


def test_windows_of_like_length_stand_together(store):
    longest = [batch.ids.shape[1] for batch in Windows(store, range(8), END, 8).batches(2)]
    assert longest == sorted(longest, reverse=True)


def test_windows_that_stand_together_are_of_different_documents(store_of):
    store = store_of([("a", 24), ("a", 24), ("b", 24)])
    (batch,) = Windows(store, range(3), END, 8).batches(16)
    document = np.array([place // 24 for place in batch.place[::8]])
    assert (document != np.roll(document, 1)).all()


def tokens_of(store, documents, source=None):
    return sum(int(store.lengths[d]) for d in documents if source in (None, store.sources[d]))


def test_sources_get_equal_shares_of_the_budget(store_of):
    store = store_of([("abc"[number % 3], 10) for number in range(60)])
    chosen = choose_documents(store, 300)
    assert [tokens_of(store, chosen, source) for source in "abc"] == [100, 100, 100]
    assert chosen == sorted(set(chosen))


def test_what_a_small_source_leaves_goes_to_the_others(store_of):
    store = store_of([("small", 10)] + [("big", 10)] * 40 + [("huge", 10)] * 90)
    chosen = choose_documents(store, 310)
    assert [tokens_of(store, chosen, source) for source in ("small", "big", "huge")] == [10, 150, 150]


@pytest.mark.parametrize("budget", [7, 50, 120, 10_000])
def test_documents_are_whole_within_the_budget_and_the_same_every_time(store_of, budget):
    draw = np.random.default_rng(0)
    store = store_of([("abcd"[draw.integers(4)], int(draw.integers(1, 30))) for _ in range(50)])
    chosen = choose_documents(store, budget)
    assert tokens_of(store, chosen) <= budget
    assert chosen == choose_documents(store, budget)
    if budget >= store.lengths.sum():
        assert chosen == list(range(50))


def test_a_budget_no_document_fits_is_refused(store_of):
    store = store_of([("a", 5), ("b", 9)])
    with pytest.raises(UsageFailure, match=r"8 tokens hold no whole held-out document .the shortest has 5"):
        choose_documents(store, 8)  # four for each source
    assert choose_documents(store, 10) == [0]


def test_a_document_too_long_for_the_share_does_not_end_the_choice(store_of):
    store = store_of([("a", 90), ("a", 10), ("a", 20)])
    assert choose_documents(store, 40) == [1, 2]


@pytest.mark.parametrize("size", [1, 3])
def test_what_is_collected_stands_in_the_order_of_the_text(store, size):
    windows = Windows(store, [4, 1, 6], END, 8)
    text = np.concatenate([store.tokens(document) for document in (4, 1, 6)])
    cpu = torch.device("cpu")
    assert windows.collect(lambda ids, targets: targets, size, "x", cpu).tolist() == text.tolist()
    begun = []
    in_turn = windows.collect(lambda ids, targets: targets, size, "x", cpu, lambda: begun.append(1))
    assert in_turn.tolist() == text.tolist() and len(begun) == -(-len(windows.documents) // size)
    pairs = windows.collect(lambda ids, targets: torch.stack([ids, targets], -1).float(), size, "x", cpu)
    assert pairs.shape == (len(text), 2) and pairs.dtype == torch.float32
    assert pairs[:, 1].tolist() == text.tolist()
    assert pairs[9, 0] == text[8] and pairs[0, 0] == END


def test_documents_that_are_taken_already_are_not_chosen_again(store_of):
    store = store_of([("a", 10), ("b", 10), ("a", 10), ("b", 10), ("a", 10)])
    first = choose_documents(store, 20)
    second = choose_documents(store, 100, first)
    assert sorted(first + second) == list(range(5)) and len(first) == 2
    assert choose_documents(store, 20, first) != first
    with pytest.raises(UsageFailure, match="all 5 held-out documents are taken already"):
        choose_documents(store, 20, range(5))


def test_values_of_all_tokens_are_split_by_document(store):
    windows = Windows(store, [4, 1, 6], END, 8)
    pieces = windows.split(torch.arange(windows.tokens))
    assert [len(piece) for piece in pieces] == [30, 12, 16]
    assert [len(text) for text in windows.texts()] == [30, 12, 16]
    assert torch.cat(pieces).tolist() == list(range(windows.tokens))


def test_switched_documents_hold_every_half_once_and_change_their_source(store_of):
    store = store_of([(name, length) for name in "abc" for length in (6, 9, 5)])
    plain, switched = (Windows(store, range(9), END, 8, switched=each) for each in (False, True))
    assert (switched.tokens, switched.bytes) == (plain.tokens, plain.bytes)
    begun = [tuple(text[: len(text) // 2]) for text in plain.texts()]
    ended = {tuple(text[len(text) // 2 :]): number for number, text in enumerate(plain.texts())}
    taken = []
    for number, text in enumerate(switched.texts()):
        assert tuple(text[: len(begun[number])]) == begun[number]
        taken.append(ended[tuple(text[len(begun[number]) :])])
        assert store.sources[taken[-1]] != store.sources[number]
        assert len(text) == switched.lengths[number]
    assert sorted(taken) == list(range(9))
    assert switched.names(["x"] * 9) == ["switched"] * 9 and plain.names(["x"] * 9) == ["x"] * 9
