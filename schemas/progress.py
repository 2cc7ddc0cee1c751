"""What of a pipeline is up to date and what is not, and why: read from manifests, nothing computed and nothing touched.

- a finished stage is compared with the settings asked for now, and what it was made from with what lies in the run now
- text and models of the user's are not read: whether they changed is seen when the stage runs
- what follows from a stage that is made again is repeated only where that comes out different
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from schemas.changes import changed_settings, changed_version
from schemas.cluster_documents import ClusterConfig, ClusterManifest, SweepManifest
from schemas.compose_model import ComposeConfig, ComposeManifest
from schemas.evaluate_models import EvaluateManifest
from schemas.import_model import ImportManifest
from schemas.manifest import FILE_NAME, Manifest
from schemas.report_run import DERIVED
from schemas.run_manifests import FROM_OUTSIDE, manifest_folders, read_manifest
from schemas.strict import Config
from schemas.tokenize_text import TokenizeConfig, TokenizeManifest
from schemas.train_experts import AddedManifest, ExpertsConfig, ExpertsManifest, is_further
from schemas.train_gates import GatesManifest
from schemas.train_seed import SeedManifest

State = Literal["up to date", "run", "again", "check"]
MANIFESTS: dict[str, type[Manifest]] = {
    "tokenize": TokenizeManifest,
    "cluster": ClusterManifest,
    "import": ImportManifest,
    "train-seed": SeedManifest,
    "train-experts": ExpertsManifest,
    "train-gates": GatesManifest,
    "compose": ComposeManifest,
    "evaluate": EvaluateManifest,
}
MODELS = ("gates", "dense", "dense-*", "central*", "experts/*")  # what evaluate takes in when it is there


class Step(NamedTuple):
    """One stage with one table of settings.

    state: `run` it is not finished, `again` finished with other settings or inputs, which only --force repeats,
    `check` finished, and repeated if what is made before it comes out different
    """

    stage: str
    folder: str
    state: State
    why: tuple[str, ...]


def find_progress(asked: Iterable[tuple[str, Config | None]], run_dir: Path) -> list[Step]:
    """A step for every command with its settings, in order; None: nothing is named to make it of, and it is finished.

    Raises UsageFailure and IntegrityFailure as running would.
    """
    asked, steps = list(asked), list[Step]()
    for command, config in asked:
        changing = [step.folder for step in steps if step.state != "up to date"]
        if isinstance(config, ExpertsConfig):
            steps.append(_experts_step(config, _clusters(asked, run_dir), run_dir, changing))
        else:
            steps.append(_step(command, config, run_dir, changing))
    return steps


def state_of(run_dir: Path, folder: str) -> str:
    """How far a stage has got, in words: finished, begun, begun (2 members finished), not finished."""
    place = run_dir / folder
    if is_finished(run_dir, folder):
        return "finished"
    if members := len(manifest_folders(place)):  # also of gates, which lie deeper: gates/independent/003
        return f"begun ({members} members finished)"
    begun = place.is_dir() and any(path.name not in DERIVED for path in place.iterdir())
    return "begun" if begun else "not finished"


def is_finished(run_dir: Path, folder: str) -> bool:
    """Whether the folder holds a manifest."""
    return (run_dir / folder / FILE_NAME).is_file()


def _step(command: str, config: Config | None, run_dir: Path, changing: Sequence[str]) -> Step:
    folder = _folder(command, config)
    if not is_finished(run_dir, folder):
        no_text = isinstance(config, TokenizeConfig) and not config.inputs
        unnamed = ("and its text is to be named after the run",) if no_text else ()
        return Step(command, folder, "run", (state_of(run_dir, folder), *unnamed))
    if config is None:
        return Step(command, folder, "up to date", ("nothing is named to make it of: taken as it is",))
    manifest = read_manifest(run_dir, folder)
    if manifest.command != command:  # the settings have nothing in common
        return Step(command, folder, "again", (f"it was made by `cpipe {manifest.command}`",))
    _locate(manifest, run_dir)
    inputs = _now(manifest, run_dir)
    whys = [*changed_settings(manifest.config, config), *_changes(manifest, inputs)]
    if command == "evaluate":
        whys += [f"its input {name} is new" for name in sorted(_models(run_dir, changing) - inputs.keys())]
    return _finished(command, folder, whys, inputs, changing)


def _folder(command: str, config: Config | None) -> str:
    if isinstance(config, ComposeConfig):
        return config.name
    if isinstance(config, ClusterConfig) and config.sweep:
        return SweepManifest.folder
    return MANIFESTS[command].folder


def _clusters(asked: Iterable[tuple[str, Config | None]], run_dir: Path) -> int | None:
    """How many clusters there will be, or are; None where no one says."""
    for _, config in asked:
        if isinstance(config, ClusterConfig) and not config.sweep:
            return config.clusters
    finished = is_finished(run_dir, ClusterManifest.folder)
    return ClusterManifest.read(run_dir).config.clusters if finished else None


def _experts_step(config: ExpertsConfig, clusters: int | None, run_dir: Path, changing: Sequence[str]) -> Step:
    """Each member is finished or not, as asked for or not; what holds them together follows from them."""
    command, folder = ExpertsManifest.command, ExpertsManifest.folder
    added = [AddedManifest.parse(path).config for path in sorted(run_dir.glob(f"{AddedManifest.folder}/*/{FILE_NAME}"))]
    domains = sorted((domain.expert, domain.name) for domain in added)
    members = dict(config.members(clusters, domains)) if clusters else {}
    if config.expert is not None:
        folder = config.folder_of(config.expert)
        members = {folder: members[folder]} if folder in members else {}
    found = {name: read_manifest(run_dir, name) for name in members if is_finished(run_dir, name)}
    inputs = {name: digest for manifest in found.values() for name, digest in _now(manifest, run_dir).items()}
    if whys := list(_changes_of_members(found, members, run_dir)):
        return _finished(command, folder, whys, inputs, changing)
    if not is_finished(run_dir, folder):
        return Step(command, folder, "run", (state_of(run_dir, folder),))
    missing = [name for name in members if name not in found]
    if config.add and config.add not in [name for _, name in domains]:
        missing.append(f"{AddedManifest.folder}/{config.add}")
    if missing:
        beside = missing[0] if all(map(is_further, missing)) else folder
        return Step(command, beside, "run", tuple(f"{name} is not finished" for name in missing))
    if config.expert is None:
        whole = read_manifest(run_dir, folder)
        if whys := [*changed_settings(whole.config, config), *_changes(whole, _now(whole, run_dir))]:
            return Step(command, folder, "run", tuple(whys))  # written anew, which trains nothing
    return _finished(command, folder, [], inputs, changing)


def _changes_of_members(found: Mapping[str, Manifest], asked: Mapping[str, Config], run_dir: Path) -> Iterator[str]:
    """Why members that are finished are not those asked for; by name what is not so of all of them."""
    whys: dict[str, list[str]] = {}
    for name, manifest in found.items():
        _locate(manifest, run_dir)
        for why in [*changed_settings(manifest.config, asked[name]), *_changes(manifest, _now(manifest, run_dir))]:
            whys.setdefault(why, []).append(name)
    for why, names in whys.items():
        yield why if len(names) == len(found) else f"{', '.join(names)}: {why}"


def _locate(manifest: Manifest, run_dir: Path) -> None:
    for ref in manifest.outputs:
        ref.locate(run_dir)


def _now(manifest: Manifest, run_dir: Path) -> dict[str, str | None]:
    """What the stage was made from, and its digest now; None for what is no finished stage of the run."""
    if manifest.command in FROM_OUTSIDE:
        return {ref.name: None for ref in manifest.inputs}
    return {
        ref.name: read_manifest(run_dir, ref.name).content_digest() if is_finished(run_dir, ref.name) else None
        for ref in manifest.inputs
    }


def _changes(manifest: Manifest, now: Mapping[str, str | None]) -> Iterator[str]:
    """What has changed about a finished stage, but for its settings."""
    yield from changed_version(manifest.environment.versions)
    for ref in manifest.inputs:
        if now[ref.name] not in (None, ref.digest):
            yield f"its input {ref.name} has changed"


def _models(run_dir: Path, changing: Iterable[str]) -> set[str]:
    """The models that evaluate will find: those that are there, and those that are to be made before it."""
    found = {
        path.parent.relative_to(run_dir).as_posix() for name in MODELS for path in run_dir.glob(f"{name}/{FILE_NAME}")
    }
    return found | {name for name in changing if name.startswith("central") or name == "gates" or is_further(name)}


def _finished(command: str, folder: str, whys: Sequence[str], inputs: Iterable[str], changing: Iterable[str]) -> Step:
    """Of a finished stage: whether something speaks against it, or what it was made from may become another."""
    if whys:
        return Step(command, folder, "again", tuple(whys))
    made_before = [name for name in changing if any(_holds(name, other) for other in inputs)]
    if made_before:
        return Step(command, folder, "check", tuple(f"its input {name} is made before it" for name in made_before))
    return Step(command, folder, "up to date", ())


def _holds(folder: str, name: str) -> bool:
    return name == folder or name.startswith(f"{folder}/")
