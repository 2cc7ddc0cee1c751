import pytest
import torch
from torch import nn

from schemas.central import CentralConfig, CentralShape, LevelShape
from schemas.decoder import DecoderConfig
from schemas.train_experts import LINEARS, LoraConfig
from stages.nn.central import CentralModel
from stages.nn.decoder import Decoder
from stages.nn.flops import DecoderCosts, adapter_costs, forward_flops

CONFIG = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 70,
}  # fmt: skip


def decoder(heads=4, **changes):
    return Decoder(DecoderConfig(**(CONFIG | {"num_key_value_heads": heads} | changes))).eval()


def by_hand(model, length):
    """2 per weight of every matrix a token passes, and 4 · length · width of all heads per layer: scores and sums."""
    matrices = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    config = model.config
    return 2 * matrices + 4 * length * config.num_attention_heads * config.head_dim * config.num_hidden_layers


def test_a_linear_layer_is_two_operations_per_weight():
    layer = nn.Linear(24, 40)
    assert forward_flops(lambda ids: layer(torch.zeros(*ids.shape, 24)), 7) == 2 * 24 * 40


@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize("length", [1, 16, 64])
def test_a_decoder_is_its_matrices_and_its_attention(heads, length):
    model = decoder(heads)
    assert forward_flops(model, length) == by_hand(model, length)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_heads_with_a_width_of_their_own_count_by_it(kind):
    model = decoder(2, model_type=kind, head_dim=12)
    assert forward_flops(model, 16) == by_hand(model, 16) > by_hand(decoder(2), 16)


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


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("down_proj",), LINEARS])
def test_a_step_of_adapters_leaves_out_the_gradients_of_frozen_weights(targets):
    """Two operations per weight for the forward pass, two for the gradient of the input, two more for own weights."""
    model, rank, length = decoder(), 4, 16
    weights, flops = adapter_costs(model.config, LoraConfig(rank=rank, targets=targets), length)
    sizes = {name: module.weight.shape for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    own = {name: rank * sum(shape) for name, shape in sizes.items() if name.rsplit(".", 1)[-1] in targets}
    assert weights == sum(own.values())
    most = 3 * forward_flops(model, length) - 2 * sum(shape.numel() for shape in sizes.values()) + 6 * weights
    # Below the lowest adapter, which is in the first layer, nothing needs a gradient.
    first = sum(shape.numel() for name, shape in sizes.items() if ".0." in name) + weights // 3
    assert most - 2 * first - 8 * length * model.config.hidden_size <= flops < most


def test_decoders_without_adapters_cost_what_they_did():
    costs = DecoderCosts(decoder(), 16, None, seed=100, experts=50)
    token = 3 * costs.forward
    assert (costs.seed, costs.experts, costs.from_seed(60)) == (100 * token, 150 * token, 160 * token)
    assert costs.weights(2.5, 2) == round(2.5 * sum(weight.numel() for weight in decoder().parameters()))


def test_the_steps_of_a_decoder_cost_what_another_training_did_to_half_a_step():
    costs = DecoderCosts(decoder(), 16, None, seed=100, experts=50)
    spent = costs.from_seed(1000)
    assert costs.steps_of(spent, tokens_per_step=64) == round(1000 / 64)
    assert abs(costs.from_seed(64 * costs.steps_of(spent, 64)) - spent) <= 32 * 3 * costs.forward
    assert costs.steps_of(costs.seed / 2, 64) == 0  # it cost less than the seed alone


def test_experts_of_adapters_share_the_weights_of_the_seed_and_train_for_less():
    lora = LoraConfig(rank=2)
    costs = DecoderCosts(decoder(), 16, None, seed=100, experts=50, lora=lora)
    weights, flops = adapter_costs(decoder().config, lora, 16)
    assert costs.experts == pytest.approx(300 * costs.forward + 50 * flops)
    assert costs.weights(4, 3) == sum(weight.numel() for weight in decoder().parameters()) + 3 * weights


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("levels", [0, 1])
def test_a_central_model_is_its_matrices_and_the_attentions_of_all_its_levels(channels, levels):
    """32 tokens: 8 groups of 4 with 2 latents each; above, 4 groups of 4 of these with 3 latents each."""
    above = LevelShape(group_length=2, latents_per_group=3, latent_layers=2, plan_horizon=2)
    shape = CentralShape(
        group_length=4, latents_per_group=2, encoder_layers=1, decoder_layers=2, latent_layers=3, plan_horizon=1,
        latent_local_layers=1, channels=channels, levels=(above,) * levels,
    )  # fmt: skip
    model = CentralModel(CentralConfig.beside(shape, decoder().config)).eval()
    matrices = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(
                lambda linear, args, out: matrices.append(2 * linear.in_features * out.numel())
            )
    pairs = 3 * 32 * 32  # token layers
    pairs += 3 * channels * 16 * 16 + 8 * 2 * 2  # latents of all groups, and those of each
    pairs += 8 * (2 * 4 + 4 * 2 + 4 * 1)  # reducer, upsampler, plan
    if levels:
        pairs += 2 * channels * 12 * 12 + 4 * (3 * 4 + 4 * 3 + 4 * 2)
    counted = forward_flops(model, 32)
    assert counted * 32 == sum(matrices) + 4 * 32 * pairs
