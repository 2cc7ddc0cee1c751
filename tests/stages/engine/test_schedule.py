import pytest
from pydantic import ValidationError

from schemas.training import TrainingConfig
from stages.engine.schedule import learning_rate


def rates(**settings):
    config = TrainingConfig(learning_rate=2.0, **settings)
    return [learning_rate(step, config) for step in range(config.steps)]


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
