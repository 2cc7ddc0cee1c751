import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from schemas.decoder import DecoderConfig
from schemas.failures import UsageFailure
from schemas.train_experts import LINEARS, LoraConfig
from stages.nn.decoder import Decoder, NextTokenLoss
from stages.nn.lora import LoraLinear, adapters, add_adapters

SHAPE = DecoderConfig(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=30,
)  # fmt: skip
IDS = torch.arange(12)[None]


def decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder(SHAPE).eval()


def opened(model: Decoder) -> Decoder:
    """`model`, its adapters no longer at their start."""
    for index, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(index))
    return model


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_is_its_own_map_and_a_low_rank_one(bias: bool) -> None:
    torch.manual_seed(1)
    linear = nn.Linear(6, 10, bias=bias)
    layer = LoraLinear(linear, LoraConfig(rank=3, alpha=4.5), None)
    nn.init.normal_(layer.lora_B)
    u = torch.randn(2, 5, 6)
    expected = F.linear(u, linear.weight + 1.5 * layer.lora_B @ layer.lora_A, linear.bias)
    torch.testing.assert_close(layer(u), expected)
    assert not any(parameter.requires_grad for parameter in linear.parameters())


def test_a_new_adapter_changes_nothing_and_can_be_trained() -> None:
    before = decoder()(IDS)
    model = add_adapters(decoder(), LoraConfig(rank=4), seed=0)
    assert torch.equal(model(IDS), before)
    NextTokenLoss(model)(IDS)["loss"].backward()
    gradients = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert gradients == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.rsplit(".", 1)[-1] for name in gradients} == {"lora_A", "lora_B"}
    assert not torch.equal(opened(model)(IDS), before)


def test_adapters_alone_can_learn_a_text_by_heart_and_the_rest_stays() -> None:
    model = opened(add_adapters(decoder(), LoraConfig(rank=4), seed=0))
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    nn.init.normal_(model.model.embed_tokens.weight)  # tied: logits as large as they have to be
    loss = NextTokenLoss(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(60):
        losses.append(loss(IDS)["loss"])
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.25 * losses[0]
    del frozen["model.embed_tokens.weight"]
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


def test_the_start_of_a_is_that_of_a_linear_layer_and_comes_from_the_seed() -> None:
    def drawn(seed: int) -> dict[str, tuple[Tensor, Tensor]]:
        torch.manual_seed(99)  # nothing but the seed given counts
        return adapters(add_adapters(decoder(), LoraConfig(rank=8), seed))

    bounds = {name: 1 / math.sqrt(weight.shape[1]) for name, weight in decoder().state_dict().items() if "proj" in name}
    found = drawn(0)
    assert found.keys() == bounds.keys()
    for name, (a, b) in found.items():
        assert 0.8 * bounds[name] < a.abs().max() <= bounds[name]
        assert not b.any()
        assert torch.equal(a, drawn(0)[name][0]) and not torch.equal(a, drawn(1)[name][0])


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("down_proj",), LINEARS])
def test_only_the_targets_get_adapters_in_every_layer(targets: tuple[str, ...]) -> None:
    model = add_adapters(decoder(), LoraConfig.from_mapping({"rank": 2, "targets": targets}), seed=0)
    assert {name.split(".")[-2] for name in adapters(model)} == set(targets)
    assert len(adapters(model)) == 2 * len(targets)
    assert sum(isinstance(module, LoraLinear) for module in model.modules()) == 2 * len(targets)


def test_a_rank_beyond_the_narrower_side_is_refused_in_one_line() -> None:
    add_adapters(decoder(), LoraConfig(rank=8), seed=0)  # k_proj writes 8 numbers
    with pytest.raises(UsageFailure, match=r"--rank 9 is more than k_proj's narrower side of 8: lower it") as refused:
        add_adapters(decoder(), LoraConfig(rank=9), seed=0)
    assert "\n" not in str(refused.value)


def test_a_target_that_the_decoder_lacks_is_refused_in_one_line() -> None:
    model = decoder()
    for layer in model.model.layers:
        layer.mlp = nn.Identity()  # as in an architecture of other names
    with pytest.raises(UsageFailure, match="no linear layers of the name gate_proj: leave it out of --targets"):
        add_adapters(model, LoraConfig(rank=2), seed=0)
