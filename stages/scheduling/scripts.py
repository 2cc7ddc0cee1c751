"""The job script of one `cpipe` command.

- every word that comes from a user is quoted, once, here; a setting in the head was checked by its schema
- a script is bash without cleverness: go to the folder, set up, `srun` one command that a person could type
- where Slurm writes the log and what a job waits for are not in the script: paths may hold characters that sbatch
  reads as patterns, and numbers of jobs are known on submission only
- the script of an array is told by its argument at which task a part of the array begins: `experts.sh 1001`
"""

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from schemas.submit_jobs import JobResources

STOPPED = 75  # exit code of a training that saved a checkpoint and stopped: EX_TEMPFAIL


class Shell(str):
    """A word that is shell already, and must not be quoted."""

    __slots__ = ()


TASK = Shell('"$task"')


class Part(NamedTuple):
    """Tasks of an array that Slurm takes as one array, in which their numbers begin anew."""

    begin: int  # the task whose number is 0
    tasks: tuple[int, ...]

    def array(self, at_once: int | None) -> str:
        """As Slurm numbers them: `0-2,5%4`, and how many may run at a time."""
        text = ranges([task - self.begin for task in self.tasks])
        return f"{text}%{at_once}" if at_once else text


@dataclass(frozen=True)
class Job:
    """One command of the pipeline as a job, or as an array of jobs that differ in a number."""

    name: str
    words: tuple[str, ...]  # of the command, after `cpipe`
    resources: JobResources
    after: tuple[str, ...] = ()  # names of the jobs it needs
    tasks: tuple[int, ...] = ()  # of an array
    trains: bool = False  # so it saves checkpoints, and goes on from one
    force: bool = field(default=False, compare=False)  # do it again although it is finished

    def command(self, program: Sequence[str], *, force: bool = False) -> str:
        """The command line."""
        words = (*program, *self.words, *(("--force",) if force else ()))
        return " ".join(word if isinstance(word, Shell) else shlex.quote(word) for word in words)


def render(
    job: Job,
    name: str,
    program: Sequence[str],
    folder: Path,
    parts: Sequence[Part],
    *,
    warn_seconds: int,
    requeues: int,
) -> str:
    """The script of `job`, called `name` in Slurm, run in `folder`; of an array with the parts that Slurm takes."""
    lines = ["#!/bin/bash"]
    lines += [f"#SBATCH {option}" for option in _options(job, name, parts, warn_seconds)]
    lines += ["", "# Written anew by every `cpipe slurm`: change [slurm] in cpipe.toml, not this."]
    lines += _by_hand(job, parts) if len(parts) > 1 else []
    lines += [f"cd -- {shlex.quote(str(folder))} || exit", ""]
    lines += ["task=$((SLURM_ARRAY_TASK_ID + ${1:-0}))"] if job.tasks else []
    # Libraries would take all cores of the node, where Slurm does not bind processes to theirs.
    lines += ['export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"', *(job.resources.setup or ()), ""]
    lines += [f"{_srun(job)} {job.command(program, force=job.force)}"]
    lines += _requeue(job, requeues) if job.trains and requeues else []
    return "\n".join(lines) + "\n"


def _by_hand(job: Job, parts: Sequence[Part]) -> list[str]:
    """How the whole of an array is submitted that Slurm takes in parts only."""
    lines = [f"#   sbatch --array={part.array(job.resources.at_once)} {job.name}.sh {part.begin}" for part in parts]
    return ["# Slurm takes no array as long as this one, so that it is submitted in parts:", *lines]


def _options(job: Job, name: str, parts: Sequence[Part], warn_seconds: int) -> Iterator[str]:
    given = job.resources
    yield f"--job-name={name}"
    if parts:
        yield f"--array={parts[0].array(given.at_once)}"
    for option, value in (
        ("partition", given.partition),
        ("account", given.account),
        ("qos", given.qos),
        ("time", given.time),
        ("nodes", _nodes(job)),
        ("ntasks-per-node", _processes(job)),
        ("gpus-per-node", given.gpus or None),
        ("cpus-per-task", given.cpus),
        ("mem", given.memory),
    ):
        if value is not None:
            yield f"--{option}={value}"
    yield "--open-mode=append"  # a job that comes back goes on with its log
    yield "--kill-on-invalid-dep=yes"  # else a job whose forerunner failed would wait for ever
    yield "--requeue"  # when the node fails or is wanted for another job
    if job.trains:
        yield f"--signal=USR1@{warn_seconds}"
    yield from given.header or ()


def _nodes(job: Job) -> int:
    return (job.resources.nodes or 1) if job.trains else 1


def _processes(job: Job) -> int:
    """On each node: those that train together, else one."""
    return (job.resources.processes or job.resources.gpus or 1) if job.trains else 1


def _srun(job: Job) -> str:
    words = ["srun"]
    if job.resources.cpus:  # srun does not take it over from the job
        words.append(f"--cpus-per-task={job.resources.cpus}")
    if _nodes(job) * _processes(job) > 1:
        # Processes that stop at a checkpoint do not end at the same instant: the first must not have the others killed.
        words.append("--kill-on-bad-exit=0")
    return " ".join(words)


def _requeue(job: Job, requeues: int) -> list[str]:
    """What follows the command: told to stop, the job goes back into the queue, where it resumes."""
    number = '"${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"' if job.tasks else '"$SLURM_JOB_ID"'
    return [
        "code=$?",
        "",
        f"# {STOPPED}: saved a checkpoint and stopped. 138: told to stop (SIGUSR1) before there was anything to save.",
        f'if [[ $code == {STOPPED} || $code == 138 ]] && (( "${{SLURM_RESTART_COUNT:-0}}" < {requeues} )); then',
        f"    scontrol requeue {number}",
        "fi",
        "exit $code",
    ]


def ranges(numbers: Sequence[int]) -> str:
    """Numbers in short: `0-2,5`."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in found)


def job_name(job: str, run_dir: Path) -> str:
    """What the job is called in Slurm: letters, digits, dots, dashes and underscores."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", f"cpipe-{job}-{run_dir.absolute().name}")[:120]


def as_path(text: str) -> str:
    """What begins with a dash would be taken for a flag."""
    return f"./{text}" if text.startswith("-") else text
