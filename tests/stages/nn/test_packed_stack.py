import pytest
import torch
from loud_decoder import VOCAB, loud, shape
from torch import Tensor

from stages.nn.attention import Layer, StackCache, View
from stages.nn.decoder import Decoder
from stages.nn.packed_stack import PackedStack, StackRoom, Step

WINDOWS = pytest.mark.parametrize("window", [None, 5], ids=["all", "window"])


def decoders(**changes: object) -> list[Decoder]:
    return [loud(shape(**changes), seed=seed) for seed in range(3)]


def layers_of(decoder: Decoder) -> list[Layer]:
    return [layer for layer in decoder.model.layers if isinstance(layer, Layer)]


def whole_pass(decoder: Decoder, ids: Tensor, window: int | None, cache: StackCache | None = None) -> Tensor:
    """States [T, D] after all layers."""
    config, seen = decoder.config, 0 if cache is None else cache.seen
    place = torch.arange(seen, seen + len(ids))
    view = View(place, config.head_dim, config.rope_theta, cache=cache, window=window)
    x = decoder.model.embed_tokens(ids[None])
    for index, layer in enumerate(layers_of(decoder)):
        x = layer(x, view, view.layer_cache(index))
    return x[0]


def stepped(stack: PackedStack, models: list[Decoder], ids: Tensor, lengths: list[int], room: StackRoom) -> Tensor:
    """States [M, N, D] of the token after so many of each text, which the room gets."""
    token = torch.stack([row[length] for row, length in zip(ids, lengths, strict=True)])
    x = torch.stack([model.model.embed_tokens(token) for model in models])
    return stack.step(x, Step(lengths, ids.device), room).clone()


@WINDOWS
@pytest.mark.parametrize(
    "changes", [{}, {"num_key_value_heads": 4}, {"model_type": "qwen2"}], ids=["gqa", "mha", "biases"]
)
def test_models_side_by_side_are_what_each_is_alone_for_texts_of_unequal_lengths(
    changes: dict, window: int | None
) -> None:
    models = decoders(**changes)
    stack = PackedStack([layers_of(model) for model in models], models[0].config.rope_theta, window)
    room, ids = stack.new_room(2), torch.randint(VOCAB, (2, 14), generator=torch.Generator().manual_seed(0))
    for number, model in enumerate(models):
        cache = StackCache(len(stack))
        whole_pass(model, ids[0, :6], window, cache)
        room.take(0, number, cache)
    for step in range(8):
        found = stepped(stack, models, ids, [6 + step, step], room)
        for number, model in enumerate(models):
            for text, end in enumerate((7 + step, 1 + step)):
                expected = whole_pass(model, ids[text, :end], window)[-1]
                torch.testing.assert_close(found[number, text], expected, atol=1e-3, rtol=1e-3)


@WINDOWS
def test_what_goes_back_to_a_cache_is_what_a_cache_would_hold(window: int | None) -> None:
    models = decoders()
    stack = PackedStack([layers_of(model) for model in models], models[0].config.rope_theta, window)
    room, ids = stack.new_room(1), torch.randint(VOCAB, (1, 14), generator=torch.Generator().manual_seed(0))
    for step in range(9):
        stepped(stack, models, ids, [step], room)
    for number, model in enumerate(models):
        cache, expected = StackCache(len(stack)), StackCache(len(stack))
        room.give_back(0, number, 9, cache)
        for token in ids[0, :9].split(1):
            whole_pass(model, token, window, expected)
        assert cache.seen == expected.seen == 9
        torch.testing.assert_close(cache.position_S, expected.position_S)
        for own, other in zip(cache.layers, expected.layers, strict=True):
            torch.testing.assert_close(own.k_BKSE, other.k_BKSE, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(own.v_BKSE, other.v_BKSE, atol=1e-4, rtol=1e-4)


def test_what_visits_a_layer_may_change_its_states() -> None:
    models = decoders()[:1]
    stack = PackedStack([layers_of(models[0])], models[0].config.rope_theta)
    ids, seen = torch.tensor([[3]]), []

    def visit(number: int, x: Tensor) -> None:
        seen.append(number)
        x.mul_(2.0)

    x = models[0].model.embed_tokens(ids)
    found = stack.step(x, Step([0], ids.device), stack.new_room(1), visit)
    view = View(torch.arange(1), models[0].config.head_dim, models[0].config.rope_theta)
    for layer in layers_of(models[0]):
        x = 2 * layer(x, view)
    torch.testing.assert_close(found, x, atol=1e-3, rtol=1e-3)
    assert seen == [1, 2, 3]
