import pytest
import torch
from torch import nn

from schemas.decoder import DecoderConfig
from stages.nn.decoder import Decoder
from stages.nn.flops import forward_flops

CONFIG = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 70,
}  # fmt: skip


def decoder(heads=4, **changes):
    return Decoder(DecoderConfig(**(CONFIG | {"num_key_value_heads": heads} | changes))).eval()


def by_hand(model, length):
    """2 per weight of every matrix a token passes, and 4 · length · width per layer for scores and their sums."""
    matrices = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    config = model.config
    return 2 * matrices + 4 * length * config.hidden_size * config.num_hidden_layers


def test_a_linear_layer_is_two_operations_per_weight():
    layer = nn.Linear(24, 40)
    assert forward_flops(lambda ids: layer(torch.zeros(*ids.shape, 24)), 7) == 2 * 24 * 40


@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize("length", [1, 16, 64])
def test_a_decoder_is_its_matrices_and_its_attention(heads, length):
    model = decoder(heads)
    assert forward_flops(model, length) == by_hand(model, length)


@pytest.mark.parametrize("tied", [True, False])
def test_the_output_layer_counts_whether_tied_or_not_and_the_embedding_never(tied):
    assert forward_flops(decoder(tie_word_embeddings=tied), 16) == by_hand(decoder(), 16)


def test_a_longer_context_costs_more_by_attention_only():
    model = decoder()
    difference = forward_flops(model, 96) - forward_flops(model, 32)
    assert difference == 4 * (96 - 32) * 32 * 3


def test_fewer_layers_cost_their_share():
    model = decoder()
    layers = [forward_flops(lambda ids, depth=depth: model.hidden_states(ids, depth=depth), 16) for depth in range(4)]
    assert layers[0] == 0
    assert layers[3] == pytest.approx(3 * layers[1]) == pytest.approx(1.5 * layers[2])


def test_counting_leaves_the_model_as_it_was():
    model = decoder()
    ids = torch.arange(10)[None]
    before = model(ids)
    forward_flops(model, 32)
    assert torch.equal(model(ids), before)
