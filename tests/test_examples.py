"""The examples, run as they stand."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from tiny_settings import SETTINGS

from schemas.strict import validated
from schemas.submit_jobs import SlurmConfig

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


@pytest.fixture
def shell(tmp_path):
    """Runs an example with `cpipe` on PATH."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/cpipe").write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m cpipe "$@"\n')
    (tmp_path / "bin/cpipe").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}/bin:/usr/bin:/bin", "JOBS": "2"}

    def run(*words):
        line = ["bash", *map(str, words)]
        return subprocess.run(line, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=1200)

    return run


@pytest.mark.slow
def test_the_pipeline_in_plain_shell_makes_everything_and_then_nothing(shell, tiny_corpus, tmp_path):
    run_dir = tmp_path / "a run"
    run_dir.mkdir()
    (run_dir / "cpipe.toml").write_text(SETTINGS)
    done = shell(EXAMPLES / "pipeline.sh", "a run", tiny_corpus)
    assert done.returncode == 0, done.stderr[-2000:]
    made = {path.parent.relative_to(run_dir).as_posix() for path in run_dir.rglob("manifest.json")}
    assert {"tokens", "clusters", "seed", "experts", "experts/002", "dense", "gates", "central", "reports"} <= made
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*.safetensors")}
    (run_dir / "experts/001/manifest.json").unlink()
    (run_dir / "experts/manifest.json").unlink()
    done = shell(EXAMPLES / "pipeline.sh", "a run", tiny_corpus)
    assert done.returncode == 0, done.stderr[-2000:]
    after = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*.safetensors")}
    assert {path for path in after if after[path] != before.get(path)} == {run_dir / "experts/001/model.safetensors"}
    assert json.loads((run_dir / "experts/manifest.json").read_bytes())["metrics"]["experts"] == 3


@pytest.mark.parametrize("words", [(), ("a",)])
def test_without_text_it_says_how_it_is_called(shell, words, tmp_path):
    done = shell(EXAMPLES / "pipeline.sh", *words)
    assert done.returncode == 2
    assert "examples/pipeline.sh RUN FILES…" in done.stderr and "JOBS=4" in done.stderr
    assert "#" not in done.stderr and not (tmp_path / "a").exists()


def test_a_command_that_fails_ends_it(shell, tmp_path):
    done = shell(EXAMPLES / "pipeline.sh", "run", "nothing-of-that-name.jsonl")
    assert done.returncode != 0
    assert "nothing-of-that-name.jsonl" in done.stderr and "tokens" not in {path.name for path in tmp_path.rglob("*")}


def test_the_settings_for_slurm_are_valid():
    content = tomllib.loads((EXAMPLES / "slurm.toml").read_text())
    assert list(content) == ["slurm"]
    slurm = validated(SlurmConfig, content["slurm"], "examples/slurm.toml")
    assert slurm.resolved(slurm.train_experts, slurm.train_dense).partition == "gpu"
