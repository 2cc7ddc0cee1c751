"""A folder that leaves the run: filled beside its place, moved there whole, and never over what is not its own.

- its manifest says that `cpipe export` made it, of what, and with which settings: the same again is up to date
- forced, a folder that holds anything else is set aside under another name, not deleted
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from loguru import logger

from schemas.export_model import ExportConfig, ExportManifest
from schemas.failures import IntegrityFailure, StaleFailure, UsageFailure
from schemas.files import sync_folder
from schemas.manifest import FILE_NAME, InputRef, key_of
from stages.artifacts.stage_folder import differences


class ExportFolder:
    """The place `folder` names. Raises UsageFailure when nothing may be put there."""

    def __init__(self, folder: Path, run_dir: Path) -> None:
        self.path = Path(os.path.realpath(folder))
        run = Path(os.path.realpath(run_dir))
        if run.is_relative_to(self.path):
            raise UsageFailure(f"{folder} holds the run itself: give another folder")
        if os.path.lexists(self.path) and not self.path.is_dir():
            raise UsageFailure(f"{folder} is a file: give a folder")
        self._found = self._manifest()
        self._foreign = self._holds_more()
        if self._foreign and self.path.is_relative_to(run):
            raise UsageFailure(f"{folder} is a folder of the run, with files in it: give another one")

    def _manifest(self) -> ExportManifest | None:
        try:
            return ExportManifest.read(self.path)
        except (UsageFailure, IntegrityFailure):  # none, or another's
            return None

    def _holds_more(self) -> bool:
        """Whether anything lies there that no export wrote."""
        listed = {ref.path for ref in self._found.outputs} | {FILE_NAME} if self._found else set()
        return self.path.is_dir() and any(path.name not in listed for path in self.path.iterdir())

    def finished(self, config: ExportConfig, inputs: Sequence[InputRef], force: bool) -> ExportManifest | None:
        """The manifest where there is nothing to do. Raises UsageFailure where something else is in the way."""
        found = self._found
        if force:
            return None
        if found is None:
            if self._foreign:
                raise UsageFailure(
                    f"{self.path} holds files that `cpipe export` did not write: give another folder, or --force to "
                    f"move them to {self._aside()}"
                )
            return None
        if found.key != key_of(ExportManifest, config, inputs):
            raise StaleFailure(
                f"{self.path} is an export, but {'; '.join(differences(found, config, inputs))}: give --force to "
                "replace it, or another folder"
            )
        for ref in found.outputs:
            ref.locate(self.path)
        return found

    @contextmanager
    def new(self) -> Iterator[Path]:
        """A folder to fill, which takes its place when the block is left without a failure."""
        work = self.path.with_name(f".{self.path.name}.export")
        shutil.rmtree(work, ignore_errors=True)  # of an export that was killed
        work.mkdir(parents=True)
        try:
            yield work
            sync_folder(work)
            self._make_room()
            os.replace(work, self.path)
            sync_folder(self.path.parent)
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _make_room(self) -> None:
        if not self.path.exists():
            return
        if self._foreign:
            aside = self._aside()
            logger.info("moving what was in {} to {}", self.path, aside)
            os.replace(self.path, aside)
        else:
            shutil.rmtree(self.path)

    def _aside(self) -> Path:
        names = (f"{self.path.name}.replaced{f'-{number}' if number else ''}" for number in range(1 << 20))
        return next(path for path in map(self.path.with_name, names) if not os.path.lexists(path))
