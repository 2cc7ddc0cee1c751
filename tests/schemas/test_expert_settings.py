from typing import Any

import pytest

from schemas.failures import UsageFailure
from schemas.strict import validated
from schemas.train_experts import LINEARS, ExpertsConfig


def settings(**values: Any) -> ExpertsConfig:
    return validated(ExpertsConfig, values, "cpipe train-experts")


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (["q_proj", "v_proj"], ("q_proj", "v_proj")),
        (["v_proj,q_proj"], ("q_proj", "v_proj")),
        (["v_proj, up_proj", "v_proj"], ("v_proj", "up_proj")),
        (["all"], LINEARS),
        (["q_proj,all"], LINEARS),
    ],
)
def test_targets_are_a_set_however_they_are_written(written: list[str], expected: tuple[str, ...]) -> None:
    assert settings(kind="lora", lora={"targets": written}).lora.targets == expected


@pytest.mark.parametrize(
    ("lora", "match"),
    [
        ({"rank": 0}, "`lora.rank`: input should be greater than 0, found 0"),
        ({"alpha": 0}, "`lora.alpha`: input should be greater than 0"),
        ({"targets": ["q_proj,lm_head"]}, r"`lora.targets.1`: input should be 'q_proj', .* found 'lm_head'"),
        ({"targets": []}, "`lora.targets`: tuple should have at least 1 item"),
        ({"targets": [3]}, "`lora.targets`"),
    ],
)
def test_adapters_that_cannot_be_are_refused_in_one_line(lora: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageFailure, match=match) as refused:
        settings(kind="lora", lora=lora)
    assert "\n" not in str(refused.value)


def test_settings_of_adapters_are_not_ignored_where_there_are_none() -> None:
    with pytest.raises(UsageFailure, match="rank, alpha and targets are settings of --kind lora, and the kind is full"):
        settings(lora={"rank": 8})
    assert settings(lora={"rank": 16}).kind == "full"  # the default, spelled out
