import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from schemas.failures import InputFailure, ResourceFailure
from stages.data.workers import cores, run_jobs


def square(number: int) -> int:
    return number * number


def refuse(number: int) -> int:
    if number == 3:
        raise InputFailure("three is refused")
    return number


def die(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


def where(number: int) -> tuple[int, str | None]:
    return os.getpid(), os.environ.get("RAYON_NUM_THREADS")


@pytest.mark.parametrize("workers", [1, 3])
def test_every_job_is_done_once(workers: int) -> None:
    assert sorted(run_jobs(square, range(8), workers)) == [number * number for number in range(8)]


def test_one_worker_is_this_process() -> None:
    assert {pid for pid, _ in run_jobs(where, range(4), 1)} == {os.getpid()}


def test_several_workers_share_the_cores() -> None:
    found = list(run_jobs(where, range(8), 2))
    assert os.getpid() not in {pid for pid, _ in found}
    assert {threads for _, threads in found} == {str(max(1, cores() // 2))}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failure_of_a_job_comes_through(workers: int) -> None:
    with pytest.raises(InputFailure, match="three is refused"):
        list(run_jobs(refuse, range(6), workers))


def test_a_worker_that_is_killed_is_a_failure_and_not_a_hang() -> None:
    with pytest.raises(ResourceFailure, match="a worker process was killed"):
        list(run_jobs(die, range(4), 2))


def test_workers_do_not_outlive_a_parent_that_is_killed(tmp_path: Path) -> None:
    jobs = tmp_path / "jobs.py"
    jobs.write_text(
        "import os, sys, time\n"
        "from stages.data.workers import run_jobs\n"
        "def work(path):\n"
        "    open(path, 'w').write(str(os.getpid()))\n"
        "    time.sleep(60)\n"
        "if __name__ == '__main__':\n"
        f"    list(run_jobs(work, [{str(tmp_path / 'a')!r}, {str(tmp_path / 'b')!r}], 2))\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])}
    parent = subprocess.Popen([sys.executable, str(jobs)], env=environment)
    pids = [int(wait_for(tmp_path / name)) for name in "ab"]
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "a worker is still there"
        time.sleep(0.05)


def wait_for(path: Path) -> str:
    deadline = time.monotonic() + 30
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return path.read_text()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False
