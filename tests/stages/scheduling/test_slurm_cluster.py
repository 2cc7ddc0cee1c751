"""The pipeline on a real Slurm: controller, two nodes, munge, started for these tests and stopped after them.

Skipped where it cannot start, unless CPIPE_REQUIRE_SLURM is set.
"""

import json
import os
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny_settings
from local_slurm import LocalSlurm, NoSlurmError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
SETTINGS = tiny_settings.SETTINGS.replace(
    'steps = 3\nbatch_size = 6\nsequence_length = 32\nengine = "torch"',
    'steps = 12\nbatch_size = 6\nsequence_length = 32\nengine = "deepspeed"\nprecision = "fp32"',
    1,  # of the seed
)
SETTINGS += """
[slurm]
shards = 2
cpus = 1
time = "20"
[slurm.train-seed]
nodes = 2
[slurm.train-experts]
at_once = 2
"""
LONG = SETTINGS.replace("[train-experts]\nsteps = 3", "[train-experts]\ncheckpoint_every = 50\nsteps = 3000")


@contextmanager
def started(settings=""):
    one = LocalSlurm(settings)
    try:
        one.start()
    except NoSlurmError as error:
        if os.environ.get("CPIPE_REQUIRE_SLURM"):
            raise
        pytest.skip(f"no Slurm here: {error}")
    one.environment |= {"PYTHONPATH": str(ROOT), "MKL_NUM_THREADS": "1"}
    try:
        yield one
    finally:
        one.stop()


@pytest.fixture(scope="module")
def slurm():
    with started() as one:
        yield one


def commands(slurm):
    """Calls a command in a process of its own, from the folder of its run; what it prints as JSON."""

    def call(run_dir, command, *words):
        line = [sys.executable, "-m", "cpipe", command, run_dir.name, *words, "--json"]
        done = slurm.run(*line, cwd=run_dir.parent)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout)

    return call


@pytest.fixture(scope="module")
def cpipe(slurm):
    return commands(slurm)


@pytest.fixture(scope="module")
def finished(slurm, cpipe, tiny_corpus, tmp_path_factory):
    """A whole run made by jobs, whose name no shell and no pattern of Slurm's should see. Read-only."""
    run_dir = tmp_path_factory.mktemp("runs") / "a %j $(touch owned) it's"
    run_dir.mkdir()
    (run_dir / "cpipe.toml").write_text(SETTINGS)
    cpipe(run_dir, "slurm", str(tiny_corpus), "--submit")
    slurm.wait()
    return run_dir


def logs(run_dir):
    return "".join(f"{path.name}\n{path.read_text()}\n" for path in sorted((run_dir / "slurm/logs").iterdir()))


def digests(run_dir, folder):
    return [ref["digest"] for ref in json.loads((run_dir / folder / "manifest.json").read_bytes())["outputs"]]


def curve(run_dir):
    return json.loads((run_dir / "seed/manifest.json").read_bytes())["metrics"]["training"]["curve"]


def wait_for(path, seconds=300):
    end = time.monotonic() + seconds
    while not list(path.parent.glob(path.name)):
        assert time.monotonic() < end, path
        time.sleep(0.05)


def kill(run_dir, *words):
    """SIGKILL to the Python processes of this run that were called with these words."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            called, folder = (process / "cmdline").read_text().split("\0")[:-1], (process / "cwd").readlink()
        except OSError:  # gone, or another's
            continue
        if folder == run_dir.parent and called[0] == sys.executable and called[-len(words) :] == list(words):
            found.append(int(process.name))
    assert found
    for process in found:
        os.kill(process, signal.SIGKILL)


def without(finished, place, settings, *folders):
    """A copy of the run that has not got as far."""
    run_dir = shutil.copytree(finished, place / "run")
    for folder in ("slurm", *folders):
        shutil.rmtree(run_dir / folder)
    (run_dir / "cpipe.toml").write_text(settings)
    return run_dir


def test_the_whole_pipeline_runs_as_jobs(finished, cpipe):
    folders = ("tokens", "clusters", "seed", "experts", "experts/002", "dense", "gates", "central", "reports")
    for folder in folders:
        assert (finished / folder / "manifest.json").is_file(), logs(finished)
    found = {job["job"]: job["state"] for job in cpipe(finished, "status")["jobs"]}
    assert len(found) == 11 and set(found.values()) == {"completed"}
    assert {row["state"] for row in cpipe(finished, "slurm", "--submit")} == {"finished"}
    assert not list(finished.parent.glob("owned*"))
    names = {path.name.split("-")[0] for path in (finished / "slurm/logs").iterdir()}
    assert names == {"tokenize", "cluster", "train", "experts", "dense", "gates", "compose", "evaluate"}


def test_jobs_write_the_bytes_that_one_process_writes(finished, cpipe, tmp_path):
    run_dir = without(finished, tmp_path, SETTINGS, "experts", "dense", "gates", "central", "central-alone", "reports")
    cpipe(run_dir, "run")
    for folder in ("experts/000", "experts/002", "dense", "gates", "central"):
        assert digests(run_dir, folder) == digests(finished, folder)


def test_two_nodes_train_as_one_process_that_accumulates(finished, cpipe, tmp_path):
    """To 1e-5 of a loss near 5.7: sums of floats are taken in another order."""
    run_dir = without(finished, tmp_path, SETTINGS, "seed")
    cpipe(run_dir, "train-seed", "--micro-batch-size", "3")
    manifest = json.loads((finished / "seed/manifest.json").read_bytes())
    assert manifest["environment"]["processes"] == 2
    alone, together = curve(run_dir), curve(finished)
    assert len(alone) == 12 and alone[-1] < alone[0]
    assert together == pytest.approx(alone, rel=1e-5)


def test_a_task_told_to_stop_comes_back_and_ends_with_the_same_bytes(slurm, cpipe, finished, tmp_path):
    run_dir = without(finished, tmp_path, LONG, "experts", "dense", "gates", "central", "reports")
    rows = cpipe(run_dir, "slurm", "--until", "train-experts", "--submit")
    (number,) = {row["number"] for row in rows if row["job"] == "experts"}
    wait_for(run_dir / "experts/001/checkpoints/*")
    slurm.run("scancel", "--signal=USR1", f"{number}_1")
    time.sleep(1)
    slurm.wait()
    assert "Restarts=1" in slurm.run("scontrol", "show", "job", f"{number}_1").stdout, logs(run_dir)
    assert "Restarts=0" in slurm.run("scontrol", "show", "job", f"{number}_0").stdout
    assert "resuming after step" in (run_dir / f"slurm/logs/experts-{number}_1.log").read_text()
    assert set(slurm.jobs().values()) == {"COMPLETED"}, logs(run_dir)
    other = shutil.copytree(run_dir, tmp_path / "other")
    shutil.rmtree(other / "experts")
    cpipe(other, "train-experts", "--expert", "1")
    assert digests(other, "experts/001") == digests(run_dir, "experts/001")


def test_what_was_killed_or_cancelled_is_submitted_again_and_nothing_else(slurm, cpipe, finished, tmp_path):
    run_dir = without(finished, tmp_path, LONG, "seed", "experts", "dense", "gates", "central", "reports")
    cpipe(run_dir, "slurm", "--until", "train-experts", "--submit")
    wait_for(run_dir / "experts/000/checkpoints/*")
    seed = digests(run_dir, "seed")
    kill(run_dir, "--expert", "0")
    wait_for(run_dir / "experts/001/manifest.json")
    slurm.run("scancel", f"--user={os.getuid()}")
    slurm.wait()
    assert not (run_dir / "experts/manifest.json").exists()
    done = {path.parent.name for path in run_dir.glob("experts/*/manifest.json")}
    rows = cpipe(run_dir, "slurm", "--until", "train-experts", "--submit")
    states = {(row["job"], row["tasks"]): row["state"] for row in rows}
    left = ",".join(str(expert) for expert in range(3) if f"{expert:03d}" not in done)
    assert states["train-seed", ""] == "finished"
    assert states["experts", {"0,1,2": "0-2", "0,2": "0,2"}.get(left, left)] == "submitted"
    slurm.wait()
    assert (run_dir / "experts/manifest.json").is_file(), logs(run_dir)
    assert digests(run_dir, "seed") == seed


def test_arrays_longer_than_this_slurm_takes_run_in_parts(tiny_corpus, tmp_path):
    """A Slurm of its own, whose arrays have two tasks: three shards and three experts are two arrays each."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "cpipe.toml").write_text(tiny_settings.SETTINGS + "[slurm]\nshards = 3\ncpus = 1\n")
    with started("MaxArraySize=2") as slurm:
        cpipe = commands(slurm)
        rows = cpipe(run_dir, "slurm", str(tiny_corpus), "--until", "train-experts", "--submit")
        parts = {job: [row["tasks"] for row in rows if row["job"] == job] for job in ("tokenize-shards", "experts")}
        assert parts == {"tokenize-shards": ["1", "2-3"], "experts": ["0-1", "2"]}
        slurm.wait()
        assert set(slurm.jobs().values()) == {"COMPLETED"}, logs(run_dir)
        found = [(row["job"], row["tasks"], row["state"]) for row in cpipe(run_dir, "status")["jobs"]]
        assert ("experts", "2", "completed") in found and ("tokenize-shards", "2-3", "completed") in found
        number = next(row["number"] for row in rows if row["tasks"] == "2")
        assert (run_dir / f"slurm/logs/experts-{number}_2+0.log").is_file()
    assert (run_dir / "experts/manifest.json").is_file()
    # Made by its own task, and not by the one that joins them.
    assert "experts/002" in (run_dir / f"slurm/logs/experts-{number}_2+0.log").read_text()
