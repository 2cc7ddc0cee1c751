import pytest

from schemas.launch import Rank, launched_as

TORCH = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}
SLURM = {"SLURM_PROCID": "5", "SLURM_LOCALID": "2", "SLURM_STEP_NUM_TASKS": "8"}
SLURM_SCRIPT = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "77"}  # a batch script, not one of its steps


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({}, Rank(0, 0, 1)),
        (TORCH, Rank(3, 1, 4)),
        (SLURM, Rank(5, 2, 8)),
        ({**SLURM, **TORCH}, Rank(3, 1, 4)),
        (SLURM_SCRIPT, Rank(0, 0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, Rank(1, 0, 2)),
    ],
    ids=["alone", "torchrun", "srun", "torchrun in srun", "sbatch script", "no local rank"],
)
def test_the_place_is_what_the_launcher_says(variables, expected, monkeypatch):
    for name in {**TORCH, **SLURM}:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launched_as() == expected
