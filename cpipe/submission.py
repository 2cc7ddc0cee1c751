"""The config of `cpipe slurm`: what every stage would run with, and the table [slurm].

- jobs start cpipe as it was started here, by absolute paths: a job's PATH may be another
"""

import os
import sys
from pathlib import Path

from cpipe.pipeline import TABLES, part_of_pipeline
from cpipe.settings import FILE_NAME, asked_for, read_settings
from schemas.failures import UsageFailure
from schemas.strict import Config, validated
from schemas.submit_jobs import SlurmConfig, SubmitConfig


def submission(run_dir: Path, inputs: list[str], until: str | None, file: Path | None, *, submit: bool) -> SubmitConfig:
    """The stages up to `until` as jobs. Raises UsageFailure in one line."""
    place = file or run_dir / FILE_NAME
    tables = read_settings(run_dir, file, TABLES)
    (slurm, *more) = tables.get("slurm", [{}])
    if more:
        raise UsageFailure(f"{place}: [slurm] stands {len(more) + 1} times: leave one")
    stages: dict[str, tuple[Config, ...]] = {}
    for stage, asked in asked_for(run_dir, file, part_of_pipeline(None, until), inputs):
        stages[stage.command] = (*stages.get(stage.command, ()), *([asked] if asked else []))
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
