import pytest
import torch
from pydantic import ValidationError
from torch import nn

from schemas.training import TrainingConfig
from stages.engine.schedule import OF_ADAMW, learning_rate, peak_rate


def rates(**settings):
    config = TrainingConfig(learning_rate=2.0, **settings)
    return [learning_rate(step, config) for step in range(config.steps)]


def peak(module, seen=0, **settings):
    config = TrainingConfig(**{"steps": 10, "batch_size": 4, "sequence_length": 25, "engine": "torch", **settings})
    return peak_rate(config, module, seen)


def test_the_peak_is_what_is_given():
    assert peak(nn.Linear(4, 4), learning_rate=0.0123456) == 0.0123456


@pytest.mark.parametrize(
    ("width", "settings", "expected"),
    [
        (100, {}, 0.033),  # 6 x 10,000 weights x 1,000 tokens = 6e7 FLOPs, whose eighth root is 9.381
        (100, {"batch_size": 8, "steps": 5}, 0.033),
        (100, {"steps": 2560}, 0.017),  # 256 times the FLOPs, half the rate
        (1600, {}, 0.017),
        (100, {"optimizer": "adamw"}, 0.017),
        (100, {"seen": 255_000}, 0.0083),  # half of what as many tokens in all would take
        (100, {"seen": None}, 0.0086),  # 20 tokens for each weight before: 201,000 in all
    ],
)
def test_without_one_it_falls_with_the_flops_of_what_is_trained(width, settings, expected):
    frozen = nn.Linear(7, 7).requires_grad_(False)
    assert peak(nn.Sequential(nn.Linear(width, width, bias=False), frozen), **settings) == expected


def test_adapters_are_new_and_count_with_what_they_stand_beside():
    """For a decoder of 7e9 weights that was trained elsewhere, near the rates in use for it."""
    module = nn.Module()
    module.frozen = nn.Parameter(torch.empty(7_000_000, 1000, device="meta"), requires_grad=False)
    module.beside = nn.Module()
    module.beside.lora_A = nn.Parameter(torch.empty(16, 1000, device="meta"))
    assert peak(module, seen=None) == 0.0003
    assert peak(module, seen=0) > 0.0003


def test_a_law_fit_far_away_is_met_where_it_was_fit():
    """DeepSeek LLM 67B (Bi et al. 2024, table 2): 67e9 weights, 2e12 tokens, a rate of 3.2e-4."""
    large = torch.empty(67_000_000, 1000, device="meta")
    module = nn.ParameterList([nn.Parameter(large)])
    found = peak(module, steps=100_000, batch_size=5_000, sequence_length=4_000) / OF_ADAMW
    assert found == pytest.approx(3.2e-4, rel=0.02)


def test_the_rate_rises_linearly_to_the_peak_and_falls_as_half_a_cosine():
    found = rates(steps=13, warmup=4 / 13, final_learning_rate=0.1)
    assert found[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    # 8 steps from the peak to the end: shares (1 + cos(pi k / 8)) / 2 of what lies above the floor of 0.2
    shares = [1, 0.961940, 0.853553, 0.691342, 0.5, 0.308658, 0.146447, 0.038060, 0]
    assert found[4:] == pytest.approx([0.2 + 1.8 * share for share in shares], abs=1e-5)


def test_without_warmup_the_first_step_is_the_peak():
    found = rates(steps=5, warmup=0.0, final_learning_rate=0.0)
    assert found == pytest.approx([2.0, 1.707107, 1.0, 0.292893, 0.0], abs=1e-6)


def test_a_final_share_of_one_is_a_constant_rate():
    assert rates(steps=6, warmup=0.0, final_learning_rate=1.0) == pytest.approx([2.0] * 6)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_no_rate_is_zero_before_the_end(schedule):
    for steps in (1, 2, 3, 20):
        found = rates(steps=steps, warmup=0.5, final_learning_rate=0.1, schedule=schedule)
        assert min(found) > 0
        assert max(found) == pytest.approx(2.0)


def test_linear_is_a_straight_line_to_the_final_share():
    found = rates(steps=7, warmup=2 / 7, final_learning_rate=0.1, schedule="linear")
    assert found == pytest.approx([1.0, 2.0, 2.0, 1.55, 1.1, 0.65, 0.2])


def test_wsd_keeps_the_peak_and_falls_as_the_root_of_the_last_steps():
    found = rates(steps=10, warmup=0.2, decay=0.4, final_learning_rate=0.1, schedule="wsd")
    assert found[:6] == pytest.approx([1.0, 2.0, 2.0, 2.0, 2.0, 2.0])
    # 0.2 + 1.8 (1 - sqrt(k / 4))
    assert found[6:] == pytest.approx([1.1, 0.727208, 0.441154, 0.2], abs=1e-6)


def test_wsd_falls_to_the_same_end_from_wherever_it_is_cut():
    """What it is for: the stable steps of a short run are those of a longer one."""
    short, long = (rates(steps=steps, warmup=2 / steps, decay=4 / steps, schedule="wsd") for steps in (10, 20))
    assert short[:6] == long[:6]
    assert short[-4:] == pytest.approx(long[-4:])


def test_constant_stays_at_the_peak_whatever_the_final_share():
    assert rates(steps=5, warmup=0.4, final_learning_rate=0.0, schedule="constant") == [1.0, 2.0, 2.0, 2.0, 2.0]


def test_phases_that_do_not_fit_are_refused():
    with pytest.raises(ValidationError, match=r"warmup 0.5 and decay 0.6 are more than all steps"):
        rates(steps=10, warmup=0.5, decay=0.6, schedule="wsd")
    rates(steps=10, warmup=0.5, decay=0.6)  # the cosine has no such phase
