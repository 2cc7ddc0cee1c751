import pytest

from schemas import launch
from stages.engine import stopping
from stages.engine.stopping import Deadline


def asked(monkeypatch, *seconds, minutes=2.0, writing=0.0):
    """What a deadline says after steps of so many seconds."""
    now = 1000.0
    monkeypatch.setattr(launch, "STARTED", now)
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now)
    deadline, said = Deadline(minutes), []
    for took in seconds:
        now += took
        said.append(deadline.near(writing))
    return said


def test_two_more_of_the_longest_step_must_fit(monkeypatch):
    assert asked(monkeypatch, 1, 30, 1, 20, 8, 1) == [False, False, False, False, True, True]
    assert asked(monkeypatch, 1, 30, 1, 20, 7, writing=0.5) == [False, False, False, False, True]
    assert asked(monkeypatch, 1, 30, 1, 20, 7) == [False] * 5


def test_the_first_step_counts_only_until_there_is_a_second(monkeypatch):
    assert asked(monkeypatch, 39, 1, *[1] * 78) == [*[False] * 79, True]
    assert asked(monkeypatch, 40) == [True]


@pytest.mark.parametrize("took", [1, 10_000])
def test_without_minutes_no_time_is_too_late(took, monkeypatch):
    assert asked(monkeypatch, took, took, minutes=None) == [False, False]
