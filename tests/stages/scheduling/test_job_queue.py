import pytest

from schemas.failures import ResourceFailure, UsageFailure
from schemas.submit_jobs import JobRecord
from stages.scheduling import job_queue


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Makes one of Slurm's commands of a line of shell; there are no others."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")

    def make(name, line):
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)

    for name in ("sbatch", "squeue", "sacct", "scancel"):
        make(name, "exit 1")
    return make


def record(number, *tasks, name="n"):
    return JobRecord(job="x", number=number, name=name, tasks=tasks, command="c", submitted="now")


@pytest.mark.parametrize("reply", ["17", "17;cluster"])
def test_the_number_of_a_job_is_what_sbatch_says(command, tmp_path, reply):
    command("sbatch", f'echo "{reply}"; printf "%s\\n" "$@" > {tmp_path}/words')
    assert job_queue.submit(tmp_path / "a b.sh", "log-%j", ["3", "4_1"], "0-2%1") == 17
    assert (tmp_path / "words").read_text().splitlines() == [
        "--parsable", "--output=log-%j", "--dependency=afterok:3:4_1", "--array=0-2%1", str(tmp_path / "a b.sh"),
    ]  # fmt: skip


@pytest.mark.parametrize("line", ["echo bad partition. >&2; exit 1", "echo what; echo bad partition.", "exit 3"])
def test_a_job_that_is_refused_is_one_line(command, tmp_path, line):
    command("sbatch", line)
    with pytest.raises(
        UsageFailure, match=r"^sbatch refused .*a\.sh: (bad partition|without a word): change \[slurm\]$"
    ):
        job_queue.submit(tmp_path / "a.sh", "log", [], None)


@pytest.mark.parametrize(
    ("line", "limit"),
    [
        ("echo 'MaxArraySize            = 1001'", 1001),
        ("printf 'Configuration data\\nMaxArraySize = 5\\nMaxDBDMsgs = 20\\n'", 5),
        ("echo 'NotMaxArraySize = 7'", None),
        ("echo 'MaxArraySize = many'", None),
        ("echo 'MaxArraySize = 9'; exit 1", None),
        ("exec sleep 20", None),
    ],
)
def test_the_limit_of_arrays_is_what_scontrol_says(command, monkeypatch, line, limit):
    command("scontrol", line)
    monkeypatch.setattr(job_queue, "PATIENCE", 0.3 if "sleep" in line else 30)
    assert job_queue.array_limit() == limit


def test_without_scontrol_no_limit_is_known(command):
    assert job_queue.array_limit() is None


def test_states_are_found_by_number_task_and_name(command):
    command("squeue", "echo '5|RUNNING|n'; echo '6_0|PENDING|n'; echo '6_2|COMPLETED|n'; echo '7|RUNNING|other'")
    assert job_queue.states([record(5), record(6, 0, 2), record(7)]) == {
        "5": "RUNNING",
        "6_0": "PENDING",
        "6_2": "COMPLETED",
    }


def test_nothing_submitted_asks_nobody(command):
    assert job_queue.states([]) == {}


def test_a_controller_that_does_not_answer_is_not_waited_for(command, monkeypatch):
    command("squeue", "exec sleep 20")
    monkeypatch.setattr(job_queue, "PATIENCE", 0.3)
    with pytest.raises(ResourceFailure, match=r"squeue did not answer within 0 s: try again later"):
        job_queue.states([record(5)])


def test_without_accounts_what_squeue_forgot_is_unknown(command, monkeypatch):
    command("squeue", "exit 0")
    assert job_queue.states([record(5)]) == {}
    command("sacct", "exec sleep 20")
    monkeypatch.setattr(job_queue, "PATIENCE", 0.3)
    assert job_queue.states([record(5)]) == {}
    command("sacct", "echo '5|CANCELLED by 1000|n'")
    monkeypatch.setattr(job_queue, "PATIENCE", 30)
    assert job_queue.states([record(5)]) == {"5": "CANCELLED"}
