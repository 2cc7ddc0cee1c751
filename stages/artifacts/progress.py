"""Which stages of a run have still to be done: read from manifests, nothing computed.

- a finished stage counts when its settings are those asked for and the stages before it are those it was made from
- of the user's text only what the settings say is compared, not its bytes: hashing a corpus is no small matter
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from schemas.cluster_documents import ClusterManifest
from schemas.compose_model import ComposeConfig, ComposeManifest
from schemas.evaluate_models import EvaluateManifest
from schemas.failures import IntegrityFailure, StaleFailure
from schemas.manifest import FILE_NAME, InputRef, Manifest
from schemas.strict import Config
from schemas.submit_jobs import Command
from schemas.tokenize_text import TokenizeManifest
from schemas.train_experts import ExpertManifest, ExpertsConfig, ExpertsManifest
from schemas.train_gates import GatesManifest
from schemas.train_seed import SeedManifest
from stages.artifacts.stage_folder import differences

MANIFESTS: dict[Command, type[Manifest]] = {
    "tokenize": TokenizeManifest,
    "cluster": ClusterManifest,
    "train-seed": SeedManifest,
    "train-experts": ExpertsManifest,
    "train-gates": GatesManifest,
    "compose": ComposeManifest,
    "evaluate": EvaluateManifest,
}
KINDS = {kind.folder: kind for kind in MANIFESTS.values()}


@dataclass(frozen=True)
class Todo:
    """The stages to be done; of those in `again` all members, and those in `forced` although they are finished."""

    stages: frozenset[str]
    again: frozenset[str]
    forced: frozenset[str]


def find_todo(
    stages: Mapping[Command, Sequence[Config]], after: Mapping[Command, Sequence[str]], run_dir: Path, *, force: bool
) -> Todo:
    """Look at the stages in order; what comes after one that has to be done has to be done too.

    Raises StaleFailure for one that is finished otherwise than asked for, unless forced.
    """
    todo, again, forced = set[str](), set[str](), set[str]()
    for command, configs in stages.items():
        whys = [why for config in configs for why in _reasons(command, config, run_dir)]
        if whys and not force:
            raise StaleFailure(f"{whys[0]}: give --force to do it again, or use another run")
        if whys or not todo.isdisjoint(after[command]):
            again.add(command)
        if command in again or not all(_has_manifest(run_dir, _folder(command, config)) for config in configs):
            todo.add(command)
        if force and command in again:
            forced.add(command)
    return Todo(frozenset(todo), frozenset(again), frozenset(forced))


def _reasons(command: Command, config: Config, run_dir: Path) -> Iterator[str]:
    """Why what is finished of a stage is not what is asked for, in words."""
    folder = _folder(command, config)
    if manifest := _read(run_dir, folder, MANIFESTS[command]):
        for why in differences(manifest, config, [_now(ref, run_dir) for ref in manifest.inputs]):
            yield f"{run_dir / folder} is finished, but {why}"
    if isinstance(config, ExpertsConfig):
        for path in sorted([*run_dir.glob(f"{folder}/*/{FILE_NAME}"), *run_dir.glob(f"dense/{FILE_NAME}")]):
            member = ExpertManifest.parse(path)
            share = {"batch_size": member.config.training.batch_size}
            wanted = member.config.model_copy(update={"training": config.training.model_copy(update=share)})
            for why in differences(member, wanted, [_now(ref, run_dir) for ref in member.inputs]):
                yield f"{path.parent} is finished, but {why}"


def _folder(command: Command, config: Config) -> str:
    return config.name if isinstance(config, ComposeConfig) else MANIFESTS[command].folder


def _has_manifest(run_dir: Path, folder: str) -> bool:
    return (run_dir / folder / FILE_NAME).is_file()


def _read(run_dir: Path, folder: str, kind: type[Manifest]) -> Manifest | None:
    """The manifest; None where there is none, or another command has made what lies there."""
    if not _has_manifest(run_dir, folder):
        return None
    path = run_dir / folder / FILE_NAME
    try:
        schema = str(json.loads(path.read_bytes())["schema"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise IntegrityFailure(f"{path} is no manifest of cpipe: remove it, or rerun its stage") from error
    return kind.parse(path) if schema.split("/")[0] == kind.expected_schema().split("/")[0] else None


def _now(ref: InputRef, run_dir: Path) -> InputRef:
    """The input as it is now; itself where it is no stage of the run, or not finished."""
    kind = KINDS.get(ref.name)
    manifest = _read(run_dir, ref.name, kind) if kind else None
    return manifest.as_input(ref.name) if manifest else ref
