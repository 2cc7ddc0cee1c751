"""The Typer app: a command per stage, made from the stage's config, and the few commands that are not stages.

- imports stand inside the functions that need them, and flags are made for the command asked for only: people wait
  for `cpipe --help`
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cpipe.housekeeping import AsJson, Run, SettingsFile, add_commands
from cpipe.pipeline import EXCHANGE, PIPELINE, STAGES, TABLES, Stage, part_of_pipeline

if TYPE_CHECKING:
    from schemas.manifest import Manifest
    from schemas.strict import Config

Force = Annotated[bool, typer.Option("--force", help="Do it again although it is finished.")]
ForceStale = Annotated[bool, typer.Option("--force", help="Repeat stages finished with other settings or inputs.")]
Inputs = Annotated[list[str] | None, typer.Argument(help="Text, as for `cpipe tokenize`.")]
Start = Annotated[str | None, typer.Option("--from", help="First stage to run; those before are taken as they are.")]
Until = Annotated[str | None, typer.Option(help="Last stage to run.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would run and why, and touch nothing.")]

GENERATE_HELP = "Continue a prompt with one of the run's models."
ROUTE_HELP = "Show which experts the gates ask for each token of a text, and why."


def build_app(asked: str | None = None) -> typer.Typer:
    """The command line; with flags for every stage, or only for the command `asked` for."""
    app = typer.Typer(
        name="cpipe",
        help="From raw text to a composed language model, in staged commands.",
        no_args_is_help=True,
        rich_markup_mode=None,  # rich's columns cut the names of flags on a terminal of 80 characters
        pretty_exceptions_show_locals=False,
    )
    for stage in (*STAGES, *EXCHANGE):
        command = _stage_command(stage) if asked in (None, stage.command) else _without_flags
        app.command(stage.command, help=stage.help)(command)
    generate = _generate_command() if asked in (None, "generate") else _without_flags
    app.command("generate", help=GENERATE_HELP)(generate)
    app.command("route", help=ROUTE_HELP)(_route_command() if asked in (None, "route") else _without_flags)
    app.command("run")(run)
    app.command("slurm")(slurm)
    app.command("status")(status)
    app.command("demo")(demo)
    add_commands(app)
    return app


def _without_flags() -> None:
    """Stands for a command that was not asked for."""


def _stage_command(stage: Stage) -> Any:
    from cpipe.options import flags_of

    def act(run: Path, flags: dict[str, Any], settings: Path | None, force: bool, as_json: bool) -> None:
        from cpipe.console import session
        from cpipe.settings import read_settings
        from cpipe.show import show_manifest
        from schemas.failures import UsageFailure

        with session(run, stage.command):
            tables = read_settings(run, settings, TABLES).get(stage.command, [{}])
            if len(tables) > 1 and flags:
                raise UsageFailure(
                    f"the settings have {len(tables)} tables [[{stage.command}]], and flags would go to all of them: "
                    "leave the flags out, or give another file with --settings"
                )
            manifests = [_run_stage(stage, run, table, flags, force) for table in tables]
        for manifest in manifests:
            show_manifest(manifest, run, as_json=as_json)

    return flags_of(stage.config, act, {"settings": SettingsFile, "force": Force, "as_json": AsJson}, Run)


def _run_stage(stage: Stage, run: Path, table: dict[str, Any], flags: dict[str, Any], force: bool) -> "Manifest":
    from cpipe.settings import FILE_NAME, resolve

    where = f"{run / FILE_NAME} [{stage.command}]" if table and not flags else f"cpipe {stage.command}"
    return stage.run(resolve(stage.config, table, flags, where), run, force=force)


def _generate_command() -> Any:
    from cpipe.options import flags_of
    from schemas.generate_text import GenerateConfig

    def act(run: Path, flags: dict[str, Any], settings: Path | None, as_json: bool) -> None:
        from cpipe.console import session
        from cpipe.settings import read_settings, resolve
        from schemas.failures import UsageFailure

        with session(run, "generate"):
            tables = read_settings(run, settings, TABLES).get("generate", [{}])
            if len(tables) > 1:
                raise UsageFailure(f"the settings have {len(tables)} tables [[generate]]: leave one")
            (table,) = tables
            config = resolve(GenerateConfig, table, flags, "cpipe generate")
            from stages.generate_text import continuations, stream

            if config.prompts is not None:
                for prompt, text in continuations(config, run):
                    print(json.dumps({"prompt": prompt, "text": text}) if as_json else f"{prompt}{text}\n", flush=True)
                return
            pieces = []
            for piece in stream(config, run):
                pieces.append(piece)
                if not as_json:
                    print(piece, end="", flush=True)
        print(json.dumps({"prompt": config.prompt, "text": "".join(pieces)}) if as_json else "")

    return flags_of(GenerateConfig, act, {"settings": SettingsFile, "as_json": AsJson}, Run)


def _route_command() -> Any:
    from cpipe.route import route_command

    return route_command(Run, AsJson)


def run(
    run: Run,
    inputs: Inputs = None,
    start: Start = None,
    until: Until = None,
    settings: SettingsFile = None,
    force: ForceStale = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Run every stage that is not up to date, in order, with the settings of RUN/cpipe.toml.

    With --force also those that were finished with other settings or inputs.
    """
    from cpipe.console import session
    from cpipe.settings import asked_for
    from cpipe.show import show_manifest

    with session(run, "run", log=not dry_run):
        asked = asked_for(run, settings, part_of_pipeline(start, until), inputs or [])
        if dry_run:
            from cpipe.forecast import show_forecast
            from schemas.progress import find_progress

            steps = find_progress([(stage.command, config) for stage, config in asked], run)
            show_forecast(steps, run, force=force, as_json=as_json)
            return
        manifest = _run_all(run, asked, force)
    show_manifest(manifest, run, as_json=as_json)


def _run_all(run: Path, asked: Sequence[tuple[Stage, "Config | None"]], force: bool) -> "Manifest":
    """Run these stages; returns the last one's manifest."""
    from loguru import logger

    for stage, config in asked:
        logger.info("{}", stage.command)
        manifest = stage.manifest.read(run) if config is None else _run_unless_up_to_date(stage, run, config, force)
    return manifest


def _run_unless_up_to_date(stage: Stage, run: Path, config: "Config", force: bool) -> "Manifest":
    """Of a whole pipeline, `--force` repeats what is not as asked for, and nothing else."""
    from loguru import logger

    from schemas.failures import StaleFailure

    try:
        return stage.run(config, run, force=False)
    except StaleFailure as failure:
        if not force:
            raise
        logger.info("{}", str(failure).split(": give --force")[0])
        return stage.run(config, run, force=True)


def slurm(
    run: Run,
    inputs: Inputs = None,
    until: Until = None,
    submit: Annotated[bool, typer.Option("--submit", help="Submit the jobs that are missing.")] = False,
    settings: SettingsFile = None,
    force: ForceStale = False,
    as_json: AsJson = False,
) -> None:
    """Write the pipeline as jobs of Slurm into RUN/slurm, with the resources of [slurm] in RUN/cpipe.toml.

    With --submit also submit what is neither finished nor in the queue, each job after those it needs.
    """
    from cpipe.console import session
    from cpipe.show import show_jobs
    from cpipe.submission import submission

    with session(run, "slurm"):
        config = submission(run, inputs or [], until, settings, submit=submit)
        from stages.submit_jobs import run as submit_jobs

        rows = submit_jobs(config, run, force=force)
    show_jobs(rows, run, as_json=as_json)


def status(
    run: Run,
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option("--watch", help="Go on showing it, until all is finished or Ctrl-C.")] = False,
) -> None:
    """Show how far a run has got; reads only manifests."""
    from cpipe.console import session
    from cpipe.show import show_status
    from cpipe.watch import watch_status
    from stages.submit_jobs import job_rows

    with session(run, "status", log=False):
        stages = [(stage.command, stage.manifest) for stage in STAGES]
        if watch:
            watch_status(run, stages, PIPELINE)
        else:
            show_status(run, stages, job_rows(run), as_json=as_json)


def demo(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run.")] = Path("runs/demo"),
    force: ForceStale = False,
) -> None:
    """Run the whole pipeline on text found in this Python installation: no download, minutes on two cores."""
    from cpipe.console import session
    from cpipe.demo import PROMPT, SAMPLED, write_settings
    from cpipe.samples import write_samples
    from cpipe.settings import asked_for
    from cpipe.show import show_evaluation, show_samples
    from schemas.report_run import ReportConfig

    with session(run, "demo"):
        write_settings(run)
        asked = asked_for(run, None, ("collect", *PIPELINE), [str(run / "corpus" / "*.jsonl")])
        manifest = _run_all(run, asked, force)
        samples = write_samples(run, [PROMPT], SAMPLED)
        from stages.report_run import stream

        reports = [run / ref.path for ref in stream(ReportConfig(), run)]
    show_evaluation(manifest, run)
    show_samples({sample.model: sample.prompt + sample.text for sample in samples})
    print(*reports, sep="\n")
