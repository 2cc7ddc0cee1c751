import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from test_engines import assert_close, reference
from toy_training import Toy, batch_at, config, weights

from schemas.failures import UsageFailure
from schemas.training import TrainingConfig
from stages.engine.deepspeed_config import deepspeed_config
from stages.engine.engines import start_engine
from stages.engine.loop import train
from stages.engine.optimizer import choose_optimizer
from stages.engine.processes import Place

ALONE = Place(0, 0, 1, torch.device("cpu"))


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "muon"), ({"type": "auto"}, "muon"), ({"type": "AdamW", "params": {"eps": 1e-8}}, "adamw")],
)
def test_auto_follows_a_file_that_names_adamw(given: dict[str, Any], expected: str) -> None:
    settings = config(engine="deepspeed", optimizer="auto", deepspeed=json.dumps({"optimizer": given}))
    assert choose_optimizer(settings, Toy()) == expected
    assert deepspeed_config(settings, "fp32", expected, 1)


def told(given: dict[str, Any], world: int = 1, precision: str = "fp32", **settings: Any) -> dict[str, Any]:
    return deepspeed_config(config(deepspeed=json.dumps(given), **settings), precision, "adamw", world)


def test_a_file_for_the_field_is_replaced_by_its_content(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{\n "zero_optimization": {"stage": 1},\n "prescale_gradients": true}')
    from_file, from_text = (
        TrainingConfig.from_mapping({"deepspeed": value})
        for value in (str(path), '{"prescale_gradients": true, "zero_optimization": {"stage": 1}}')
    )
    assert from_file == from_text
    assert from_file.key_settings()["deepspeed"] == '{"prescale_gradients":true,"zero_optimization":{"stage":1}}'
    assert TrainingConfig.from_json(from_file.model_dump_json()) == from_file  # as a manifest is read, without the file
    assert from_file.key_settings() != TrainingConfig().key_settings()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read .*ds.json: No such file"),
        ("{", "ds.json is not valid JSON"),
        ('{"a": NaN}', "NaN is no JSON"),
        ("[1]", "must hold a JSON object, found"),
    ],
)
def test_a_file_that_is_none_is_refused(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "ds.json").write_text(text)
    with pytest.raises(ValidationError, match=message):
        TrainingConfig.from_mapping({"deepspeed": str(tmp_path / "ds.json")})


def test_what_is_passed_reaches_deepspeed_beside_cpipes_own() -> None:
    given = {
        "communication_data_type": "fp32",
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000, "overlap_comm": "auto"},
    }
    found = told(given, world=2, zero_stage=2, micro_batch_size=1)
    assert found["communication_data_type"] == "fp32"
    assert found["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000}
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert [found[size] for size in sizes] == [4, 1, 2]
    offload = {"zero_optimization": {"offload_optimizer": {"pin_memory": True}}}
    assert told(offload, zero_stage=1, offload_optimizer="cpu")["zero_optimization"] == {
        "stage": 1,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
    }


EQUAL: dict[str, Any] = {
    "train_batch_size": 4,
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 0.85,
    "steps_per_print": 2000,
    "wall_clock_breakdown": False,
    "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "none"}},
    "zero_allow_untested_optimizer": True,
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.95], "weight_decay": 0.1, "eps": 1e-8}},
    "scheduler": "auto",
    "fp16": {"enabled": False, "loss_scale": 128},
    "bf16": {"enabled": "auto"},
}


def test_equal_values_and_auto_change_nothing(tmp_path: Path) -> None:
    assert told(EQUAL, zero_stage=1) == told({}, zero_stage=1)
    module = Toy()
    settings = config(engine="auto", zero_stage=1, deepspeed=json.dumps(EQUAL))
    train(module, batch_at, settings, tmp_path, "toy")
    assert_close(weights(module), reference(settings, 8))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"zero_optimisation": {}}, "the key `zero_optimisation` .*; did you mean `zero_optimization`?"),
        ({"gradient_acumulation_steps": 1}, "did you mean `gradient_accumulation_steps`?"),
        ({"checkpoint": {"writer": {}}}, "the key `checkpoint` is not one cpipe hands to DeepSpeed; it may have comm"),
        ({"data_efficiency": {}}, "the key `data_efficiency` is not one"),
        ({"zero_optimization": {"offload_param": {}}}, "`zero_optimization.offload_param` is not handed"),
        ({"zero_optimization": {"round_robin_gradients": True}}, "`zero_optimization.round_robin_gradients` is not"),
        ({"zero_optimization": {"legacy_stage1": True}}, "`zero_optimization.legacy_stage1` is not"),
        ({"train_batch_size": 8}, "train_batch_size is 8, but --batch-size says 4: make them equal"),
        ({"train_micro_batch_size_per_gpu": 1}, "is 1, but --micro-batch-size says 4"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps is 2, but cpipe says 1"),
        ({"gradient_clipping": 1.0}, "gradient_clipping is 1.0, but --gradient-clipping says 0.85"),
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage is 2, but --zero-stage says 0"),
        ({"zero_optimization": {"stage": False}}, "zero_optimization.stage is false, but --zero-stage says 0"),
        ({"zero_optimization": 2}, "`zero_optimization` must be a table of settings, found 2"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            '"nvme", but --offload-optimizer says "none"',
        ),
        ({"optimizer": {"type": "Lamb"}}, 'optimizer.type is "Lamb", but --optimizer says "AdamW"'),
        (
            {"optimizer": {"params": {"lr": 0.1}}},
            "optimizer.params.lr is 0.1, but --learning-rate, or the size .* says 0.01",
        ),
        ({"optimizer": {"params": {"betas": [0.9, 0.999]}}}, r"is \[0.9, 0.999\], but --adam-beta1"),
        ({"optimizer": {"params": {"muon": 1}}}, "`optimizer.params.muon` is not one of lr, betas"),
        ({"scheduler": {"type": "WarmupLR"}}, 'scheduler "WarmupLR" beside --schedule cosine: leave it out'),
        ({"bf16": {"enabled": True}}, "bf16.enabled is true, but --precision says false"),
        ({"zero_force_ds_cpu_optimizer": True}, "zero_force_ds_cpu_optimizer is true, but cpipe says false"),
        ({"wall_clock_breakdown": True}, "wall_clock_breakdown is true, but cpipe says false"),
    ],
)
def test_a_clash_or_an_unknown_key_is_one_line_with_both_values(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageFailure, match=f"--deepspeed: .*{message}") as refused:
        told(given)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"overlap_com": True}, "unknown key `overlap_com`"),
        ({"reduce_bucket_size": -1}, "`reduce_bucket_size`: .*found -1"),
        ({"mics_shard_size": 2}, ".*'zero_optimization.mics_shard_size' is no longer supported"),
    ],
)
def test_what_deepspeed_refuses_is_one_line(given: dict[str, Any], message: str) -> None:
    settings = config(engine="auto", zero_stage=1, deepspeed=json.dumps({"zero_optimization": given}))
    with pytest.raises(UsageFailure, match=f"--deepspeed: DeepSpeed refuses its settings: {message}") as refused:
        start_engine(Toy(), settings, ALONE)
    assert "\n" not in str(refused.value)


def test_fp16_may_say_what_cpipe_does() -> None:
    told({"fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 16}}, precision="fp16")
    with pytest.raises(UsageFailure, match=r"fp16.loss_scale is 128, but cpipe says 0"):
        told({"fp16": {"enabled": True, "loss_scale": 128}}, precision="fp16")
    with pytest.raises(UsageFailure, match=r"fp16.enabled is false, but --precision says true"):
        told({"fp16": {"enabled": False}}, precision="fp16")


def test_torch_takes_no_such_file() -> None:
    with pytest.raises(UsageFailure, match="--engine torch trains on one device, without ZeRO or a --deepspeed file"):
        start_engine(Toy(), config(engine="torch", deepspeed="{}"), ALONE)
