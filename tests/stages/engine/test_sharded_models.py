"""ZeRO under the models whose modules read each other's parameters or are frozen, in one process and in two.

Under ZeRO 3 nothing is left whole for being small.
"""

import itertools
import json
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_processes import ended, in_two, metrics_of, started, weights_of
from toy_training import config, weights

from schemas.central import CentralConfig, CentralShape, LevelShape
from schemas.compose_model import BridgeConfig
from schemas.decoder import DecoderConfig
from schemas.train_experts import LoraConfig
from schemas.training import TrainingConfig
from stages.engine import checkpoints
from stages.engine.loop import train
from stages.nn.central import CentralLoss, CentralModel
from stages.nn.composed import ComposedModel
from stages.nn.composed_loss import ComposedLoss
from stages.nn.decoder import Decoder, NextTokenLoss
from stages.nn.lora import add_adapters

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


def one_level() -> CentralLoss:
    return CentralLoss(central())


def adapted() -> NextTokenLoss:
    torch.manual_seed(2)
    decoder = add_adapters(Decoder(SEED), LoraConfig(rank=2), seed=5)
    for parameter in decoder.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return NextTokenLoss(decoder)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "central": one_level,
    "two levels": two_levels,
    "stitch": partial(composed, "stitch"),
    "calm": partial(composed, "calm"),
    "adapters": adapted,
}


def settings(stage: int | None, **changes: object) -> TrainingConfig:
    engine = (
        {"engine": "torch"} if stage is None else {"engine": "deepspeed", "zero_stage": stage, "deepspeed": SHARDED}
    )
    return config(**{**engine, "steps": 3, "sequence_length": 32, "learning_rate": 1e-3, **changes})


def both_end(folder: Path, *configs: TrainingConfig, **task: Any) -> list[int]:
    """Exit codes of two processes that train `configs`, one after the other."""
    found = []
    for rank, process in enumerate(in_two(folder, *configs, rows=rows_at, **task)):
        code, errors = ended(process, folder, rank, seconds=300)
        assert code in (0, -signal.SIGKILL), errors
        found.append(code)
    return found


def assert_trained_like(found: dict[str, Tensor], expected: dict[str, Tensor], make: Callable[[], nn.Module]) -> None:
    """What is trained is close and has moved; what is frozen has not."""
    begun, trained = weights(make()), []
    for name, parameter in make().named_parameters():
        torch.testing.assert_close(found[name], expected[name], atol=2e-5, rtol=0)
        if parameter.requires_grad:
            trained.append(name)
        else:
            assert torch.equal(found[name], begun[name])
    # Of the module that gives no tensors, where there is one.
    start = next((name for name in trained if name.endswith("central.start_KD")), trained[0])
    assert not torch.equal(found[start], begun[start])


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_zero_3_trains_what_torch_trains_and_leaves_the_frozen_alone(model: str, tmp_path: Path) -> None:
    found, losses = [], []
    for stage in (None, 3):
        module = MODELS[model]()
        losses.append(train(module, rows_at, settings(stage), tmp_path, "toy").curve)
        found.append(weights(module))
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert_trained_like(found[1], found[0], MODELS[model])


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_two_processes_train_what_one_trains_under_every_stage(model: str, tmp_path: Path) -> None:
    module = MODELS[model]()
    (tmp_path / "one").mkdir()
    losses = train(module, rows_at, settings(None), tmp_path / "one", "toy").curve
    assert both_end(tmp_path / "two", *map(settings, (1, 2, 3)), make=MODELS[model]) == [0, 0]
    for rank, number in itertools.product((0, 1), (0, 1, 2)):
        assert metrics_of(tmp_path / "two", rank, number).curve == pytest.approx(losses, abs=1e-5)
        assert_trained_like(weights_of(tmp_path / "two", rank, number), weights(module), MODELS[model])


@pytest.mark.slow
@pytest.mark.parametrize("model", ["two levels", "calm"])
def test_two_processes_train_with_muon_what_one_trains(model: str, tmp_path: Path) -> None:
    muon = {"optimizer": "muon", "gradient_clipping": 0.05}  # of every step
    module = MODELS[model]()
    (tmp_path / "one").mkdir()
    losses = train(module, rows_at, settings(None, **muon), tmp_path / "one", "toy").curve
    every = [settings(stage, **muon) for stage in (0, 1, 2)]
    assert both_end(tmp_path / "two", *every, make=MODELS[model]) == [0, 0]
    for rank, number in itertools.product((0, 1), (0, 1, 2)):
        assert metrics_of(tmp_path / "two", rank, number).curve == pytest.approx(losses, abs=1e-5)
        assert_trained_like(weights_of(tmp_path / "two", rank, number), weights(module), MODELS[model])


@pytest.mark.slow
def test_two_processes_killed_under_zero_3_continue_a_composed_model_to_the_bit(tmp_path: Path) -> None:
    make, often = MODELS["calm"], settings(3, steps=5, checkpoint_every=1)
    both_end(tmp_path / "whole", often, make=make)
    killed = both_end(tmp_path / "cut", often, make=make, environment={"DEATH": "3", "KILL": "yes"})
    assert killed == [-signal.SIGKILL] * 2
    assert checkpoints.newest(tmp_path / "cut" / "checkpoints") is not None
    both_end(tmp_path / "cut", often, make=make)
    for rank in (0, 1):
        expected = weights_of(tmp_path / "whole", rank)
        found = weights_of(tmp_path / "cut", rank)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert metrics_of(tmp_path / "cut", rank) == metrics_of(tmp_path / "whole", rank)


@pytest.mark.slow
def test_two_one_and_again_two_processes_continue_a_composed_model_under_zero_3(tmp_path: Path) -> None:
    make, often = MODELS["stitch"], settings(3, steps=6, checkpoint_every=2)
    module = make()
    (tmp_path / "one").mkdir()
    losses = train(module, rows_at, settings(None, steps=6), tmp_path / "one", "toy").curve
    folder = tmp_path / "changing"
    assert both_end(folder, often, make=make, environment={"DEATH": "3", "KILL": "yes"}) == [-signal.SIGKILL] * 2
    alone = started(folder, often, environment={"DEATH": "5", "KILL": "yes"}, make=make, rows=rows_at)
    assert ended(alone, folder, seconds=300)[0] == -signal.SIGKILL
    found = checkpoints.newest(folder / "checkpoints")
    assert found is not None and found[1].step >= 2
    assert both_end(folder, often, make=make) == [0, 0]
    assert metrics_of(folder).curve == pytest.approx(losses, abs=1e-5)
    assert_trained_like(weights_of(folder), weights(module), make)
