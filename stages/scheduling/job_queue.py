"""Slurm's own commands: sbatch, squeue, sacct, scancel, scontrol.

- called with lists of arguments, never through a shell, and with a time limit: a controller may be down
- inside a job, Slurm's variables say what that job was given: they are kept from the jobs submitted there
- many sites keep no accounts, so sacct is asked only for what squeue has forgotten, and may fail
"""

import getpass
import os
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from schemas.failures import ResourceFailure, UsageFailure
from schemas.submit_jobs import JobRecord

PATIENCE = 30.0  # seconds
OVER = {
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "BOOT_FAIL", "DEADLINE",
    "REVOKED",
}  # fmt: skip
UNREACHABLE = ("configuration source", "Unable to contact", "Connection refused")  # as sbatch says it
TOO_MANY = ("submit limit", "MaxSubmit", "SubmitJobs", "temporarily unable to accept")
LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def submit(
    script: Path,
    log: str,
    waits_for: Sequence[str],
    array: str | None,
    *,
    begin: int = 0,
    follows: int | None = None,
) -> int:
    """Submit `script`; its log goes to `log`, a pattern of Slurm's. Returns its number.

    begin: the task of the array whose number in Slurm is 0
    follows: the job that must be over, however it ended

    Raises UsageFailure when sbatch refuses it; ResourceFailure when Slurm is not there or has too many jobs already.
    """
    words = ["sbatch", "--parsable", f"--output={log}"]
    after = [f"afterok:{':'.join(waits_for)}"] if waits_for else []
    after += [f"afterany:{follows}"] if follows else []
    if after:
        words.append(f"--dependency={','.join(after)}")
    if array:
        words.append(f"--array={array}")
    done = _call([*words, str(script), *([str(begin)] if begin else [])])
    number = done.stdout.strip().split(";")[0]  # the name of the cluster may follow
    if done.returncode or not number.isdecimal():
        why = _last_line(done.stderr or done.stdout)
        if any(word in why for word in UNREACHABLE):
            raise ResourceFailure(
                f"sbatch finds no Slurm ({why}): run this where jobs are submitted, or try again later"
            )
        if any(word in why for word in TOO_MANY):
            raise ResourceFailure(f"sbatch refused {script}: {why}: when jobs have ended, give the same command again")
        raise UsageFailure(f"sbatch refused {script}: {why}: change [slurm]")
    return int(number)


def array_limits() -> tuple[int, int] | None:
    """Slurm's MaxArraySize, below which numbers of tasks lie, and how many tasks an array may have.

    None where Slurm cannot be asked.
    """
    try:
        done = _call(["scontrol", "show", "config"])
    except (UsageFailure, ResourceFailure):
        return None
    size = re.search(r"^\s*MaxArraySize\s*=\s*(\d{1,9})\s*$", done.stdout, re.MULTILINE)
    if not size or done.returncode:
        return None
    tasks = re.search(r"^\s*SchedulerParameters\s*=.*\bmax_array_tasks=(\d{1,9})\b", done.stdout, re.MULTILINE)
    return int(size[1]), int((tasks or size)[1])


class Room(NamedTuple):
    """How many jobs and tasks one user may have in the queue at a time, and how many are there."""

    limit: int
    queued: int
    account: str | None  # that pays; None: all of the user's

    @property
    def left(self) -> int:
        """How many more may be submitted."""
        return max(0, self.limit - self.queued)


def room(accounts: Iterable[str | None]) -> Room | None:
    """The least room that these accounts leave (None: none is named); None where nothing limits them.

    Raises ResourceFailure when the queue cannot be asked.
    """
    limits = {account: submit_limit(account) for account in accounts}
    found = [Room(limit, in_queue(account), account) for account, limit in limits.items() if limit is not None]
    return min(found, key=lambda one: one.left, default=None)


def submit_limit(account: str | None) -> int | None:
    """How many jobs and tasks one user may have in the queue at a time (MaxSubmitJobs); None where nothing says.

    account: that pays; None: which of the user's it is only sbatch knows, so it is the largest limit of any
    """
    try:
        words = ["sacctmgr", "--noheader", "--parsable2", "show", "associations", f"user={getpass.getuser()}"]
        done = _call([*words, "format=Account,MaxSubmit"])
    except (KeyError, OSError, UsageFailure, ResourceFailure):  # a user without a name: OSError from Python 3.13 on
        return None
    found = [line.split("|") for line in done.stdout.splitlines() if line.count("|") == 1]
    limits = [limit for name, limit in found if account in (None, name)]
    if done.returncode or not limits or not all(limit.isdecimal() for limit in limits):
        return None
    return max(map(int, limits))


def in_queue(account: str | None) -> int:
    """How many jobs and tasks this user has in the queue, of whatever run. Raises ResourceFailure.

    account: count only those that it pays for; None: all
    """
    paid = [f"--account={account}"] if account else []
    done = _call(["squeue", "--noheader", "--array", f"--user={os.getuid()}", *paid, "--format=%i"])
    if done.returncode:
        raise ResourceFailure(f"cannot ask Slurm for its queue: {_last_line(done.stderr)}: try again later")
    return sum(bool(line.strip()) for line in done.stdout.splitlines())


def cancel(keys: Iterable[str]) -> None:
    """Take jobs out of the queue; those that are over are let be."""
    _call(["scancel", "--quiet", *keys])


def states(records: Sequence[JobRecord]) -> dict[str, str]:
    """Slurm's word for the state of each job or task that it still knows of, by the keys of the records.

    Raises ResourceFailure when the queue cannot be asked.
    """
    if not records:
        return {}
    words = ["squeue", "--noheader", "--array", "--states=all", f"--user={os.getuid()}", "--format=%i|%T|%j"]
    done = _call(words)
    if done.returncode:
        raise ResourceFailure(f"cannot ask Slurm for its queue: {_last_line(done.stderr)}: try again later")
    wanted = {key: record.name for record in records for key in record.listed_as()}
    found = _read(done.stdout, wanted)
    if missing := [key for key in wanted if key not in found]:
        found |= _accounted(missing, wanted)
    return found


def _accounted(keys: Sequence[str], wanted: Mapping[str, str]) -> dict[str, str]:
    words = ["sacct", "--noheader", "--allocations", "--parsable2", "--format=JobID,State,JobName%130"]
    try:
        # By their arrays: a name for each task of many would be more than a command line holds.
        done = _call([*words, f"--jobs={','.join(dict.fromkeys(key.split('_')[0] for key in keys))}"])
    except (UsageFailure, ResourceFailure):
        return {}
    return {} if done.returncode else _read(done.stdout, wanted)


def _read(lines: str, wanted: Mapping[str, str]) -> dict[str, str]:
    """States by key, of the jobs that have the name expected: numbers are used again."""
    found = {}
    for line in lines.splitlines():
        key, _, rest = line.partition("|")
        state, _, name = rest.partition("|")
        if wanted.get(key) == name:
            found[key] = state.split()[0] if state.split() else "UNKNOWN"  # sacct says who cancelled
    return found


def _call(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if name == "SLURM_CONF" or not (name.startswith("SLURM_") or name in LAUNCHERS)
    }
    try:
        return subprocess.run(words, env=kept, capture_output=True, text=True, errors="replace", timeout=PATIENCE)
    except FileNotFoundError as error:
        raise UsageFailure(f"there is no `{words[0]}` here: run this where jobs are submitted") from error
    except subprocess.TimeoutExpired as error:
        raise ResourceFailure(f"{words[0]} did not answer within {PATIENCE:.0f} s: try again later") from error


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].rstrip(".") if lines else "without a word"
