"""Clean a run: remove what no stage needs any more. Results, logs and settings stay.

- every lock of the run is held meanwhile: a stage at work makes the command refuse, and none can start beside it.
  The lock files stay: one removed while another process opens it would be two locks
- a folder set aside by a forced start that was killed is the only copy of the earlier results until the new ones are
  finished: it goes only then
- of a folder that goes, its manifest goes first: killed in between, what is left does not look finished
"""

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from schemas.clean_run import CleanConfig, Removed
from schemas.cluster_documents import ClusterManifest
from schemas.failures import LockedFailure
from schemas.manifest import FILE_NAME
from schemas.run_manifests import manifest_folders
from schemas.tokenize_text import TokenizeManifest
from schemas.train_experts import ExpertsManifest
from schemas.train_gates import GatesManifest
from stages.artifacts.added_domains import begun_domains
from stages.artifacts.feature_cache import FOLDER as FEATURES
from stages.artifacts.locks import FOLDER, holder, take
from stages.artifacts.stage_folder import CLAIM_NAME
from stages.data.corpus import CACHE, STDIN

CACHES = (CACHE, FEATURES)
RESUMABLE = ("checkpoints", "parts", "shares")  # folders from which a killed stage goes on
HALF_WRITTEN = re.compile(r"\..+\.\d+\.tmp")  # as `new_file` calls it: .<name>.<process>.tmp
Find = tuple[Path, str]  # what can go, and why


def stream(config: CleanConfig, run_dir: Path) -> Iterator[Removed]:
    """Each thing as it is removed. Raises LockedFailure when a stage is at work."""
    with _held(run_dir):
        for path, why in [*_leftovers(run_dir, config.unfinished), *_orphans(run_dir), *_caches(run_dir)]:
            size = _size(path)
            if not config.dry_run:
                _remove(path)
            yield Removed(path=path.relative_to(run_dir).as_posix(), bytes=size, why=why)


@contextmanager
def _held(run_dir: Path) -> Iterator[None]:
    """Hold all locks of the run."""
    with ExitStack() as held:
        for path in sorted((run_dir / FOLDER).glob("*.lock")):
            file = held.enter_context(path.open("r+"))
            if not take(file, fcntl.LOCK_EX):
                raise LockedFailure(f"{run_dir} is being worked on by {holder(file)} ({path.stem}): wait for it")
        yield


def _leftovers(run_dir: Path, unfinished: bool) -> Iterator[Find]:
    """What killed starts left: half-written files, folders set aside, and what they would have resumed from."""
    for path, folders, files in os.walk(run_dir):
        here = Path(path)
        folders[:] = sorted(name for name in folders if name != FOLDER)
        for name in sorted(files):
            if HALF_WRITTEN.fullmatch(name) and not _is_writing(name):
                yield here / name, "half-written by a start that was killed"
        for name in list(folders):
            if (why := _why_no_more(run_dir, here, name, unfinished)) is not None:
                folders.remove(name)
                yield here / name, why


def _is_writing(name: str) -> bool:
    """Whether the process in `.<name>.<process>.tmp` runs on this machine."""
    return Path(f"/proc/{name.split('.')[-2]}").exists()


def _why_no_more(run_dir: Path, here: Path, name: str, unfinished: bool) -> str | None:
    """Why nothing needs the folder `name` of the folder `here`, or None."""
    if here == run_dir:
        return _why_set_aside(run_dir, name)
    if name not in RESUMABLE or (stage := _stage_around(run_dir, here)) is None:
        return None
    if (stage / FILE_NAME).is_file():
        return "left by a stage that is finished"
    return "for resuming a stage that is not finished" if unfinished else None


def _stage_around(run_dir: Path, folder: Path) -> Path | None:
    """The folder of the stage that `folder` belongs to: finished or begun; None for what is no stage's."""
    around = [folder, *folder.parents]
    within = around[: around.index(run_dir)]
    return next((each for each in within if any((each / name).is_file() for name in (FILE_NAME, CLAIM_NAME))), None)


def _why_set_aside(run_dir: Path, name: str) -> str | None:
    if name == STDIN and (run_dir / TokenizeManifest.folder / FILE_NAME).is_file():
        return "standard input, which is tokenized"
    if not (name.startswith(".") and name.endswith(".replaced")):
        return None
    stage = name[1:].removesuffix(".replaced")
    # experts-003 is experts/003, and gates-module-joint gates/module-joint
    finished = stage in {folder.replace("/", "-") for folder in manifest_folders(run_dir)}
    return "set aside by a forced start, which has finished" if finished else None


def _orphans(run_dir: Path) -> Iterator[Find]:
    """Experts of an earlier clustering, beyond those that the experts trained since are, and gates of such experts."""
    if not all((run_dir / kind.folder / FILE_NAME).is_file() for kind in (ClusterManifest, ExpertsManifest)):
        return
    clusters = ClusterManifest.read(run_dir)
    count = ExpertsManifest.read(run_dir).metrics.experts
    if count != clusters.config.clusters + len(begun_domains(run_dir)):
        return
    for path in sorted((run_dir / ExpertsManifest.folder).iterdir()):
        if _is_beyond(path, count):
            yield path, f"expert of an earlier clustering; there are {count} now"
    gates = run_dir / GatesManifest.folder
    if (gates / FILE_NAME).is_file() and GatesManifest.read(run_dir).metrics.experts == count:
        for path in sorted(gates.glob("*/*")):
            if _is_beyond(path, count):
                yield path, f"gates of an expert of an earlier clustering; there are {count} experts now"


def _is_beyond(path: Path, count: int) -> bool:
    """Whether it is the folder of an expert whose number is not below `count`."""
    return path.name.isdecimal() and int(path.name) >= count and path.is_dir()


def _caches(run_dir: Path) -> Iterator[Find]:
    for name in CACHES:
        if (run_dir / name).exists():
            yield run_dir / name, "cache: made again when it is needed"


def _size(path: Path) -> int:
    if path.is_symlink() or path.is_file():
        return path.lstat().st_size
    return sum((Path(place) / name).lstat().st_size for place, _, names in os.walk(path) for name in names)


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        (path / FILE_NAME).unlink(missing_ok=True)
        shutil.rmtree(path)
