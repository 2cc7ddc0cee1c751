import pytest

from schemas.failures import UsageFailure
from schemas.launch import FIRST_PORT, PORTS, Rank, first_of, launched_as, meeting_point

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
    only(variables, monkeypatch)
    assert launched_as() == expected


def only(variables, monkeypatch):
    """These variables of launchers, and no others."""
    for name in {**TORCH, **SLURM, **SLURM_STEP, "MASTER_ADDR": "", "MASTER_PORT": ""}:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


SLURM_STEP = {
    **SLURM, "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "2", "SLURM_STEP_NODELIST": "localhost,m[3-4]",
    "SLURM_JOB_NODELIST": "k[1-9]", "SLURM_STEP_NUM_NODES": "3",
}  # fmt: skip
NOWHERE = {"SLURM_STEP_NODELIST": "no-such-host.invalid"}


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({**TORCH, "MASTER_ADDR": "a", "MASTER_PORT": "5"}, ("a", 5)),
        ({**SLURM_STEP, "MASTER_ADDR": "a", "MASTER_PORT": "5"}, ("a", 5)),
        ({**SLURM_STEP, "MASTER_ADDR": "a"}, ("a", FIRST_PORT + 77 + 2 * 1009)),
        (SLURM_STEP, ("localhost", FIRST_PORT + 77 + 2 * 1009)),
        ({**SLURM_STEP, **NOWHERE, "SLURM_STEP_NUM_NODES": "1"}, ("127.0.0.1", 22095)),
        ({**SLURM_STEP, "SLURM_JOB_ID": str(10**9)}, ("localhost", FIRST_PORT + (10**9 + 2 * 1009) % PORTS)),
    ],
    ids=["torchrun", "said to srun", "half said", "srun", "srun on one node", "a large job number"],
)  # fmt: skip
def test_the_processes_meet_on_the_first_node(variables, expected, monkeypatch):
    only(variables, monkeypatch)
    assert meeting_point() == expected


@pytest.mark.parametrize(
    "variables, told",
    [
        (TORCH, "process 3 of 4 does not know where .*: start them with torchrun or srun, or set MASTER_ADDR"),
        ({**TORCH, "MASTER_ADDR": "a"}, "or set MASTER_PORT"),
        ({**SLURM_STEP, **NOWHERE}, r"on node no-such-host\.invalid, whose name has no address .*: set MASTER_ADDR"),
    ],
    ids=["nothing said", "no port", "a node without address"],
)  # fmt: skip
def test_without_a_place_to_meet_it_is_one_line(variables, told, monkeypatch):
    only(variables, monkeypatch)
    with pytest.raises(UsageFailure, match=told) as failed:
        meeting_point()
    assert "\n" not in str(failed.value)


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("n1", "n1"), ("n1,n2", "n1"), ("n[1-2]", "n1"), ("n[007,9-12],m1", "n007"), ("m1,n[1-2]", "m1"),
        ("rack[2-3]n[01-04]", "rack2n01"), ("a-b[3]-ib,c", "a-b3-ib"), ("gpu-a.site.org", "gpu-a.site.org"),
    ],
)  # fmt: skip
def test_the_first_of_a_list_of_nodes(nodes, first):
    assert first_of(nodes) == first
