"""The variables with which launchers tell a process its place among those that work together."""

import os
import time
from typing import NamedTuple

STARTED = time.monotonic()  # when the command did, but for the import of Python itself


class Rank(NamedTuple):
    """Number of this process of `world`, from 0, and its number on its own machine."""

    rank: int
    local: int
    world: int


def launched_as() -> Rank:
    """Read torch's variables (`torchrun`, `deepspeed`), else Slurm's (`srun`), else this process is alone."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    if "RANK" not in os.environ and "SLURM_STEP_NUM_TASKS" in os.environ:
        names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")
    rank, local, world = (int(os.environ.get(name, default)) for name, default in zip(names, "001", strict=True))
    return Rank(rank, local, world)
