"""ZeRO 3 under the models whose modules read each other's parameters, with nothing left whole for being small."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from toy_training import config, weights

from schemas.central import CentralConfig, CentralShape, LevelShape
from schemas.compose_model import BridgeConfig
from schemas.decoder import DecoderConfig
from stages.engine.loop import train
from stages.nn.central import CentralLoss, CentralModel
from stages.nn.composed import ComposedModel
from stages.nn.composed_loss import ComposedLoss
from stages.nn.decoder import Decoder

SHARDED = json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}})
SEED = DecoderConfig(
    vocab_size=29, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
    num_key_value_heads=1,
)  # fmt: skip
SHAPE = CentralShape(
    group_length=4, latents_per_group=2, encoder_layers=1, latent_layers=2, decoder_layers=2, token_window=7,
    plan_horizon=2,
)  # fmt: skip
ABOVE = LevelShape(group_length=2, latents_per_group=2, latent_layers=1, plan_horizon=2, shared_positions=True)


def central(**changes: object) -> CentralModel:
    torch.manual_seed(1)
    model = CentralModel(CentralConfig.beside(SHAPE.model_copy(update=changes), SEED))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def two_levels() -> CentralLoss:
    more = {"shared_positions": True, "channels": 2, "depth_weighted": True, "latent_weight": 0.1}
    return CentralLoss(central(levels=(ABOVE,), **more))


def composed(bridge: str) -> ComposedLoss:
    model, experts = central(), [Decoder(SEED).eval() for _ in range(2)]
    sites = BridgeConfig.model_validate({"bridge": bridge, "token_sites": 2, "latent_sites": 2})
    return ComposedLoss(ComposedModel(model, experts, sites))


def rows_at(step: int) -> Tensor:
    return torch.randint(29, (4, 33), generator=torch.Generator().manual_seed(step))


@pytest.mark.slow
@pytest.mark.parametrize(
    "make", [lambda: CentralLoss(central()), two_levels, lambda: composed("stitch"), lambda: composed("calm")],
    ids=["central", "two levels", "stitch", "calm"],
)  # fmt: skip
def test_zero_3_trains_what_torch_trains_and_leaves_the_frozen_alone(
    make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    found, losses = [], []
    for engine in ({"engine": "torch"}, {"engine": "deepspeed", "zero_stage": 3, "deepspeed": SHARDED}):
        module = make()
        settings = config(**engine, steps=3, sequence_length=32, learning_rate=1e-3)
        losses.append(train(module, rows_at, settings, tmp_path, "toy").curve)
        found.append(weights(module))
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    begun = weights(make())
    for name, parameter in make().named_parameters():
        torch.testing.assert_close(found[1][name], found[0][name], atol=2e-5, rtol=0)
        if not parameter.requires_grad:
            assert torch.equal(found[1][name], begun[name])
    start = next(name for name in begun if name.endswith("central.start_KD"))  # of the module that gives no tensors
    assert not torch.equal(found[1][start], begun[start])
