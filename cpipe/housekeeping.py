"""The commands that look after a run: settings to begin with and their cost, a check of all files, room, its report.

- as in `cpipe.app`, what a command needs is imported inside it
"""

from pathlib import Path
from typing import Annotated

import typer

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run.")]
SettingsFile = Annotated[Path | None, typer.Option("--settings", help="TOML file instead of RUN/cpipe.toml.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def add_commands(app: typer.Typer) -> None:
    """Add the commands to the app."""
    app.command("init")(init)
    app.command("plan")(plan)
    app.command("verify")(verify)
    app.command("clean")(clean)
    app.command("schema")(schema)
    app.command("report")(report)


def init(run: Run) -> None:
    """Write RUN/cpipe.toml: every setting, commented out, with its default and a sentence about it."""
    from cpipe.console import session
    from cpipe.settings import FILE_NAME
    from cpipe.template import settings_template
    from schemas.failures import UsageFailure
    from schemas.files import write_bytes

    path = run / FILE_NAME
    with session(run, "init", log=False):
        if path.exists() or path.is_symlink():
            raise UsageFailure(f"{path} is there already: change it, or remove it and begin anew")
        write_bytes(path, settings_template().encode(), run)
    print(path)


def plan(
    run: Run,
    processes: Annotated[int, typer.Option(help="Devices that train together.")] = 1,
    flops_per_second: Annotated[float | None, typer.Option(help="Speed of a device; default: measured here.")] = None,
    settings: SettingsFile = None,
    as_json: AsJson = False,
) -> None:
    """Print what the settings would train and what it costs: FLOPs, memory, disk, time. Writes nothing."""
    from cpipe.console import session
    from cpipe.settings import plan_settings
    from cpipe.show import show_plan

    with session(run, "plan", log=False):
        config = plan_settings(run, settings, {"processes": processes, "flops_per_second": flops_per_second})
        from stages.plan_training import run as make_plan

        found = make_plan(config, run)
    show_plan(found, as_json=as_json)


def verify(
    run: Run,
    sizes_only: Annotated[
        bool, typer.Option("--sizes-only", help="Compare sizes and manifests only, and read no large file.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check every file of the run against its manifest, and the manifests against each other."""
    from cpipe.console import session
    from cpipe.show import show_checked
    from schemas.failures import IntegrityFailure
    from schemas.verify_run import VerifyConfig
    from stages.verify_run import stream

    with session(run, "verify", log=False):
        checked = list(stream(VerifyConfig(sizes_only=sizes_only), run))
        show_checked(checked, run, as_json=as_json)
        problems = [problem for folder in checked for problem in folder.problems]
        if problems:
            more = f"; and {len(problems) - 1} more" if len(problems) > 1 else ""
            first = min(
                problems, key=lambda problem: problem.fault in ("stale", "extra")
            )  # a cause before what follows
            raise IntegrityFailure(f"{first.message}{more}")


def clean(
    run: Run,
    unfinished: Annotated[
        bool, typer.Option("--unfinished", help="Also what begun stages would resume from: they begin anew.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed, and remove nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove checkpoints, caches and leftovers that no stage needs any more; never results."""
    from cpipe.console import session
    from cpipe.show import show_removed
    from schemas.clean_run import CleanConfig
    from stages.clean_run import stream

    with session(run, "clean", log=False):
        removed = list(stream(CleanConfig(unfinished=unfinished, dry_run=dry_run), run))
    show_removed(removed, run, dry_run=dry_run, as_json=as_json)


def schema(
    stage: Annotated[str, typer.Argument(metavar="STAGE", help="A command with settings, such as train-seed.")],
    manifest: Annotated[bool, typer.Option("--manifest", help="Of its manifest instead of its settings.")] = False,
) -> None:
    """Print the JSON Schema of a stage's settings, as cpipe.toml has them, or of its manifest."""
    import json

    from cpipe.console import session
    from cpipe.json_schema import manifest_schema, settings_schema
    from cpipe.pipeline import BY_COMMAND, TABLES
    from schemas.failures import UsageFailure
    from schemas.generate_text import GenerateConfig
    from schemas.strict import Config
    from schemas.submit_jobs import SlurmConfig

    with session(Path(), "schema", log=False):
        if stage not in (BY_COMMAND if manifest else TABLES):
            known = ", ".join(BY_COMMAND if manifest else TABLES)
            what = "has no manifest" if stage in TABLES else "is no command with settings"
            raise UsageFailure(f"{stage} {what}; expected one of {known}")
        others: dict[str, type[Config]] = {"generate": GenerateConfig, "slurm": SlurmConfig}
        config = BY_COMMAND[stage].config if stage in BY_COMMAND else others[stage]
        content = manifest_schema(stage) if manifest else settings_schema(stage, config)
    print(json.dumps(content, indent=2))


def report(
    run: Run,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="Text that the run's models continue in the report.")
    ] = None,
) -> None:
    """Write RUN/reports/report.html: all there is to know of the run on one page that opens anywhere."""
    from cpipe.console import session
    from schemas.report_run import ReportConfig
    from stages.report_run import stream

    with session(run, "report", log=False):
        if prompt:
            from cpipe.samples import write_samples

            write_samples(run, prompt)
        written = [run / ref.path for ref in stream(ReportConfig(), run)]
    for path in written:
        print(path)
