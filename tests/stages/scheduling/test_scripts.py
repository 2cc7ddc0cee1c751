import subprocess

import pytest

from schemas.submit_jobs import JobResources
from stages.scheduling.scripts import TASK, Job, Part, job_name, ranges, render


def script(tmp_path, *, warn_seconds=60, requeues=3, words=("train-seed", "runs/a"), **changes):
    resources = JobResources(**changes.pop("resources", {}))
    parts = changes.pop("parts", None)
    job = Job("train-seed", words, resources, **{"trains": True, **changes})
    parts = parts or ([Part(0, job.tasks)] if job.tasks else [])
    return render(job, "name", ("cpipe",), tmp_path, parts, warn_seconds=warn_seconds, requeues=requeues)


def options(text):
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]


def command(text):
    (line,) = [line for line in text.splitlines() if line.startswith("srun ")]
    return line


def test_every_resource_is_an_option(tmp_path):
    resources = {
        "partition": "gpu,long", "account": "me", "qos": "high", "time": "2-00", "gpus": 4, "cpus": 8, "memory": "64G",
        "nodes": 2, "header": ("--mail-type=END", '--constraint="a|b"'), "setup": ("module load x", "ulimit -n 9"),
    }  # fmt: skip
    text = script(tmp_path, resources=resources)
    assert options(text) == [
        "--job-name=name", "--partition=gpu,long", "--account=me", "--qos=high", "--time=2-00", "--nodes=2",
        "--ntasks-per-node=4", "--gpus-per-node=4", "--cpus-per-task=8", "--mem=64G", "--open-mode=append",
        "--kill-on-invalid-dep=yes", "--requeue", "--signal=USR1@60", "--mail-type=END", '--constraint="a|b"',
    ]  # fmt: skip
    assert command(text) == "srun --cpus-per-task=8 --kill-on-bad-exit=0 cpipe train-seed runs/a"
    lines = text.splitlines()
    assert lines.index("module load x") < lines.index("ulimit -n 9") < lines.index(command(text))


def test_what_does_not_train_is_one_process_on_one_node(tmp_path):
    text = script(tmp_path, resources={"nodes": 2, "gpus": 4}, trains=False)
    assert "--nodes=1" in options(text) and "--ntasks-per-node=1" in options(text)
    assert command(text) == "srun cpipe train-seed runs/a"


def test_nothing_asked_for_is_one_process(tmp_path):
    text = script(tmp_path)
    assert "--nodes=1" in options(text) and "--ntasks-per-node=1" in options(text)
    assert not any(option.split("=")[0] in ("--mem", "--time", "--gpus-per-node") for option in options(text))
    assert command(text) == "srun cpipe train-seed runs/a"


@pytest.mark.parametrize(
    ("resources", "trains", "expected"),
    [
        ({"gpus": 4}, True, 4),
        ({"gpus": 4}, False, 1),
        ({"gpus": 4, "processes": 2}, True, 2),
        ({"processes": 3}, True, 3),
        ({"gpus": 0}, True, 1),
    ],
)
def test_a_process_per_gpu_where_processes_train_together(tmp_path, resources, trains, expected):
    text = script(tmp_path, resources=resources, trains=trains)
    assert f"--ntasks-per-node={expected}" in options(text)
    assert ("--kill-on-bad-exit=0" in text) == (expected > 1)


def test_what_does_not_train_gets_no_signal_and_ends_with_its_command(tmp_path):
    text = script(tmp_path, trains=False)
    assert "--signal" not in text and "scontrol" not in text
    assert text.splitlines()[-1] == command(text)


def test_an_array_has_its_tasks_and_hands_on_its_number(tmp_path):
    text = script(
        tmp_path, words=("x", "--expert", TASK), tasks=(0, 1, 2, 5), resources={"at_once": 2}, force=True
    )  # fmt: skip
    assert "--array=0-2,5%2" in options(text)
    assert command(text) == 'srun cpipe x --expert "$task" --force'
    assert 'scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"' in text


def test_an_array_in_parts_says_how_it_is_submitted_and_each_part_where_it_begins(tmp_path):
    (tmp_path / "srun").write_text('#!/bin/bash\necho "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    parts = [Part(0, (0, 1, 2)), Part(3, (3, 4, 6))]
    text = script(tmp_path, words=("x", "--expert", TASK), tasks=(0, 1, 2, 3, 4, 6), parts=parts, requeues=0)
    assert "--array=0-2" in options(text)
    by_hand = [line.removeprefix("#   sbatch ") for line in text.splitlines() if line.startswith("#   sbatch ")]
    assert by_hand == ["--array=0-2 train-seed.sh 0", "--array=0-1,3 train-seed.sh 3"]
    (tmp_path / "job.sh").write_text(text)
    for begins, number, task in (((), 2, 2), (("0",), 1, 1), (("3",), 3, 6)):
        variables = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_ARRAY_TASK_ID": str(number)}
        words = ["bash", str(tmp_path / "job.sh"), *begins]
        done = subprocess.run(words, env=variables, capture_output=True, text=True, timeout=30, check=True)
        assert done.stdout == f"cpipe x --expert {task}\n"


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [(0, 0, False), (75, None, True), (75, 2, True), (75, 3, False), (138, 0, True), (1, 0, False), (7, 0, False)],
)
@pytest.mark.parametrize("tasks", [(), (0, 1)])
def test_told_to_stop_it_goes_back_into_the_queue_so_many_times(tmp_path, code, restarts, requeued, tasks):
    for name, text in (("srun", f"exit {code}"), ("scontrol", f'echo "$*" > {tmp_path}/requeued')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    variables = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "17"}
    variables |= {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "1"} if tasks else {}
    variables |= {} if restarts is None else {"SLURM_RESTART_COUNT": str(restarts)}
    (tmp_path / "job.sh").write_text(script(tmp_path, tasks=tasks))
    done = subprocess.run(["bash", tmp_path / "job.sh"], env=variables, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (code, "")
    found = (tmp_path / "requeued").read_text() if (tmp_path / "requeued").exists() else ""
    assert found == (f"requeue {'12_1' if tasks else '17'}\n" if requeued else "")


def test_a_folder_that_is_gone_ends_the_job(tmp_path):
    (tmp_path / "job.sh").write_text(script(tmp_path / "gone"))
    done = subprocess.run(["bash", tmp_path / "job.sh"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 1 and "gone" in done.stderr and "srun" not in done.stderr


def test_no_requeue_where_none_is_wanted(tmp_path):
    assert "scontrol" not in script(tmp_path, requeues=0)


@pytest.mark.parametrize(
    ("numbers", "text"), [([], ""), ([3], "3"), ([0, 1, 2], "0-2"), ([5, 1, 2, 7, 8], "1-2,5,7-8"), ([1, 3], "1,3")]
)
def test_numbers_in_short(numbers, text):
    assert ranges(numbers) == text
    assert Part(0, tuple(numbers)).array(4) == f"{text}%4"
    assert Part(0, tuple(numbers)).array(None) == text


@pytest.mark.parametrize(
    ("run", "name"), [("a", "cpipe-x-a"), ("a b$(c)", "cpipe-x-a_b__c_"), ("ü\n#", "cpipe-x-___"), ("a" * 300, 120)]
)
def test_names_in_slurm_are_plain(tmp_path, run, name):
    made = job_name("x", tmp_path / run)
    assert made == name or len(made) == name
