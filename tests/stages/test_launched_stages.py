"""Stages under a launcher: two processes of one command, which train together and write once."""

import os
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tiny_settings import SETTINGS

from cpipe.pipeline import BY_COMMAND
from cpipe.settings import resolve
from schemas.train_gates import GatesManifest
from schemas.verify_run import VerifyConfig
from stages import verify_run

ROOT = Path(__file__).parents[2]
ALONE = SETTINGS.replace('engine = "torch"', 'engine = "torch"\noptimizer = "adamw"\nprecision = "fp32"')
TOGETHER = SETTINGS.replace('engine = "torch"', 'zero_stage = 3\nprecision = "fp32"')  # which leaves no Muon

Copied = Callable[[Path], Path]


def alone(command: str, run_dir: Path, **flags: Any) -> None:
    """The stage in this process, with plain torch."""
    stage = BY_COMMAND[command]
    stage.run(resolve(stage.config, tomllib.loads(ALONE)[command], flags, command), run_dir, force=False)


def in_two(command: str, run_dir: Path, *flags: str, late: float = 0.0) -> None:
    """The command as a launcher starts it, under ZeRO 3; the second process comes `late` seconds after the first."""
    (run_dir / "cpipe.toml").write_text(TOGETHER)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "cpipe", command, str(run_dir), *flags]
    processes = []
    try:
        for rank in "01":
            own = {**shared, "RANK": rank, "LOCAL_RANK": rank}
            processes.append(subprocess.Popen(words, env=own, cwd=ROOT, stderr=subprocess.PIPE, text=True))
            time.sleep(late)
        for process in processes:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()


def assert_same(found: Path, expected: Path, weights: str) -> None:
    """The same files and tensors, and as many lines of metrics."""
    assert {path.name for path in found.iterdir()} == {path.name for path in expected.iterdir()}
    tensors = safetensors.torch.load_file(expected / weights)
    for name, tensor in safetensors.torch.load_file(found / weights).items():
        torch.testing.assert_close(tensor, tensors.pop(name), atol=2e-5, rtol=0)
    assert not tensors
    lines = [(folder / "metrics.jsonl").read_text().count("\n") for folder in (found, expected)]
    assert lines[0] == lines[1]


@pytest.mark.slow
def test_two_processes_train_gates_and_compose_as_one_does(
    expert_run: Path, copied_run: Copied, tmp_path: Path
) -> None:
    run_dir = copied_run(expert_run)
    expected = shutil.copytree(run_dir, tmp_path / "alone")
    alone("train-gates", expected, modes=["joint"])
    in_two("train-gates", run_dir, "--modes", "joint")
    assert_same(run_dir / "gates/joint", expected / "gates/joint", "gates.safetensors")
    alone("compose", expected, gates="joint", bridge="calm")
    in_two("compose", run_dir, "--gates", "joint", "--bridge", "calm")  # the central model alone first
    for folder in ("central-alone", "central"):
        assert_same(run_dir / folder, expected / folder, "model.safetensors")
    assert not [problem for folder in verify_run.stream(VerifyConfig(), run_dir) for problem in folder.problems]


@pytest.mark.slow
def test_two_processes_train_an_adapter_as_one_does(seeded_run: Path, copied_run: Copied, tmp_path: Path) -> None:
    run_dir = copied_run(seeded_run)
    expected = shutil.copytree(run_dir, tmp_path / "alone")
    alone("train-experts", expected, kind="lora", rank=2, expert="1")
    in_two("train-experts", run_dir, "--kind", "lora", "--rank", "2", "--expert", "1")
    assert_same(run_dir / "experts/001", expected / "experts/001", "adapter_model.safetensors")


@pytest.mark.slow
def test_a_process_that_comes_late_trains_the_same_gates_again(expert_run: Path, copied_run: Copied) -> None:
    run_dir = copied_run(expert_run)
    in_two("train-gates", run_dir)
    before = GatesManifest.read(run_dir)
    in_two("train-gates", run_dir, "--force", late=10.0)
    again = GatesManifest.read(run_dir)
    assert again.outputs == before.outputs
    assert again.environment.started > before.environment.started
