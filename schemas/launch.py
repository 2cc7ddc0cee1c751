"""The variables with which launchers tell a process its place among those that work together, and where they meet.

- `srun` says where a process stands, but not where all of them meet: that is the first node of the step, at a port made
  of the job's number, so that jobs which share a node do not meet each other
"""

import os
import re
import socket
import time
from typing import NamedTuple

from schemas.failures import UsageFailure

FIRST_PORT, PORTS = 20_000, 12_000  # below those that Linux gives to outgoing connections, 32768 and up
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


def meeting_point() -> tuple[str, int]:
    """Host and port where the processes find each other: MASTER_ADDR and MASTER_PORT, else from Slurm's variables.

    Raises UsageFailure where neither says it, or where the name of Slurm's first node has no address.
    """
    host = os.environ.get("MASTER_ADDR") or _first_host()
    port = os.environ.get("MASTER_PORT")
    if port is None and "SLURM_JOB_ID" in os.environ:
        step = os.environ.get("SLURM_STEP_ID", "0")
        port = str(FIRST_PORT + (int(os.environ["SLURM_JOB_ID"]) + 1009 * int(step)) % PORTS)
    if host is None or port is None:
        rank, _, world = launched_as()
        missing = "MASTER_ADDR" if host is None else "MASTER_PORT"
        raise UsageFailure(
            f"process {rank} of {world} does not know where to meet the others: start them with torchrun or srun, "
            f"or set {missing}"
        )
    return host, int(port)


def _first_host() -> str | None:
    """Where rank 0 of an `srun` is."""
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        return None
    if os.environ.get("SLURM_STEP_NUM_NODES") == "1":
        return "127.0.0.1"
    host = first_of(nodes)
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        raise UsageFailure(
            f"the processes meet on node {host}, whose name has no address here ({error.strerror}): "
            "set MASTER_ADDR to one"
        ) from error
    return host


def first_of(nodes: str) -> str:
    """The first name of a list in Slurm's short form: `n01` of `n[01-03,7],m1`."""
    (first, *_) = re.split(r",(?![^\[]*\])", nodes)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first)
