"""What `cpipe run` would do, and why, found out without touching anything.

- a finished stage is compared with the settings asked for now, and what it was made from with what lies in the run now
- text and other files of the user's are not read: whether they changed is seen when the stage runs
- what follows from a stage that is made again is repeated only where that comes out different
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.table import Table

from cpipe.pipeline import BY_COMMAND, Stage
from cpipe.settings import FILE_NAME as SETTINGS
from cpipe.settings import resolve
from cpipe.show import OUT
from schemas.changes import changed_settings, changed_version
from schemas.cluster_documents import ClusterConfig, SweepManifest
from schemas.compose_model import ComposeConfig
from schemas.manifest import FILE_NAME, InputRef, Manifest
from schemas.run_manifests import FROM_OUTSIDE, read_manifest
from schemas.strict import Config
from schemas.tokenize_text import TokenizeConfig
from schemas.train_experts import ExpertManifest, ExpertsConfig

State = Literal["up to date", "run", "again", "check"]
MODELS = ("gates", "dense", "central*", "experts/*")  # what evaluate takes in when it is there


class Step(NamedTuple):
    """One stage with one table of settings.

    state: `run` it is not finished, `again` finished with other settings or inputs, which only --force repeats,
    `check` finished, and repeated if what is made before it comes out different
    """

    stage: str
    folder: str
    state: State
    why: tuple[str, ...]


def forecast(
    run_dir: Path, tables: Mapping[str, list[dict[str, Any]]], commands: Sequence[str], texts: Sequence[str]
) -> list[Step]:
    """A step for every stage and table, in order. Raises UsageFailure and IntegrityFailure as running would."""
    steps: list[Step] = []
    for command in commands:
        stage = BY_COMMAND[command]
        flags = {"inputs": list(texts)} if command == "tokenize" and texts else {}
        for table in tables.get(command, [{}]):
            config = resolve(stage.config, table, flags, f"{run_dir / SETTINGS} [{command}]")
            steps.append(_step(stage, config, run_dir, [step.folder for step in steps if step.state != "up to date"]))
    return steps


def _step(stage: Stage, config: Config, run_dir: Path, changing: list[str]) -> Step:
    folder, kind, whole = _target(stage, config)
    no_text = isinstance(config, TokenizeConfig) and not config.inputs
    if not (run_dir / folder / FILE_NAME).is_file():
        unnamed = ("and its text is to be named after the run",) if no_text else ()
        return Step(stage.command, folder, "run", (_unfinished(run_dir, folder), *unnamed))
    if no_text:
        return Step(stage.command, folder, "up to date", ("no text is named: taken as it is",))
    manifest = kind.read(run_dir, folder)
    for ref in manifest.outputs:
        ref.locate(run_dir)
    missing = [name for name in _members(manifest, folder) if not (run_dir / name / FILE_NAME).is_file()]
    if missing:
        return Step(stage.command, folder, "run", tuple(f"{name} is not finished" for name in missing))
    changed = [*changed_version(manifest.environment.versions), *_changed_inputs(manifest, folder, run_dir, changing)]
    changed = [*(changed_settings(manifest.config, config) if whole else ()), *changed]
    if changed:
        return Step(stage.command, folder, "again", tuple(changed))
    names = {ref.name for ref in _inputs(manifest, folder, run_dir)}
    if waiting := [name for name in changing if any(_holds(name, other) for other in names)]:
        return Step(stage.command, folder, "check", tuple(f"its input {name} is made before it" for name in waiting))
    return Step(stage.command, folder, "up to date", ())


def _target(stage: Stage, config: Config) -> tuple[str, type[Manifest], bool]:
    """Folder and manifest of the stage with these settings, and whether the manifest holds just these settings."""
    if isinstance(config, ComposeConfig):
        return config.name, stage.manifest, True
    if isinstance(config, ClusterConfig) and config.sweep:
        return SweepManifest.folder, SweepManifest, True
    if isinstance(config, ExpertsConfig) and config.expert is not None:
        folder = config.expert if config.expert == "dense" else f"experts/{int(config.expert):03d}"
        return folder, ExpertManifest, False  # its share of the batch depends on the clusters
    return stage.manifest.folder, stage.manifest, True


def _unfinished(run_dir: Path, folder: str) -> str:
    finished = len(list((run_dir / folder).glob(f"*/{FILE_NAME}")))
    if finished:
        return f"begun, {finished} members finished"
    return "begun" if (run_dir / folder).is_dir() else "not finished"


def _members(manifest: Manifest, folder: str) -> list[str]:
    """Folders of the finished stages that this one holds together: gates, or the experts and their dense baseline."""
    names = [ref.name for ref in manifest.inputs]
    own = [name for name in names if name.startswith(f"{folder}/")]
    return [name for name in names if name in own or name == "dense"] if own else []


def _inputs(manifest: Manifest, folder: str, run_dir: Path) -> Iterator[InputRef]:
    """What the stage, and each member of it, was made from."""
    members = _members(manifest, folder)
    for name in members:
        yield from read_manifest(run_dir, name).inputs
    yield from manifest.inputs


def _changed_inputs(manifest: Manifest, folder: str, run_dir: Path, changing: list[str]) -> Iterator[str]:
    """Inputs that lie in the run now with another content, and models that evaluate has not seen."""
    if manifest.command in FROM_OUTSIDE:
        return
    digests: dict[str, str | None] = {}
    for ref in _inputs(manifest, folder, run_dir):
        if ref.name not in digests:
            there = (run_dir / ref.name / FILE_NAME).is_file()
            digests[ref.name] = read_manifest(run_dir, ref.name).content_digest() if there else None
            if digests[ref.name] not in (None, ref.digest):
                yield f"its input {ref.name} has changed"
    if manifest.command == "evaluate":
        found = {path.parent for name in MODELS for path in run_dir.glob(f"{name}/{FILE_NAME}")}
        there_now = {path.relative_to(run_dir).as_posix() for path in found}
        coming = {name for name in changing if name.startswith("central") or name == "gates"}
        yield from (f"its input {name} is new" for name in sorted((there_now | coming) - digests.keys()))


def _holds(folder: str, name: str) -> bool:
    return name == folder or name.startswith(f"{folder}/")


def show_forecast(steps: Sequence[Step], run_dir: Path, *, force: bool, as_json: bool) -> None:
    """A line per step, and where the run would stop."""
    if as_json:
        print(json.dumps({"run": str(run_dir), "steps": [step._asdict() for step in steps]}, indent=2))
        return
    table = Table(title=f"{run_dir}, nothing done yet")
    for name in ("stage", "folder", "what", "why"):
        table.add_column(name, overflow="fold")
    words = {"again": "run again" if force else "refuse", "check": "run again if that differs"}
    for step in steps:
        table.add_row(step.stage, step.folder, words.get(step.state, step.state), "; ".join(step.why))
    OUT.print(table)
    refused = [step.stage for step in steps if step.state == "again"]
    if refused and not force:
        OUT.print(f"It would stop at {refused[0]}: with --force it goes on and repeats what has changed.")
    elif all(step.state == "up to date" for step in steps):
        OUT.print("Nothing to do.")
