"""What Slurm cannot take, found before anything is submitted, and long arrays cut into those that it takes.

- numbers of tasks lie below MaxArraySize, and a site may want fewer tasks in one array than that (max_array_tasks)
- a part that begins further on is numbered from 0 again; its script is told where it begins, so that each task keeps
  the number of its cluster or shard in everything a person reads
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from schemas.failures import UsageFailure
from stages.scheduling import job_queue
from stages.scheduling.scripts import Job, Part


class ArrayLimits(NamedTuple):
    """What one array may hold: numbers of tasks below `size`, and so many tasks."""

    size: int
    tasks: int


def find_limits(jobs: Sequence[Job], max_array: int, *, submits: bool) -> ArrayLimits:
    """The limits of this Slurm, or what follows from `max_array` where it does not say. Raises UsageFailure.

    submits: Slurm is there to be asked
    """
    known = job_queue.array_limits() if submits and any(job.tasks for job in jobs) else None
    size, tasks = known or (max_array, max_array)
    limits = ArrayLimits(size, min(size, tasks))
    if limits.tasks < 1:
        raise UsageFailure(
            f"this Slurm takes no arrays of jobs (MaxArraySize = {size}, max_array_tasks = {tasks}): "
            "submit `cpipe run` as one job"
        )
    return limits


def cut(tasks: Sequence[int], limits: ArrayLimits) -> list[Part]:
    """The parts that Slurm takes, in order, of an array with these tasks; one where it is short enough."""
    parts: list[tuple[int, list[int]]] = [(0, [])]
    for task in sorted(tasks):
        begin, found = parts[-1]
        if task - begin < limits.size and len(found) < limits.tasks:
            found.append(task)
        else:
            parts.append((task, [task]))
    return [Part(begin, tuple(found)) for begin, found in parts if found]


def refuse_names(jobs: Sequence[Job], program: Sequence[str], folder: Path, *, submits: bool) -> None:
    """Raise UsageFailure for names that Slurm, which writes its logs below `folder`, or the record cannot hold."""
    place = str(folder.absolute())
    if submits and "\\" in place:
        raise UsageFailure(f"Slurm writes no log below {place}: a path must not hold a backslash")
    for text in (place, *(job.command(program) for job in jobs)):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageFailure(
                f"{text!r:.200} holds what is no UTF-8, so no job can be made of it: rename it"
            ) from error
