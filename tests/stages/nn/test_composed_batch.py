from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from toy_composed import OTHER, SEED, VOCAB, composed

from stages.nn import choice
from stages.nn.choice import ChosenExperts
from stages.nn.composed_batch import ComposedBatch, ComposedPlace, composed_reader
from stages.nn.memory import ComposedReader

BRIDGES = pytest.mark.parametrize("bridge", ["stitch", "calm"])
GATES = pytest.mark.parametrize("gate", [True, False], ids=["gate", "no gate"])


@pytest.fixture(autouse=True)
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "OPENING", 4)
    monkeypatch.setattr(choice, "SEGMENT", 6)  # no multiple of the group length


def chosen(bridge: str = "stitch", gate: bool = True, count: int = 4) -> ChosenExperts:
    model = composed(bridge, experts=(SEED,) * 4, gate=gate, memory=0.5, size=3.0)
    return ChosenExperts(model.eval().requires_grad_(False), count)


def some_ids(count: int, seed: int = 0) -> list[int]:
    return torch.randint(1, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def read_in_turn(reader: ComposedReader, seed: int) -> Iterator[Tensor]:
    """A text of several contexts, in chunks: what comes after each."""
    ids = some_ids(40, seed)
    reader.begin(ids[:5] if seed % 2 else [])
    yield reader.read(ids[: 5 + seed])
    for token in ids[5 + seed : 20]:
        yield reader.read([token])
    reader.restart(ids[14:20])
    yield reader.read(ids[20:21])
    yield reader.read(ids[21:24])
    for token in ids[24:]:
        yield reader.read([token])


@BRIDGES
@GATES
@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_text_alone_is_read_as_by_the_model_as_it_is(bridge: str, gate: bool, count: int) -> None:
    model = chosen(bridge, gate, count)
    reader = composed_reader(model)
    assert isinstance(reader, ComposedPlace)
    for seed in (0, 1, 4):
        for found, expected in zip(read_in_turn(reader, seed), read_in_turn(ComposedReader(model), seed), strict=True):
            close(found, expected)


@BRIDGES
def test_steps_of_few_experts_are_packed_but_where_they_are_chosen(bridge: str) -> None:
    model = chosen(bridge, count=2)
    reader = composed_reader(model)
    read: list[int] = []
    plain = model.read

    def counted(ids_1T: Tensor, *args: object, **settings: object) -> Tensor:
        read.append(ids_1T.shape[1])
        return plain(ids_1T, *args, **settings)

    model.read = counted
    for token in some_ids(20):
        reader.read([token])
    assert read == [1] * 8  # after none to four tokens, and after 6, 12 and 18


@BRIDGES
@GATES
def test_texts_side_by_side_are_read_as_each_alone(bridge: str, gate: bool) -> None:
    """They come and go, and begin contexts at different steps."""
    model = chosen(bridge, gate)
    batch = ComposedPlace(0, model, ComposedBatch(model, 1)._writer).batch(3)
    assert batch is not None
    alone = {number: ComposedReader(model) for number in range(5)}
    places = {}

    def add(number: int, skipped: list[int]) -> None:
        places[number] = batch.add(number)
        for reader in (places[number], alone[number]):
            reader.begin(skipped)

    def read(unread: dict[int, list[int]]) -> None:
        found = batch.read(unread)
        assert found.keys() == unread.keys()
        for number, ids in unread.items():
            close(found[number].log_softmax(-1), alone[number].read(ids))

    add(0, [])
    add(1, some_ids(7, seed=9))
    add(2, [])
    read({number: some_ids(1 + 4 * number, seed=number) for number in range(3)})
    for step in range(6):
        read({number: [1 + step + number] for number in range(3)})
    batch.remove(0)
    add(3, [])
    read({1: [3], 2: [4], 3: some_ids(10)})
    for reader in (places[2], alone[2]):
        reader.restart(some_ids(6, seed=5))
    for step in range(5):
        read({number: [2 + step + number] for number in (3, 1, 2)})
    batch.remove(3)
    batch.remove(1)
    read({2: [6]})
    add(4, [])
    read({2: [6], 4: [8]})


def test_texts_that_choose_experts_of_their_own_are_not_read_side_by_side() -> None:
    model = chosen(count=2)
    reader = composed_reader(model)
    assert isinstance(reader, ComposedPlace) and reader.batch(3) is None


def test_experts_of_unequal_shapes_are_read_as_they_are() -> None:
    model = ChosenExperts(composed(experts=(SEED, OTHER)).eval().requires_grad_(False), 2)
    assert type(composed_reader(model)) is ComposedReader
