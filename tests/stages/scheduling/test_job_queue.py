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


def record(number, *tasks, name="n", begin=0):
    return JobRecord(job="x", number=number, name=name, tasks=tasks, begin=begin, command="c", submitted="now")


@pytest.mark.parametrize("reply", ["17", "17;cluster"])
def test_the_number_of_a_job_is_what_sbatch_says(command, tmp_path, reply):
    command("sbatch", f'echo "{reply}"; printf "%s\\n" "$@" > {tmp_path}/words')
    assert job_queue.submit(tmp_path / "a b.sh", "log-%j", ["3", "4_1"], "0-2%1") == 17
    assert (tmp_path / "words").read_text().splitlines() == [
        "--parsable", "--output=log-%j", "--dependency=afterok:3:4_1", "--array=0-2%1", str(tmp_path / "a b.sh"),
    ]  # fmt: skip


def test_a_part_of_an_array_says_where_it_begins_and_what_must_be_over(command, tmp_path):
    command("sbatch", f'echo 17; printf "%s\\n" "$@" > {tmp_path}/words')
    job_queue.submit(tmp_path / "a.sh", "log", ["3"], "0-2", begin=1001, follows=16)
    words = (tmp_path / "words").read_text().splitlines()
    assert words[2:] == ["--dependency=afterok:3,afterany:16", "--array=0-2", str(tmp_path / "a.sh"), "1001"]
    job_queue.submit(tmp_path / "a.sh", "log", [], "0-2", follows=16)
    assert "--dependency=afterany:16" in (tmp_path / "words").read_text().splitlines()


@pytest.mark.parametrize(
    "told",
    [
        "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)",
        "AssocMaxSubmitJobLimit",
        "Batch job submission failed: Slurm temporarily unable to accept job, sleeping and retrying",
    ],
)
def test_too_many_jobs_are_told_as_that(command, tmp_path, told):
    command("sbatch", f'echo "sbatch: error: {told}" >&2; exit 1')
    with pytest.raises(ResourceFailure, match=r"sbatch refused .*: when jobs have ended, give the same command again$"):
        job_queue.submit(tmp_path / "a.sh", "log", [], None)


@pytest.mark.parametrize(
    "told",
    [
        "fatal: Could not establish a configuration source",
        "error: Unable to contact slurm controller (connect failure)",
    ],
)
def test_a_slurm_that_is_not_there_is_told_as_that(command, tmp_path, told):
    command("sbatch", f'echo "sbatch: {told}" >&2; exit 1')
    with pytest.raises(
        ResourceFailure, match=r"^sbatch finds no Slurm \(sbatch: .*\): run this where jobs are submitted"
    ):
        job_queue.submit(tmp_path / "a.sh", "log", [], None)


@pytest.mark.parametrize("line", ["echo bad partition. >&2; exit 1", "echo what; echo bad partition.", "exit 3"])
def test_a_job_that_is_refused_is_one_line(command, tmp_path, line):
    command("sbatch", line)
    with pytest.raises(
        UsageFailure, match=r"^sbatch refused .*a\.sh: (bad partition|without a word): change \[slurm\]$"
    ):
        job_queue.submit(tmp_path / "a.sh", "log", [], None)


@pytest.mark.parametrize(
    ("line", "limits"),
    [
        ("echo 'MaxArraySize            = 1001'", (1001, 1001)),
        ("printf 'Configuration data\\nMaxArraySize = 5\\nMaxDBDMsgs = 20\\n'", (5, 5)),
        ("printf 'MaxArraySize = 100001\\nSchedulerParameters = a=1,max_array_tasks=1000,b\\n'", (100001, 1000)),
        ("printf 'MaxArraySize = 9\\nSchedulerParameters     = (null)\\n'", (9, 9)),
        ("echo 'NotMaxArraySize = 7'", None),
        ("echo 'MaxArraySize = many'", None),
        ("echo 'MaxArraySize = 9'; exit 1", None),
        ("exec sleep 20", None),
    ],
)
def test_the_limits_of_arrays_are_what_scontrol_says(command, monkeypatch, line, limits):
    command("scontrol", line)
    monkeypatch.setattr(job_queue, "PATIENCE", 0.3 if "sleep" in line else 30)
    assert job_queue.array_limits() == limits


def test_without_scontrol_no_limit_is_known(command):
    assert job_queue.array_limits() is None


@pytest.mark.parametrize(
    ("line", "account", "limit"),
    [
        ("echo 'lab|500'", None, 500),
        ("printf 'other|20\\nlab|500\\nthird|30\\n'", None, 500),
        ("printf 'lab|500\\nother|20\\n'", "lab", 500),
        ("printf 'lab|500\\nother|20\\n'", "other", 20),
        ("printf 'lab|500\\nlab|20\\n'", "lab", 500),  # of two partitions
        ("printf 'lab|\\nother|20\\n'", "lab", None),
        ("printf 'lab|\\nother|20\\n'", None, None),  # no limit is the largest
        ("echo 'lab|500'", "unknown", None),
        ("echo 'lab|500'; exit 1", None, None),
        ("echo 'You are not running a supported accounting_storage plugin'", None, None),
        ("exec sleep 20", None, None),
    ],
)
def test_how_many_jobs_one_may_have_is_what_the_accounts_say(command, monkeypatch, line, account, limit):
    command("sacctmgr", line)
    monkeypatch.setattr(job_queue, "PATIENCE", 0.3 if "sleep" in line else 30)
    assert job_queue.submit_limit(account) == limit


def test_without_accounts_nothing_says_how_many_jobs_one_may_have(command):
    assert job_queue.submit_limit(None) is None


@pytest.mark.parametrize("error", [KeyError, OSError])
def test_of_a_user_without_a_name_no_limit_is_known(command, monkeypatch, error):
    def nobody(uid):
        raise error(f"getpwuid(): uid not found: {uid}")

    command("sacctmgr", "echo 'lab|500'")
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    assert job_queue.submit_limit(None) is None


def test_tasks_in_the_queue_are_counted(command, tmp_path):
    command("squeue", f"printf '%s\\n' \"$@\" > {tmp_path}/words; printf '5\\n6_0\\n6_1\\n'")
    assert job_queue.in_queue(None) == 3
    assert "--account" not in (tmp_path / "words").read_text()
    assert job_queue.in_queue("lab") == 3
    assert "--account=lab" in (tmp_path / "words").read_text().splitlines()
    command("squeue", "echo no controller >&2; exit 1")
    with pytest.raises(ResourceFailure, match="cannot ask Slurm for its queue: no controller: try again later"):
        job_queue.in_queue(None)


def test_of_several_accounts_the_least_room_counts(command):
    command("sacctmgr", "printf 'lab|9\\nother|4\\nfree|\\n'")
    command("squeue", "if [[ $* == *--account=lab* ]]; then printf '1\\n2\\n3\\n4\\n5\\n6\\n'; else echo 7; fi")
    assert job_queue.room(["lab"]) == (9, 6, "lab") and job_queue.room(["other"]) == (4, 1, "other")
    assert job_queue.room(["other", "lab", "free"]) == (4, 1, "other")  # as much as of the other: the first
    assert job_queue.room(["free"]) is None and job_queue.room([]) is None
    assert job_queue.Room(3, 5, None).left == 0


def test_a_part_of_an_array_is_found_by_the_numbers_that_slurm_gave_it(command):
    command("squeue", "echo '6_0|RUNNING|n'; echo '6_4|PENDING|n'")
    assert record(6, 1001, 1005, begin=1001).listed_as() == ("6_0", "6_4")
    assert job_queue.states([record(6, 1001, 1005, begin=1001)]) == {"6_0": "RUNNING", "6_4": "PENDING"}


def test_accounts_are_asked_for_whole_arrays(command, tmp_path):
    command("squeue", "exit 0")
    command("sacct", f"printf '%s\\n' \"$@\" > {tmp_path}/words; printf '6_0|COMPLETED|n\\n6_40000|FAILED|n\\n'")
    found = job_queue.states([record(5), record(6, *range(40001))])
    assert found == {"6_0": "COMPLETED", "6_40000": "FAILED"}
    assert "--jobs=5,6" in (tmp_path / "words").read_text().splitlines()


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
