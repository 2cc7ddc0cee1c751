"""The folder of one stage in a run: claimed by one process, filled, finished by its manifest.

- same key and outputs in place: up to date. Another key: refused with the reason, unless forced
- forced, the old folder is set aside and deleted only when the new one is finished
- leftovers of an unfinished start are kept for resuming when their key is the same, and cleared otherwise
- where several processes work together, the first one (the leader) claims and writes for all; the others wait for its
  manifest, which alone says what was written: later stages of the same command read it, and go by its digest
- where several jobs share a stage's work (`shared`), they hold it together, and each claims a folder of its own in it
"""

import fcntl
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Generic, TypeVar

from loguru import logger

from schemas.changes import changed_inputs, changed_settings, changed_version
from schemas.failures import ResourceFailure, StaleFailure, UsageFailure
from schemas.files import FileRef, write_bytes
from schemas.launch import launched_as
from schemas.manifest import FILE_NAME, InputRef, Manifest, key_of
from schemas.strict import Config, Strict
from stages.artifacts.environment import environment
from stages.artifacts.locks import held, open_lock, refusal, take

M = TypeVar("M", bound=Manifest)

CLAIM_NAME = ".claim"  # holds the key of the unfinished start
PATIENCE = 10.0  # seconds a sharer waits for one that clears the way; who works alone takes longer
WRITING = 600.0  # seconds the others give the leader to write what all have made


class Claim(Generic[M]):
    """A stage folder held by this process. `finished` is the manifest when there is nothing to do."""

    def __init__(
        self, run_dir: Path, folder: str, manifest_type: type[M], config: Config, inputs: Sequence[InputRef]
    ) -> None:
        self.run_dir = run_dir
        self.folder = folder
        self.path = run_dir / folder
        self.finished: M | None = None
        self.leader = launched_as().rank == 0
        self._manifest_type = manifest_type
        self._config = config
        self._inputs = tuple(inputs)
        self._key = key_of(manifest_type, config, inputs)
        self._replaced = run_dir / f".{folder.replace('/', '-')}.replaced"
        self._started = time.monotonic()
        self._started_at = datetime.now(UTC).isoformat(timespec="seconds")

    def begin_collection(self) -> None:
        """Find the collection up to date. What it says follows from its members, so a stale one is dropped unasked."""
        path = self.path / FILE_NAME
        if not path.exists():
            return
        try:
            manifest = self._manifest_type.read(self.run_dir, self.folder)
        except UsageFailure:
            if self.leader:
                raise
            return  # the leader has dropped it meanwhile
        if manifest.key == self._key:
            self.finished = manifest
        elif self.leader:
            path.unlink()

    def begin(self, force: bool) -> None:
        """Find the stage up to date, or clear the way for it. Raises StaleFailure when it is not what is asked for."""
        if not self.leader and force:
            return  # the leader sets the old folder aside
        if (self.path / FILE_NAME).exists():
            if not force:
                self.finished = self._up_to_date()
                self._tidy()
                return
            shutil.rmtree(self._replaced, ignore_errors=True)
            os.replace(self.path, self._replaced)
        if not self.leader:
            return
        claim = self.path / CLAIM_NAME
        if self.path.exists() and not (claim.is_file() and claim.read_text() == self._key):
            if any(self.path.iterdir()):
                logger.info("clearing leftovers of an earlier start with other settings in {}", self.path)
            shutil.rmtree(self.path)
        write_bytes(claim, self._key.encode(), self.run_dir)

    def join(self) -> None:
        """Find the stage up to date, or begun with the same settings and inputs. Raises StaleFailure."""
        if (self.path / FILE_NAME).exists():
            self.finished = self._up_to_date()
            return
        claim = self.path / CLAIM_NAME
        if not (claim.is_file() and claim.read_text() == self._key):
            raise StaleFailure(f"{self.path} is being filled with other settings or inputs: wait, or use another run")

    def _up_to_date(self) -> M:
        manifest = self._manifest_type.read(self.run_dir, self.folder)
        if manifest.key != self._key:
            why = "; ".join(self._differences(manifest)) or "its key is not that of its settings and inputs"
            raise StaleFailure(f"{self.path} is finished, but {why}: give --force to do it again, or use another run")
        for ref in manifest.outputs:
            ref.locate(self.run_dir)
        return manifest

    def _differences(self, manifest: M) -> Iterator[str]:
        if manifest.command != self._manifest_type.command:  # the settings have nothing in common
            return iter([f"it was made by `cpipe {manifest.command}`"])
        return differences(manifest, self._config, self._inputs)

    def finish(self, outputs: Sequence[FileRef], metrics: Strict) -> M:
        """Write the manifest (the leader does): from now on the stage is finished. Returns it on every process.

        Raises ResourceFailure where the leader does not write it.
        """
        if not self.leader:
            return self._from_leader()
        manifest = self._manifest_type(
            schema_id=self._manifest_type.expected_schema(),
            key=self._key,
            config=self._config,
            inputs=self._inputs,
            outputs=tuple(outputs),
            metrics=metrics,
            environment=environment(self._started_at, time.monotonic() - self._started, launched_as().world),
        ).sealed()
        manifest.write(self.run_dir, self.folder)
        self._tidy()
        return manifest

    def _from_leader(self) -> M:
        for _ in range(round(WRITING / 0.1)):
            with suppress(UsageFailure):  # it is not there yet
                manifest = self._manifest_type.read(self.run_dir, self.folder)
                if manifest.key == self._key:
                    return manifest
            time.sleep(0.1)
        raise ResourceFailure(
            f"process 0 has not finished {self.path} within {WRITING:.0f} seconds of the others: see what it says, and "
            "run the same command to resume"
        )

    def _tidy(self) -> None:
        """Remove what a finished stage needs no more; a crash just after its manifest was written leaves it behind."""
        if self.leader:
            (self.path / CLAIM_NAME).unlink(missing_ok=True)
            shutil.rmtree(self._replaced, ignore_errors=True)


@contextmanager
def claim_folder(
    run_dir: Path,
    manifest_type: type[M],
    config: Config,
    inputs: Sequence[InputRef],
    *,
    folder: str | None = None,
    force: bool = False,
    collection: bool = False,
) -> Iterator[Claim[M]]:
    """Hold the stage's folder for the length of the block. `collection`: it holds finished stages of its own.

    Raises LockedFailure when another process holds it, StaleFailure when it is finished with other settings or inputs.
    """
    name = folder or manifest_type.folder
    with held(run_dir, name) if launched_as().rank == 0 else nullcontext():
        claim = Claim(run_dir, name, manifest_type, config, inputs)
        if collection:
            claim.begin_collection()
        else:
            claim.begin(force)
        yield claim


@contextmanager
def share_folder(
    run_dir: Path, manifest_type: type[M], config: Config, inputs: Sequence[InputRef]
) -> Iterator[Claim[M]]:
    """Hold the stage's folder together with other jobs of the same settings and inputs, and nobody else.

    Raises LockedFailure when a process holds it alone, or jobs with other settings share it, and StaleFailure.
    """
    name = manifest_type.folder
    claim = Claim(run_dir, name, manifest_type, config, inputs)
    with open_lock(run_dir, name) as file:
        if take(file, fcntl.LOCK_EX):
            claim.begin(force=False)  # alone for a moment: leftovers of other settings can be cleared
        for _ in range(round(PATIENCE / 0.1)):
            if take(file, fcntl.LOCK_SH):
                break
            time.sleep(0.1)
        else:
            raise refusal(run_dir / name, file)
        claim.join()
        yield claim


def differences(manifest: Manifest, config: Config, inputs: Sequence[InputRef]) -> Iterator[str]:
    """Why a finished stage is not the one asked for, in words."""
    yield from changed_settings(manifest.config, config)
    yield from changed_inputs(manifest.inputs, inputs)
    yield from changed_version(manifest.environment.versions)


def drop_leftovers(folder: Path) -> None:
    """Delete the files in `folder` but the claim: what a killed start left that cannot be resumed."""
    for path in folder.iterdir():
        if path.name not in (CLAIM_NAME, FILE_NAME) and path.is_file():
            path.unlink()
