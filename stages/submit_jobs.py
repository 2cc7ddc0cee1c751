"""Make the pipeline jobs of Slurm: scripts in `slurm/` of a run, submitted with what each has to wait for.

- how many tasks an array has is known from the settings: clusters and shards are counted before any stage has run.
  Experts that were added later are counted in the run
- finished is what has a manifest with these settings; what is in the queue already is left there, and waited for
- a job that waits for one that has to be submitted anew would wait in vain: it is taken out of the queue, and submitted
  anew itself
- no manifest: jobs are no result, and where they stand is Slurm's to say
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

from loguru import logger
from pydantic import ValidationError

from schemas.cluster_documents import ClusterConfig
from schemas.failures import Failure, IntegrityFailure, UsageFailure
from schemas.files import write_bytes
from schemas.manifest import FILE_NAME
from schemas.progress import find_progress, is_finished
from schemas.strict import Config, explain
from schemas.submit_jobs import FOLDER, RECORD, JobRecord, JobRow, JobsRecord, SubmitConfig
from schemas.tokenize_text import ShareManifest, TokenizeConfig, TokenizeManifest
from schemas.train_experts import DENSE, ExpertsConfig, ExpertsManifest
from schemas.train_gates import ALONE, GatesConfig, GatesManifest, label_of
from stages.artifacts.added_domains import begun_domains
from stages.artifacts.locks import turn_by_turn
from stages.scheduling import job_queue
from stages.scheduling.limits import refuse_large_arrays, refuse_names
from stages.scheduling.scripts import TASK, Job, Shell, array, as_path, job_name, ranges, render
from stages.scheduling.todo import Todo, find_todo

AFTER: dict[str, tuple[str, ...]] = {
    "tokenize": (),
    "cluster": ("tokenize",),
    "train-seed": ("tokenize",),
    "import": ("tokenize",),  # in its place
    "train-experts": ("cluster", "train-seed", "import"),
    "train-gates": ("train-experts",),
    "compose": ("train-gates",),
    "evaluate": ("compose",),
}  # the last job of a stage has the stage's name


def run(config: SubmitConfig, run_dir: Path, *, force: bool = False) -> list[JobRow]:
    """Write the scripts of all stages in `config` and, asked to, submit what is missing. Returns what became of each.

    force: also repeat stages that are finished with other settings or inputs; else they raise StaleFailure
    """
    with turn_by_turn(run_dir, FOLDER):
        todo = find_todo(find_progress(_asked(config, run_dir), run_dir), AFTER, run_dir, force=force)
        jobs = list(_jobs(config, run_dir, todo))
        refuse_large_arrays(jobs, config.slurm.max_array, submits=config.submit)
        refuse_names(jobs, config.program, run_dir / FOLDER, submits=config.submit)
        _write_scripts(jobs, config, run_dir)
        missing = {job.name: _missing(job, todo, config, run_dir) for job in jobs}
        if config.submit:
            submission = Submission(run_dir, config.program)
            return [row for job in jobs for row in submission.add(job, missing[job.name])]
        return [_row(name, tasks, None, "to submit" if tasks else "finished") for name, tasks in missing.items()]


def _asked(config: SubmitConfig, run_dir: Path) -> Iterator[tuple[str, Config | None]]:
    """Every stage with its settings. Tokens are taken as they are where no text is named. Raises UsageFailure."""
    for command, configs in config.stages.items():
        for each in configs or (None,):
            if isinstance(each, TokenizeConfig) and not (each.inputs or config.inputs):
                if not is_finished(run_dir, TokenizeManifest.folder):
                    raise UsageFailure(f"{run_dir} has no tokens, and no text to make them of is given: name the files")
                each = None
            yield command, each


def _jobs(config: SubmitConfig, run_dir: Path, todo: Todo) -> Iterator[Job]:
    """The pipeline, in an order in which each can name those before it."""
    slurm, stages = config.slurm, config.stages
    settings = ("--settings", config.settings_file) if config.settings_file else ()
    if "-" in config.inputs:
        raise UsageFailure("a job has no standard input: give files")
    texts = tuple(map(as_path, config.inputs))

    def words(command: str, *more: str) -> tuple[str, ...]:
        return command, as_path(str(run_dir)), *more, *settings

    for command in stages:
        after, force = AFTER[command], command in todo.forced
        if command == "tokenize" and slurm.shards > 1 and not force:
            share = Shell(f"{TASK}/{slurm.shards}")
            parts = words(command, *texts, "--shard", share)
            tasks = tuple(range(1, slurm.shards + 1))
            yield Job("tokenize-shards", parts, slurm.resolved(slurm.tokenize), tasks=tasks)
            merging = words(command, *texts, "--merge")
            yield Job(command, merging, slurm.resolved(slurm.join), after=("tokenize-shards",))
        elif command == "tokenize":
            yield Job(command, words(command, *texts), slurm.resolved(slurm.tokenize), force=force)
        elif command == "train-experts":
            each, experts = words(command, "--expert", TASK), slurm.resolved(slurm.train_experts)
            yield Job("experts", each, experts, after, _experts(config, run_dir), trains=True, force=force)
            resources = slurm.resolved(slurm.train_experts, slurm.train_dense)
            for dense in (baselines := cast(ExpertsConfig, stages[command][-1]).all_dense()):
                yield Job(dense, words(command, "--expert", dense), resources, after, trains=True, force=force)
            yield Job(command, words(command), slurm.resolved(slurm.join), after=("experts", *baselines))
        elif command == "train-gates" and (independent := _gates_alone(config)):
            gates = slurm.resolved(slurm.train_gates)
            each = words(command, "--expert", TASK)
            yield Job("gates", each, gates, after, _experts(config, run_dir), trains=True, force=force)
            # With nothing left but to gather, --force would train all once more.
            rest = force and len(independent) < len(list(cast(GatesConfig, stages[command][-1]).kinds()))
            yield Job(command, words(command), gates, after=(*after, "gates"), trains=True, force=rest)
        else:
            own = slurm.train_seed if command == "import" else getattr(slurm, command.replace("-", "_"))
            trains = command in ("train-seed", "train-gates", "compose")
            yield Job(command, words(command), slurm.resolved(own), after, trains=trains, force=force)


def _experts(config: SubmitConfig, run_dir: Path) -> tuple[int, ...]:
    """The numbers of the experts: those of the clusters, and those that were added."""
    experts = cast(ExpertsConfig, config.stages["train-experts"][-1])
    if experts.add:
        raise UsageFailure(
            f"[train-experts] adds {experts.add}, which is no array of jobs: run `cpipe train-experts {run_dir} "
            f"--add {experts.add}` once, and take it out of the settings"
        )
    added = (domain.config.expert for domain in begun_domains(run_dir))
    return *range(cast(ClusterConfig, config.stages["cluster"][-1]).clusters), *added


def _gates_alone(config: SubmitConfig) -> list[str]:
    """The folders of the gates that know of one expert only, each with a folder for every expert."""
    kinds = cast(GatesConfig, config.stages["train-gates"][-1]).kinds()
    return [f"{GatesManifest.folder}/{label_of(place, mode)}" for place, mode in kinds if mode in ALONE]


def _write_scripts(jobs: Sequence[Job], config: SubmitConfig, run_dir: Path) -> None:
    slurm = config.slurm
    for job in jobs:
        name = job_name(job.name, run_dir)
        text = render(job, name, config.program, Path.cwd(), slurm.warn_seconds, slurm.requeues)
        write_bytes(_script(job, run_dir), text.encode(), run_dir)
    (run_dir / FOLDER / "logs").mkdir(exist_ok=True)


def _script(job: Job, run_dir: Path) -> Path:
    return run_dir / FOLDER / f"{job.name}.sh"


def _missing(job: Job, todo: Todo, config: SubmitConfig, run_dir: Path) -> list[int | None]:
    """The tasks of an array that have still to be done, by number; None stands for a job that is no array."""
    command = job.words[0]
    if command not in todo.stages:
        return []
    tasks: list[int | None] = [*job.tasks] or [None]
    if command in todo.again:
        return tasks
    return [task for task in tasks if not _is_done(job, task, config, run_dir)]


def _is_done(job: Job, task: int | None, config: SubmitConfig, run_dir: Path) -> bool:
    """Whether a member of an unfinished stage is finished."""
    folders = {
        "tokenize-shards": [f"{ShareManifest.folder}/{task or 0:03d}-of-{len(job.tasks):03d}"],
        "experts": [f"{ExpertsManifest.folder}/{task or 0:03d}"],
        "gates": [f"{folder}/{task or 0:03d}" for folder in _gates_alone(config)] if job.name == "gates" else [],
    }
    found = folders.get(job.name, [job.name] if job.name.startswith(DENSE) else [])
    return bool(found) and all((run_dir / folder / FILE_NAME).is_file() for folder in found)


class Submission:
    """Jobs submitted one after the other, each after those it needs; the record is written after each."""

    def __init__(self, run_dir: Path, program: Sequence[str]) -> None:
        self._run_dir = run_dir
        self._program = program
        self._records = list(_read_record(run_dir))
        self._known = job_queue.states(self._records)
        self._waits: dict[str, list[str]] = {}  # by job: what Slurm is to wait for
        self._anew: set[str] = set()

    def add(self, job: Job, missing: Sequence[int | None]) -> list[JobRow]:
        """Submit what of `missing` is not in the queue. Returns what became of the job."""
        if not missing:
            return [_row(job.name, (), None, "finished")]
        active = self._kept(job)
        self._waits[job.name] = list(active.values())
        rows = _rows(job.name, active, self._known)
        if left := [task for task in missing if task not in active]:
            number = _sbatch(job, left, [key for name in job.after for key in self._waits.get(name, ())], self._run_dir)
            self._note(job, number, left, active)
            self._waits[job.name].append(str(number))
            self._anew.add(job.name)
            rows.append(_row(job.name, left, number, "submitted"))
        return rows

    def _kept(self, job: Job) -> dict[int | None, str]:
        """Its tasks that stay in the queue, and their keys; what would wait in vain is taken out."""
        mine = [record for record in self._records if record.job == job.name]
        active = _active(mine, self._known, job.command(self._program))
        if self._anew.isdisjoint(job.after):
            return active
        if vain := [key for key in active.values() if self._known[key] == "PENDING"]:
            job_queue.cancel(vain)
        return {task: key for task, key in active.items() if key not in vain}

    def _note(self, job: Job, number: int, tasks: Sequence[int | None], active: dict[int | None, str]) -> None:
        """Put a new job on record, and forget those before it that are over."""
        kept = set(active.values())
        self._records = [one for one in self._records if one.job != job.name or kept.intersection(one.listed_as())]
        self._records.append(
            JobRecord(
                job=job.name,
                number=number,
                name=job_name(job.name, self._run_dir),
                tasks=tuple(task for task in tasks if task is not None),
                command=job.command(self._program),
                submitted=datetime.now(UTC).isoformat(timespec="seconds"),
            )
        )
        content = JobsRecord(schema_id="cpipe.slurm/1", jobs=tuple(self._records))
        text = content.model_dump_json(by_alias=True, indent=2) + "\n"
        write_bytes(self._run_dir / FOLDER / RECORD, text.encode(), self._run_dir)
        logger.info("{} is job {}", job.name, number)


def _active(mine: Sequence[JobRecord], known: dict[str, str], command: str) -> dict[int | None, str]:
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


def _sbatch(job: Job, tasks: Sequence[int | None], waits_for: Sequence[str], run_dir: Path) -> int:
    numbers = [task for task in tasks if task is not None]
    folder = str((run_dir / FOLDER).absolute())
    log = f"{folder.replace('%', '%%')}/logs/{job.name}-{'%A_%a' if numbers else '%j'}.log"
    listed = array(numbers, job.resources.at_once) if numbers else None
    return job_queue.submit(_script(job, run_dir).absolute(), log, waits_for, listed)


def _rows(job: str, keys: Mapping[int | None, str], known: Mapping[str, str]) -> list[JobRow]:
    """A row for each state that tasks are in."""
    found: dict[tuple[int, str], list[int | None]] = {}
    for task, key in keys.items():
        found.setdefault((int(key.split("_")[0]), known.get(key, "over").lower()), []).append(task)
    return [_row(job, tasks, number, state) for (number, state), tasks in found.items()]


def _row(job: str, tasks: Sequence[int | None], number: int | None, state: str) -> JobRow:
    numbers = [task for task in tasks if task is not None]
    return JobRow(job=job, tasks=ranges(numbers), number=number, state=state)


def _read_record(run_dir: Path) -> tuple[JobRecord, ...]:
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


def job_rows(run_dir: Path) -> list[JobRow]:
    """Where the submitted jobs stand; none where there is no Slurm to ask."""
    records = _read_record(run_dir)
    if not records or not shutil.which("squeue"):
        return []
    try:
        known = job_queue.states(records)
    except Failure as failure:
        logger.debug("{}", failure)
        return []
    return [
        row
        for record in records
        for row in _rows(record.job, dict(zip(record.tasks or (None,), record.listed_as(), strict=True)), known)
    ]
