import random

import pytest

from schemas.failures import UsageFailure
from schemas.submit_jobs import JobResources
from stages.scheduling import job_queue
from stages.scheduling.limits import ArrayLimits, cut, find_limits
from stages.scheduling.scripts import Job, Part


@pytest.mark.parametrize(
    ("tasks", "limits", "parts"),
    [
        ([], (3, 3), []),
        ([0, 1, 2], (3, 3), [(0, (0, 1, 2))]),
        ([0, 1, 2, 3], (3, 3), [(0, (0, 1, 2)), (3, (3,))]),
        ([2, 5, 6], (3, 3), [(0, (2,)), (5, (5, 6))]),
        ([7, 8], (3, 3), [(7, (7, 8))]),
        ([2, 0, 1], (2, 2), [(0, (0, 1)), (2, (2,))]),
        ([0, 1, 2, 3, 4], (100, 2), [(0, (0, 1)), (2, (2, 3)), (4, (4,))]),
        ([1, 2], (1, 1), [(1, (1,)), (2, (2,))]),
        ([1, 5, 9], (10, 10), [(0, (1, 5, 9))]),
    ],
)
def test_a_long_array_is_cut_where_slurm_wants_it(tasks, limits, parts):
    assert cut(tasks, ArrayLimits(*limits)) == [Part(*part) for part in parts]


def test_parts_hold_every_task_once_and_no_number_or_length_is_beyond_the_limits():
    draw = random.Random(0)
    for _ in range(200):
        limits = ArrayLimits(draw.randint(1, 20), draw.randint(1, 20))
        tasks = draw.sample(range(100), draw.randint(0, 60))
        parts = cut(tasks, limits)
        assert [task for part in parts for task in part.tasks] == sorted(tasks)
        for part in parts:
            assert all(0 <= task - part.begin < limits.size for task in part.tasks)
            assert 0 < len(part.tasks) <= limits.tasks


@pytest.mark.parametrize(
    ("said", "submits", "limits"),
    [
        ((1001, 1001), True, (1001, 1001)),
        ((100001, 1000), True, (100001, 1000)),
        ((10, 50), True, (10, 10)),
        (None, True, (7, 7)),
        ((1001, 1001), False, (7, 7)),
    ],
)
def test_limits_are_slurms_or_those_of_the_settings(monkeypatch, said, submits, limits):
    monkeypatch.setattr(job_queue, "array_limits", lambda: said)
    jobs = [Job("experts", ("x",), JobResources(), tasks=(0, 1))]
    assert find_limits(jobs, 7, submits=submits) == ArrayLimits(*limits)


def test_a_slurm_without_arrays_is_one_line(monkeypatch):
    monkeypatch.setattr(job_queue, "array_limits", lambda: (0, 0))
    jobs = [Job("experts", ("x",), JobResources(), tasks=(0, 1))]
    with pytest.raises(UsageFailure, match=r"takes no arrays of jobs \(MaxArraySize = 0, .*: submit `cpipe run` as"):
        find_limits(jobs, 7, submits=True)
    find_limits([Job("cluster", ("x",), JobResources())], 7, submits=True)
