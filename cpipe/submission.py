"""The config of `cpipe slurm`: what every stage would run with, and the table [slurm].

- jobs start cpipe as it was started here, by absolute paths: a job's PATH may be another
"""

import os
import sys
from pathlib import Path

from cpipe.pipeline import BY_COMMAND, PIPELINE, TABLES
from cpipe.settings import FILE_NAME, read_settings, resolve
from schemas.failures import UsageFailure
from schemas.strict import validated
from schemas.submit_jobs import SlurmConfig, SubmitConfig


def submission(run_dir: Path, inputs: list[str], until: str | None, file: Path | None, *, submit: bool) -> SubmitConfig:
    """The stages up to `until` as jobs. Raises UsageFailure in one line."""
    if until is not None and until not in PIPELINE:
        raise UsageFailure(f"--until {until} is no stage; expected one of {', '.join(PIPELINE)}")
    place = file or run_dir / FILE_NAME
    tables = read_settings(run_dir, file, TABLES)
    (slurm, *more) = tables.get("slurm", [{}])
    if more:
        raise UsageFailure(f"{place}: [slurm] stands {len(more) + 1} times: leave one")
    stages = {
        command: tuple(
            resolve(BY_COMMAND[command].config, table, {}, f"{place} [{command}]")
            for table in tables.get(command, [{}])
        )
        for command in (PIPELINE[: PIPELINE.index(until) + 1] if until else PIPELINE)
    }
    return SubmitConfig(
        program=_program(),
        inputs=tuple(inputs),
        settings_file=str(file) if file else None,
        stages=stages,  # type: ignore[arg-type]  # a test holds the pipeline against the schema's list
        slurm=validated(SlurmConfig, slurm, f"{place} [slurm]"),
        submit=submit,
    )


def _program() -> tuple[str, ...]:
    started = Path(sys.argv[0])
    if started.name == "cpipe" and os.access(started, os.X_OK):
        return (str(started.absolute()),)
    return sys.executable, "-m", "cpipe"
