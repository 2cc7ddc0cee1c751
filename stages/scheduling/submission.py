"""Jobs as they are submitted, one after the other, and the record of them in the run.

- what is in the queue already is left there, and waited for
- a job that waits for one that has to be submitted anew would wait in vain: it is taken out of the queue, and submitted
  anew itself
- an array that Slurm takes in parts only is one job to whoever reads: its tasks keep their numbers, and what comes
  after it waits for all parts. Where tasks must not run all at once, the parts run one after the other
- where Slurm says how many jobs it takes at a time, no more are submitted; the same command later submits the rest
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from loguru import logger
from pydantic import ValidationError

from schemas.failures import IntegrityFailure, UsageFailure
from schemas.files import write_bytes
from schemas.strict import explain
from schemas.submit_jobs import FOLDER, RECORD, JobRecord, JobRow, JobsRecord
from stages.scheduling import job_queue
from stages.scheduling.job_queue import Room
from stages.scheduling.limits import ArrayLimits, cut
from stages.scheduling.scripts import Job, Part, job_name, ranges

Keys = dict[int | None, str]  # as Slurm lists them, by task; None: of a job that is no array


class Submission:
    """Jobs submitted one after the other, each after those it needs; the record is written after each."""

    def __init__(self, run_dir: Path, program: Sequence[str], limits: ArrayLimits, room: Room | None) -> None:
        """`room`: how many more jobs and tasks may be in the queue; None: as many as there are."""
        self._run_dir = run_dir
        self._program = program
        self._limits = limits
        self._records = list(read_record(run_dir))
        self._known = job_queue.states(self._records)
        self._room = room
        self._left = room.left if room else None
        self._held = 0
        self._waits: dict[str, list[str]] = {}  # by job: what Slurm is to wait for
        self._anew: set[str] = set()

    def add(self, job: Job, missing: Sequence[int | None]) -> list[JobRow]:
        """Submit what of `missing` is not in the queue. Returns what became of the job."""
        if not missing:
            return [row_of(job.name, (), None, "finished")]
        active = self._kept(job)
        self._waits[job.name] = self._waiting_for(job, active)
        rows = rows_of(job.name, active, self._known)
        if left := [task for task in missing if task not in active]:
            self._anew.add(job.name)
            rows += self._submit(job, left, set(active.values()))
        return rows

    def say_what_is_held_back(self) -> None:
        """Log how many jobs and tasks there was no room for, and why."""
        if self._held and self._room:
            logger.warning(
                "{} jobs and tasks are held back: Slurm takes {} at a time (MaxSubmitJobs{}), and {} were in the "
                "queue: when some have ended, give the same command again",
                self._held,
                self._room.limit,
                f" of account {self._room.account}" if self._room.account else "",
                self._room.queued,
            )

    def _submit(self, job: Job, left: Sequence[int | None], active: set[str]) -> list[JobRow]:
        """Submit these tasks, in as many parts as it takes; those that there is no room for are left."""
        tasks = [task for task in left if task is not None]
        now = left if self._left is None else left[: self._left]
        parts = cut(tasks[: len(now)], self._limits) if tasks else [Part(0, ())] * len(now)
        rows, waits = [], [key for name in job.after for key in self._waits.get(name, ())]
        before = self._last(job.name, active)
        for part in parts:
            follows = before if job.resources.at_once else None
            before = _sbatch(job, part, waits, self._run_dir, follows)
            self._note(job, before, part, active)
            active.add(str(before))
            self._waits[job.name].append(str(before))
            rows.append(row_of(job.name, part.tasks or (None,), before, "submitted"))
        if self._left is not None:
            self._left -= len(now)
        if rest := left[len(now) :]:
            self._held += len(rest)
            rows.append(row_of(job.name, rest, None, "to submit"))
        return rows

    def _last(self, job: str, active: set[str]) -> int | None:
        """The number of its newest array or part with tasks among those in the queue, which waits for those before."""
        numbers = (one.number for one in self._records if one.job == job and not active.isdisjoint(one.listed_as()))
        return max(numbers, default=None)

    def _kept(self, job: Job) -> Keys:
        """Its tasks that stay in the queue, and their keys; what would wait in vain is taken out."""
        mine = [record for record in self._records if record.job == job.name]
        active = _active(mine, self._known, job.command(self._program))
        if self._anew.isdisjoint(job.after):
            return active
        if vain := [key for key in active.values() if self._known[key] == "PENDING"]:
            job_queue.cancel(vain)
        return {task: key for task, key in active.items() if key not in vain}

    def _waiting_for(self, job: Job, active: Keys) -> list[str]:
        """What stands for these keys: the number of an array, where all its tasks are among them."""
        left, found = set(active.values()), list[str]()
        for record in self._records:
            if record.job == job.name and left.issuperset(record.listed_as()):
                found.append(str(record.number))
                left.difference_update(record.listed_as())
        return [*found, *(key for key in active.values() if key in left)]

    def _note(self, job: Job, number: int, part: Part, active: set[str]) -> None:
        """Put a new job on record, and forget those before it that are over."""
        self._records = [
            one
            for one in self._records
            if one.job != job.name or str(one.number) in active or not active.isdisjoint(one.listed_as())
        ]
        self._records.append(
            JobRecord(
                job=job.name,
                number=number,
                name=job_name(job.name, self._run_dir),
                tasks=part.tasks,
                begin=part.begin,
                command=job.command(self._program),
                submitted=datetime.now(UTC).isoformat(timespec="seconds"),
            )
        )
        content = JobsRecord(schema_id="cpipe.slurm/1", jobs=tuple(self._records))
        text = content.model_dump_json(by_alias=True, indent=2) + "\n"
        write_bytes(self._run_dir / FOLDER / RECORD, text.encode(), self._run_dir)
        logger.info("{} is job {}", job.name, number)


def _active(mine: Sequence[JobRecord], known: Mapping[str, str], command: str) -> Keys:
    """The tasks of a job (None: the job itself) that are in the queue or run, and their keys.

    Raises UsageFailure where they do something else than is asked for now.
    """
    found = {}
    for record in mine:
        for task, key in zip(record.tasks or (None,), record.listed_as(), strict=True):
            if known.get(key, "COMPLETED") not in job_queue.OVER:
                if record.command != command:
                    raise UsageFailure(
                        f"job {key} ({record.job}) is {known[key].lower()} and runs `{record.command}`, not "
                        f"`{command}`: `scancel {record.number}` first, or wait for it"
                    )
                found[task] = key
    return found


def _sbatch(job: Job, part: Part, waits_for: Sequence[str], run_dir: Path, follows: int | None) -> int:
    folder = str((run_dir / FOLDER).absolute())
    number = f"%A_{f'{part.begin}+' if part.begin else ''}%a" if part.tasks else "%j"
    log = f"{folder.replace('%', '%%')}/logs/{job.name}-{number}.log"
    listed = part.array(job.resources.at_once) if part.tasks else None
    script = script_of(job, run_dir).absolute()
    return job_queue.submit(script, log, waits_for, listed, begin=part.begin, follows=follows)


def script_of(job: Job, run_dir: Path) -> Path:
    """Where the script of a job lies."""
    return run_dir / FOLDER / f"{job.name}.sh"


def rows_of(job: str, keys: Mapping[int | None, str], known: Mapping[str, str]) -> list[JobRow]:
    """A row for each state that tasks are in."""
    found: dict[tuple[int, str], list[int | None]] = {}
    for task, key in keys.items():
        found.setdefault((int(key.split("_")[0]), known.get(key, "over").lower()), []).append(task)
    return [row_of(job, tasks, number, state) for (number, state), tasks in found.items()]


def row_of(job: str, tasks: Sequence[int | None], number: int | None, state: str) -> JobRow:
    """What became of tasks that are all in the same state."""
    numbers = [task for task in tasks if task is not None]
    return JobRow(job=job, tasks=ranges(numbers), number=number, state=state)


def read_record(run_dir: Path) -> tuple[JobRecord, ...]:
    """The jobs that were submitted and may still count. Raises IntegrityFailure."""
    path = run_dir / FOLDER / RECORD
    if not path.exists():
        return ()
    try:
        if not path.is_file():
            raise IntegrityFailure("is no file")
        return JobsRecord.from_json(path.read_bytes()).jobs
    except (ValidationError, IntegrityFailure) as error:
        why = explain(error, str(path)) if isinstance(error, ValidationError) else f"{path}: {error}"
        raise IntegrityFailure(f"{why}: remove it when none of the run's jobs are in the queue") from error
