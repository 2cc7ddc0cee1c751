"""What Slurm cannot take, found before anything is submitted."""

from collections.abc import Sequence
from pathlib import Path

from schemas.failures import UsageFailure
from stages.scheduling import job_queue
from stages.scheduling.scripts import Job


def refuse_large_arrays(jobs: Sequence[Job], max_array: int, *, submits: bool) -> None:
    """Raise UsageFailure for an array that sbatch would refuse when the jobs before it are in the queue already.

    max_array: tasks end below it where Slurm does not say
    submits: Slurm is there to be asked
    """
    limit = job_queue.array_limit() if submits and any(job.tasks for job in jobs) else None
    for job in jobs:
        if job.tasks and max(job.tasks) >= (limit or max_array):
            known = f"MaxArraySize = {limit}" if limit else f"[slurm] max_array = {max_array}"
            mend = "have fewer [slurm] shards" if job.name == "tokenize-shards" else "have fewer clusters"
            raise UsageFailure(
                f"the array {job.name} needs a task {max(job.tasks)}, and numbers end below {known}: {mend}"
            )


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
