import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_members
from loguru import logger
from toy_members import STEPS, member

from schemas import launch
from schemas.failures import DivergedFailure, Failure, InterruptedFailure, ResourceFailure
from stages.engine import checkpoints
from stages.engine.members import Member, members_at_once, train_members


def told(folder: Path, *names: str, at_once: int = 2) -> list[dict[str, Any]]:
    train_members([member(folder, name) for name in names], at_once)
    return [json.loads((folder / f"{name}.json").read_text()) for name in names]


def test_each_has_a_process_and_a_group_of_its_own_and_no_more_run_than_may(tmp_path: Path) -> None:
    found = told(tmp_path, "a", "b", "c")
    assert len({one["pid"] for one in found} | {os.getpid()}) == 4
    assert all(one["group"] == one["pid"] for one in found)
    for moment in [one["begun"] for one in found]:
        assert sum(one["begun"] <= moment < one["ended"] for one in found) <= 2


@pytest.mark.slow
def test_threads_are_divided_by_how_many_may_run_whatever_is_left_to_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    (alone,) = told(tmp_path, "a", at_once=2)
    assert alone["threads"] == 3


@pytest.mark.parametrize("at_once", [1, 2])
def test_the_time_given_counts_from_the_start_of_the_command_in_every_process(
    at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = time.monotonic() - 3600
    monkeypatch.setattr(launch, "STARTED", began)
    (found,) = told(tmp_path, "a", at_once=at_once)
    assert found["counts_from"] == began
    assert found["begun"] - began < 3660  # the clock of a process is its parent's


def test_one_at_a_time_is_this_process_with_all_its_threads(tmp_path: Path) -> None:
    found = told(tmp_path, "a", "b", at_once=1)
    assert {one["pid"] for one in found} == {os.getpid()}
    assert members_at_once(None) == max(1, torch.cuda.device_count())
    assert members_at_once(3) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("visible", "expected"), [(None, {"0", "1"}), ("4,7,", {"4", "7"}), ("GPU-ab,GPU-cd", {"GPU-ab", "GPU-cd"})]
)
def test_members_at_work_have_different_devices(
    visible: str | None, expected: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert {one["device"] for one in told(tmp_path, "a", "b")} == expected


@pytest.mark.slow
def test_what_a_member_says_is_in_its_log_and_progress_reaches_the_parent(tmp_path: Path) -> None:
    records: list[Any] = []
    sink = logger.add(lambda message: records.append(message.record), level="DEBUG")
    try:
        train_members([member(tmp_path, name) for name in ("train-a", "tell", "crash")], 3)
    except Failure:
        pass
    finally:
        logger.remove(sink)
    progress = [record["extra"] for record in records if "task" in record["extra"]]
    assert [one["done"] for one in progress] == list(range(1, STEPS + 1))
    assert {(one["task"], one["total"]) for one in progress} == {("train-a", STEPS)}
    assert f"train-a {STEPS}/{STEPS} · loss" in (tmp_path / "train-a.log").read_text()
    assert (tmp_path / "tell.log").read_text() == "said to nobody\n"
    assert "Traceback" in (tmp_path / "crash.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "kind", "message"),
    [
        (("diverge", "a"), DivergedFailure, "diverge: the loss of step 3 is nan (logs: {0}/diverge.log)"),
        (("a", "crash"), Failure, "crash: ValueError: a bug (logs: {0}/crash.log)"),
        (("be-killed", "a"), ResourceFailure, "be-killed: killed by SIGKILL, perhaps for want of memory: run the"),
        (
            ("diverge-1", "a", "be-killed-1", "be-killed-2"),
            DivergedFailure,
            "diverge-1: the loss of step 3 is nan; be-killed-1, be-killed-2: killed by SIGKILL",
        ),
    ],
)
def test_one_that_fails_stops_no_other_and_all_are_named_in_one_line(
    names: tuple[str, ...], kind: type[Failure], message: str, tmp_path: Path
) -> None:
    with pytest.raises(Failure) as failed:
        train_members([member(tmp_path, name) for name in names], 2)
    assert type(failed.value) is kind
    assert str(failed.value).startswith(message.format(tmp_path))
    assert "\n" not in str(failed.value)
    assert (tmp_path / "a.json").exists()


def test_in_turn_one_that_fails_stops_no_other_either_and_a_bug_keeps_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(DivergedFailure, match=r"^diverge-1, diverge-2: the loss of step 3 is nan$"):
        train_members([member(tmp_path, name) for name in ("diverge-1", "a", "diverge-2")], 1)
    assert (tmp_path / "a.json").exists()
    with pytest.raises(ValueError, match="a bug"):
        train_members([member(tmp_path, "crash")], 1)


def test_in_turn_a_signal_stops_all(tmp_path: Path) -> None:
    def stop() -> None:
        raise InterruptedFailure("first stopped after step 2: run the same command to resume")

    with pytest.raises(InterruptedFailure, match="first: stopped after step 2"):
        train_members([Member("first", stop, tmp_path / "log"), member(tmp_path, "a")], 1)
    assert not (tmp_path / "a.json").exists()


def test_under_a_launcher_they_go_one_by_one_and_the_first_failure_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DivergedFailure):
        train_members([member(tmp_path, name) for name in ("a", "diverge", "b")], 2)
    assert json.loads((tmp_path / "a.json").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "b.json").exists()


# With a parent in a process of its own


@contextmanager
def parent_of(folder: Path, *names: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A parent that trains two at once, in a session of its own as in a terminal."""
    command = [sys.executable, toy_members.__file__, str(folder), "2", *names]
    variables = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "PAUSE": "0.05", **environment}
    process = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(condition: Any, seconds: float = 40) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.02)


def at_step(folder: Path, step: int, *names: str) -> bool:
    traces = [folder / name / "step" for name in names]
    return all(trace.is_file() and int(trace.read_text() or 0) >= step for trace in traces)


def pids(folder: Path, *names: str) -> list[int]:
    return [int((folder / name / "pid").read_text()) for name in names]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def resumed_equals_whole(folder: Path, *names: str) -> None:
    train_members([member(folder, name) for name in names], 2)
    train_members([member(folder, "train-whole")], 1)
    whole = (folder / "train-whole" / "weights.safetensors").read_bytes()
    assert all((folder / name / "weights.safetensors").read_bytes() == whole for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["term", "ctrl-c", "to-all"])
def test_a_signal_stops_all_with_a_checkpoint_and_they_resume_to_the_same_bytes(way: str, tmp_path: Path) -> None:
    names = ("train-a", "train-b", "train-c")
    with parent_of(tmp_path, *names) as parent:
        wait_for(lambda: at_step(tmp_path, 3, *names[:2]))
        if way == "term":
            parent.terminate()
        elif way == "ctrl-c":
            os.killpg(parent.pid, signal.SIGINT)
        else:  # as Slurm does
            for pid in (*pids(tmp_path, *names[:2]), parent.pid):
                os.kill(pid, signal.SIGTERM)
        said, _ = parent.communicate(timeout=40)
    assert parent.returncode == 75
    assert said.count("\n") == 1
    first, second = (checkpoints.newest(tmp_path / name / "checkpoints") for name in names[:2])
    assert first and second
    steps, resume = (first[1].step, second[1].step), "run the same command to resume"
    stopped = [f"{name}: stopped after step {step}: {resume}" for name, step in zip(names, steps, strict=False)]
    if len(set(steps)) == 1:  # what is the same is said once
        stopped = [f"train-a, train-b: stopped after step {steps[0]}: {resume}"]
    assert said.startswith("; ".join([*stopped, f"train-c: not begun: {resume}"]))
    assert not (tmp_path / "train-c").exists()
    resumed_equals_whole(tmp_path, *names)


@pytest.mark.slow
def test_a_signal_that_comes_before_a_training_listens_is_kept_for_it(tmp_path: Path) -> None:
    with parent_of(tmp_path, "train-a", "train-b", PAUSE_BEFORE="2") as parent:
        wait_for(lambda: (tmp_path / "train-a/pid").exists() and (tmp_path / "train-b/pid").exists())
        parent.terminate()
        said, _ = parent.communicate(timeout=40)
    assert parent.returncode == 75, said
    for name in ("train-a", "train-b"):
        found = checkpoints.newest(tmp_path / name / "checkpoints")
        assert found and found[1].step < 10


@pytest.mark.slow
def test_a_parent_that_is_killed_leaves_nobody_behind(tmp_path: Path) -> None:
    names = ("train-a", "train-b")
    with parent_of(tmp_path, *names) as parent:
        wait_for(lambda: at_step(tmp_path, 1, *names))
        found = pids(tmp_path, *names)
        assert all(map(is_running, found))
        parent.kill()
        wait_for(lambda: not any(map(is_running, found)), 5)
    resumed_equals_whole(tmp_path, *names)
