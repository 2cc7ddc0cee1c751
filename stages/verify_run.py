"""Verify a run: every file that a manifest lists, the files that none lists, and the chain of manifests.

- every file is read once, however many manifests list it; nothing is written, and no stage is kept from running
- a manifest is checked by its own digest, by those that were made from it, and its settings and inputs by its key
- a folder without a manifest is not finished, so it has no say
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from loguru import logger

from schemas.failures import IntegrityFailure
from schemas.files import CHUNK, FileRef
from schemas.manifest import FILE_NAME, Manifest, key_of
from schemas.report_run import DERIVED
from schemas.run_manifests import broken_links, manifest_folders, read_manifest
from schemas.train_experts import AddedManifest, flags_of
from schemas.verify_run import CheckedFolder, Fault, Problem, VerifyConfig
from schemas.version import VERSION

UNLISTED = ("metrics.jsonl", "samples.jsonl", *DERIVED)  # what stages and reports leave beside the outputs
LOGS = ("tensorboard", "wandb")  # curves of a training
LEFTOVERS = ("checkpoints", "parts", "shares")  # of work that was cut short: `cpipe clean` removes them


def stream(config: VerifyConfig, run_dir: Path) -> Iterator[CheckedFolder]:
    """Each folder that holds a manifest, as soon as it is checked, with what is wrong in it."""
    folders = manifest_folders(run_dir)
    manifests, refused = _read_manifests(run_dir, folders)
    reader = Reader(run_dir, config, manifests)
    for folder in folders:
        if folder in refused:
            yield CheckedFolder(folder=folder, files=0, bytes=0, problems=(refused[folder],))
            continue
        manifest = manifests[folder]
        stale = [_problem(folder, "stale", run_dir, why, manifest) for why in broken_links(folder, manifests, refused)]
        problems = [*_edited(run_dir, folder, manifest), *stale, *reader.check(manifest)]
        problems += _extra(run_dir, folder, manifest, folders)
        size = sum(ref.size for ref in manifest.outputs)
        yield CheckedFolder(folder=folder, files=len(manifest.outputs), bytes=size, problems=tuple(problems))


def _read_manifests(run_dir: Path, folders: list[str]) -> tuple[dict[str, Manifest], dict[str, Problem]]:
    """The manifests by folder, and for each that cannot be read the reason."""
    manifests, refused = {}, {}
    for folder in folders:
        try:
            manifests[folder] = read_manifest(run_dir, folder)
        except (IntegrityFailure, OSError) as error:
            more = "" if "rerun" in str(error) else "; rerun its stage with --force"
            refused[folder] = Problem(path=f"{folder}/{FILE_NAME}", fault="manifest", message=f"{error}{more}")
    return manifests, refused


def _problem(path: str, fault: Fault, run_dir: Path, why: str, manifest: Manifest) -> Problem:
    # What was added later is made from text that no setting names.
    more = (
        f" --add {manifest.config.name} TEXT" if isinstance(manifest, AddedManifest) else flags_of(path.split("/")[0])
    )
    message = f"{run_dir / path} {why}: run `cpipe {manifest.command}{more}` with --force"
    return Problem(path=path, fault=fault, message=message)


def _edited(run_dir: Path, folder: str, manifest: Manifest) -> Iterator[Problem]:
    """A digest that is not the rest's, or a key that does not follow; only the version that wrote it can tell that."""
    same_version = manifest.environment.versions.get("cpipe") == VERSION
    if not manifest.is_as_sealed():
        why = "its digest is not that of the rest"
    elif same_version and key_of(type(manifest), manifest.config, manifest.inputs) != manifest.key:
        why = "its settings and inputs do not give its key"
    else:
        return
    why = f"was changed after it was written ({why})"
    yield _problem(f"{folder}/{FILE_NAME}", "changed", run_dir, why, manifest)


class Reader:
    """Hashes the files that manifests list, and says how far it is."""

    def __init__(self, run_dir: Path, config: VerifyConfig, manifests: dict[str, Manifest]) -> None:
        self._run_dir = run_dir
        self._sizes_only = config.sizes_only
        self._digests: dict[str, str] = {}
        sizes = {ref.path: ref.size for manifest in manifests.values() for ref in manifest.outputs}
        self._total = sum(sizes.values())
        self._done = 0

    def check(self, manifest: Manifest) -> Iterator[Problem]:
        """What is wrong with the outputs of `manifest`."""
        for ref in manifest.outputs:
            if found := self._fault(ref):
                yield _problem(ref.path, found[0], self._run_dir, found[1], manifest)

    def _fault(self, ref: FileRef) -> tuple[Fault, str] | None:
        path = self._run_dir / ref.path
        if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(self._run_dir)):
            return "missing", "is a link that leads out of the run"
        if not os.path.isfile(path):
            return "missing", "is missing"
        try:
            size = path.stat().st_size
            if size != ref.size:
                return "cut" if size < ref.size else "longer", f"has {size:,} bytes, its manifest says {ref.size:,}"
            if not self._sizes_only and self._digest(path, ref.path) != ref.digest:
                return "changed", "was changed after it was written (sha256 differs)"
        except OSError as error:
            return "unreadable", f"cannot be read ({error.strerror})"
        return None

    def _digest(self, path: Path, name: str) -> str:
        if name not in self._digests:
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while chunk := file.read(CHUNK):
                    digest.update(chunk)
                    self._tell(len(chunk), name)
            self._digests[name] = f"sha256:{digest.hexdigest()}"
        return self._digests[name]

    def _tell(self, size: int, name: str) -> None:
        self._done += size
        progress = {"task": "verify", "done": self._done >> 20, "total": 1 + (self._total >> 20)}
        logger.bind(**progress, text=f"MiB · {name}").debug("{}", name)


def _extra(run_dir: Path, folder: str, manifest: Manifest, folders: list[str]) -> Iterator[Problem]:
    """Files in the folder that its manifest does not list; folders in it with a manifest speak for themselves."""
    listed = {ref.path for ref in manifest.outputs}
    others = {name for name in folders if name != folder}
    for path, inner, files in os.walk(run_dir / folder):
        place = Path(path).relative_to(run_dir).as_posix()
        inner[:] = sorted(
            name
            for name in inner
            if f"{place}/{name}" not in others and not name.startswith(".") and name not in (*LOGS, *LEFTOVERS)
        )
        for name in sorted(files):
            if name.startswith(".") or name in (FILE_NAME, *UNLISTED) or f"{place}/{name}" in listed:
                continue
            message = f"{run_dir / place / name} is listed in no manifest: move it out of the run, or remove it"
            yield Problem(path=f"{place}/{name}", fault="extra", message=message)
