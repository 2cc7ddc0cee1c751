"""Stages that meet a fault, by the command line: what is told, what is left, and what the same command makes later."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def content(run_dir, folder):
    """What a stage made, but for where and when."""
    manifest = json.loads((run_dir / folder / "manifest.json").read_bytes())
    return {name: value for name, value in manifest.items() if name not in ("environment", "digest")}


@pytest.fixture
def unclustered(piped_run, copied_run):
    """A run whose clusters are to be made."""
    run_dir = copied_run(piped_run)
    shutil.rmtree(run_dir / "clusters")
    return run_dir


def failing(monkeypatch, name, number, code):
    """The call of this number of a function of `os` fails; returns how many there were."""
    call, count = getattr(os, name), [0]

    def counted(*arguments, **named):
        count[0] += 1
        if count[0] == number:
            raise OSError(code, os.strerror(code), str(arguments[0]))
        return call(*arguments, **named)

    monkeypatch.setattr(os, name, counted)
    return count


@pytest.mark.parametrize(
    ("name", "code"),
    [("fsync", errno.ENOSPC), ("replace", errno.ENOSPC), ("replace", errno.EROFS)],
)
def test_a_disk_that_is_full_at_any_call_is_one_line_and_later_the_bytes_are_the_same(
    cpipe, line, piped_run, unclustered, name, code
):
    number, calls = 1, 0
    while True:
        with pytest.MonkeyPatch.context() as patch:
            count = failing(patch, name, number, code)
            result = cpipe("cluster", unclustered)
        if count[0] < number:
            break
        assert result.exit_code == 6, result.output
        assert ("free some space" if code != errno.EROFS else "cannot write") in line(result)
        assert not (unclustered / "clusters/manifest.json").exists() or name == "fsync"  # its folder was synced last
        calls, number = count[0], number + 1
    assert result.exit_code == 0 and calls > 2
    assert content(unclustered, "clusters") == content(piped_run, "clusters")
    assert cpipe("verify", unclustered).exit_code == 0
    assert not list(unclustered.rglob("*.tmp"))


def test_a_clock_that_runs_backwards_changes_nothing(cpipe, piped_run, unclustered, monkeypatch):
    start, now = time.time(), time.time
    monkeypatch.setattr(time, "time", lambda: start - 3600 * (now() - start))
    assert cpipe("cluster", unclustered).exit_code == 0
    assert content(unclustered, "clusters") == content(piped_run, "clusters")


def test_a_key_that_was_changed_is_told_as_that(cpipe, line, piped_run, copied_run):
    run_dir = copied_run(piped_run)
    path = run_dir / "reports/manifest.json"
    manifest = json.loads(path.read_bytes())
    path.write_text(json.dumps({**manifest, "key": "sha256:" + "0" * 64}))
    result = cpipe("evaluate", run_dir)
    assert result.exit_code == 2
    assert "its key is not that of its settings and inputs: give --force" in line(result)


@pytest.mark.slow
def test_no_fault_in_any_stage_loses_a_byte():
    """A try of each, by the benchmark; it says which lost."""
    words = [
        sys.executable,
        "benchmarks/bench_faults.py",
        "--tries",
        "1",
        "--only",
        "kill,manifest,size,two,clock,diverge",
    ]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "LOST" not in done.stdout and "\n0 of " in done.stdout, done.stdout
