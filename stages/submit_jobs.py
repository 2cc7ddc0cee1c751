"""Make the pipeline jobs of Slurm: scripts in `slurm/` of a run, submitted with what each has to wait for.

- how many tasks an array has is known from the settings: clusters and shards are counted before any stage has run.
  Experts that were added later are counted in the run
- finished is what has a manifest with these settings
- no manifest: jobs are no result, and where they stand is Slurm's to say
"""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

from loguru import logger

from schemas.cluster_documents import ClusterConfig
from schemas.failures import Failure, UsageFailure
from schemas.files import write_bytes
from schemas.manifest import FILE_NAME
from schemas.progress import find_progress, is_finished
from schemas.strict import Config
from schemas.submit_jobs import FOLDER, JobRow, SubmitConfig
from schemas.tokenize_text import ShareManifest, TokenizeConfig, TokenizeManifest
from schemas.train_experts import DENSE, ExpertsConfig, ExpertsManifest
from schemas.train_gates import ALONE, GatesConfig, GatesManifest, label_of
from stages.artifacts.added_domains import begun_domains
from stages.artifacts.locks import turn_by_turn
from stages.scheduling import job_queue
from stages.scheduling.limits import ArrayLimits, cut, find_limits, refuse_names
from stages.scheduling.scripts import TASK, Job, Shell, as_path, job_name, render
from stages.scheduling.submission import Submission, read_record, row_of, rows_of, script_of
from stages.scheduling.todo import Todo, find_todo

AFTER: dict[str, tuple[str, ...]] = {
    "tokenize": (),
    "cluster": ("tokenize",),
    "train-seed": ("tokenize",),
    "import": ("tokenize",),  # in its place
    "train-experts": ("cluster", "train-seed", "import"),
    "train-gates": ("train-experts",),
    "compose": ("train-gates",),
    "evaluate": ("train-experts", "compose"),
}  # the last job of a stage has the stage's name


def run(config: SubmitConfig, run_dir: Path, *, force: bool = False) -> list[JobRow]:
    """Write the scripts of all stages in `config` and, asked to, submit what is missing. Returns what became of each.

    force: also repeat stages that are finished with other settings or inputs; else they raise StaleFailure
    """
    with turn_by_turn(run_dir, FOLDER):
        todo = find_todo(find_progress(_asked(config, run_dir), run_dir), AFTER, run_dir, force=force)
        jobs = list(_jobs(config, run_dir, todo))
        limits = find_limits(jobs, config.slurm.max_array, submits=config.submit)
        refuse_names(jobs, config.program, run_dir / FOLDER, submits=config.submit)
        _write_scripts(jobs, config, run_dir, limits)
        missing = {job.name: _missing(job, todo, config, run_dir) for job in jobs}
        if config.submit:
            room = job_queue.room(dict.fromkeys(job.resources.account for job in jobs if missing[job.name]))
            submission = Submission(run_dir, config.program, limits, room)
            rows = [row for job in jobs for row in submission.add(job, missing[job.name])]
            submission.say_what_is_held_back()
            return rows
        return [row_of(name, tasks, None, "to submit" if tasks else "finished") for name, tasks in missing.items()]


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


def _write_scripts(jobs: Sequence[Job], config: SubmitConfig, run_dir: Path, limits: ArrayLimits) -> None:
    slurm = config.slurm
    for job in jobs:
        name, parts = job_name(job.name, run_dir), cut(job.tasks, limits)
        text = render(
            job, name, config.program, Path.cwd(), parts, warn_seconds=slurm.warn_seconds, requeues=slurm.requeues
        )
        write_bytes(script_of(job, run_dir), text.encode(), run_dir)
    (run_dir / FOLDER / "logs").mkdir(exist_ok=True)


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


def job_rows(run_dir: Path) -> list[JobRow]:
    """Where the submitted jobs stand; none where there is no Slurm to ask."""
    records = read_record(run_dir)
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
        for row in rows_of(record.job, dict(zip(record.tasks or (None,), record.listed_as(), strict=True)), known)
    ]
